"""The experiment reduction_mappings: a smoke run against closed forms, and what it refuses."""

import pytest

from experiments import reduction_mappings
from experiments._machinery import runner


def test_smoke_run_meets_the_closed_forms(tmp_path):
    config = reduction_mappings.Config(**reduction_mappings.SMOKE)
    metrics = runner.run(reduction_mappings, config, tmp_path, smoke=True)["metrics"]
    # Outliers 0.05 and 400; the graph leaves the bulk from 1 to 10.
    assert metrics["kappa_f quadratic"] == pytest.approx(8000, rel=1e-6)
    assert metrics["kappa_F quadratic"] == pytest.approx(10, rel=1e-6)
    assert metrics["beta_F / beta_f quadratic"] == pytest.approx(1 / 40, rel=1e-6)
    # Balanced factors of singular values 10 and 1: Hess f has 2 s_1 and s_r at its ends, Hess F s_1 and s_r.
    assert metrics["kappa_f factorisation"] == pytest.approx(20, rel=1e-6)
    assert metrics["kappa_F factorisation"] == pytest.approx(10, rel=1e-6)
    for name in config.problems:
        slow, fast = (metrics[f"steps {method}, {name}"] for method in ("gradient descent on f", "GeoPrecGD"))
        assert 1.5 * fast < slow
    assert (tmp_path / "reduction_mappings.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be positive, got 0"),
        ({"problems": ()}, "problems is empty"),
        ({"dimension": 8}, "dimension must be at least 10, got 8"),
        ({"rank": 13}, "rank must be at most rows and columns, got 13"),
        ({"features": 64}, "features must lie between 20 and 60, got 64"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reduction_mappings.Config(**options)
