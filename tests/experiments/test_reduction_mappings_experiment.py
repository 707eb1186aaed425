"""The experiment reduction_mappings: a smoke run against closed forms, and what it refuses."""

import pytest

from experiments._machinery import runner
from experiments.methods import reduction_mappings


def test_smoke_run_meets_the_closed_forms(tmp_path):
    config = reduction_mappings.Config(**reduction_mappings.SMOKE)
    result = runner.run(reduction_mappings, config, tmp_path, smoke=True)
    metrics = {record["variant"]: record["metrics"] for record in result["records"]}
    quadratic, factorisation = metrics["quadratic"], metrics["factorisation"]
    # Outliers 0.05 and 400; the graph leaves the bulk from 1 to 10.
    assert quadratic["kappa_f"] == pytest.approx(8000, rel=1e-6)
    assert quadratic["kappa_F"] == pytest.approx(10, rel=1e-6)
    assert quadratic["beta_F / beta_f"] == pytest.approx(1 / 40, rel=1e-6)
    # Balanced factors of singular values 10 and 1: Hess f has 2 s_1 and s_r at its ends, Hess F s_1 and s_r.
    assert factorisation["kappa_f"] == pytest.approx(20, rel=1e-6)
    assert factorisation["kappa_F"] == pytest.approx(10, rel=1e-6)
    for row in metrics.values():
        assert 1.5 * row["steps GeoPrecGD"] < row["steps gradient descent on f"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"problems": ()}, "problems is empty"),
        ({"dimension": 8}, "dimension must be at least 10, got 8"),
        ({"rank": 13}, "rank must be at most rows and columns, got 13"),
        ({"features": 64}, "features must lie in \\[20, 60\\], got 64"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reduction_mappings.Config(**options)
