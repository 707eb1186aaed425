"""The experiment bsn: what it tunes, norms that stay, and what it refuses."""

import pytest

from experiments._machinery import runner
from experiments.methods import bsn


def test_the_learning_rate_with_the_smallest_validation_error_is_kept(tmp_path):
    # 127 is prime and keeps to one of the eight fake devices: eight threads on two cores wait for one another.
    options = {"batch_size": 127, "normalisations": ("gpn",), "depths": (3,), "learning_rates": (1e-3, 0.3, 1e4)}
    result = runner.run(bsn, bsn.Config(**bsn.SMOKE | options), tmp_path, smoke=True)
    ((row, metrics),) = [(record["variant"], record["metrics"]) for record in result["records"]]
    assert row == "tanh gpn L=3"
    assert metrics["learning_rate"] == pytest.approx(0.3)
    assert metrics["validation_error"] < 60 and metrics["orthogonality_error"] < 1e-3
    assert abs(metrics["log10 forward ratio"]) < 0.2
    assert '"diverged"' in (tmp_path / "cases" / "tanh-gpn-L=3-seed0-10000" / "metrics.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (10, 0)}, "depths must be at least 1, got 0"),
        ({"activations": ()}, "activations is empty"),
        ({"learning_rates": (1.0, 0.0)}, "learning_rates must be positive, got 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bsn.Config(**options)
