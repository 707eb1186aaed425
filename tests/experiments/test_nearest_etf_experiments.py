"""The experiments nearest_etf, unconstrained_features and bsn: smoke runs from end to end, and what they refuse."""

import json
import math

import pytest

from experiments import bsn, nearest_etf, unconstrained_features
from experiments._machinery import runner
from experiments._machinery.errors import ExperimentError


def test_nearest_etf_smoke_run_leaves_results_and_the_figure(tmp_path):
    # 127 is prime and keeps to one of the eight fake devices: eight threads on two cores wait for one another.
    config = nearest_etf.Config(**nearest_etf.SMOKE | {"batch_size": 127})
    result = runner.run(nearest_etf, config, tmp_path, smoke=True)
    metrics = result["metrics"]
    assert metrics["test_error implicit"] < 25
    assert 0 < metrics["nc1 implicit"] < 1
    assert metrics["nc2 implicit"] < 1e-5  # an ETF by construction
    assert (tmp_path / "neural_collapse.png").stat().st_size > 20_000


def test_unconstrained_features_smoke_run_collapses(tmp_path):
    config = unconstrained_features.Config(**unconstrained_features.SMOKE)
    metrics = runner.run(unconstrained_features, config, tmp_path, smoke=True)["metrics"]
    for method in config.methods:
        assert metrics[f"train_error {method} K=10"] == 0
        assert metrics[f"nc1 {method} K=10"] < 0.2
    assert (tmp_path / "collapse_K10.png").stat().st_size > 20_000


def test_bsn_smoke_run_keeps_norms_and_orthogonality(tmp_path):
    config = bsn.Config(**bsn.SMOKE | {"batch_size": 127})
    metrics = runner.run(bsn, config, tmp_path, smoke=True)["metrics"]
    assert abs(metrics["log10 forward ratio tanh gpn L=8"]) < 0.2 < abs(metrics["log10 forward ratio tanh raw L=8"])
    assert metrics["orthogonality_error tanh gpn L=8"] < 1e-3
    assert metrics["train_error tanh gpn L=8"] < 60 and math.isfinite(metrics["test_error tanh raw L=8"])
    for figure in ("signal_norms", "training"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000


def test_bsn_keeps_the_learning_rate_with_the_smallest_validation_error(tmp_path):
    options = {"batch_size": 127, "normalisations": ("gpn",), "depths": (3,), "learning_rates": (1e-3, 0.3, 1e4)}
    metrics = runner.run(bsn, bsn.Config(**bsn.SMOKE | options), tmp_path, smoke=True)["metrics"]
    assert metrics["learning_rate tanh gpn L=3"] == pytest.approx(0.3)
    assert metrics["validation_error tanh gpn L=3"] < 60
    diverged = json.loads((tmp_path / "cases" / "tanh-gpn-L=3-seed0-rate10000" / "metrics.json").read_text())
    assert "nan" in diverged["diverged"]
    with pytest.raises(ExperimentError, match=r"tanh gpn L=3 diverged with every learning rate of \(10000.0,\)"):
        bsn.train(bsn.Config(**bsn.SMOKE | options | {"learning_rates": (1e4,)}), tmp_path / "one")


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nearest_etf, {"seeds": 0}, "seeds must be positive, got 0"),
        (nearest_etf, {"methods": ()}, "methods is empty"),
        (nearest_etf, {"model": "vgg_d"}, "got 'vgg_d'"),
        (unconstrained_features, {"classes": (10, 1)}, "classes must be at least 2, got 1"),
        (unconstrained_features, {"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        (bsn, {"depths": (10, 0)}, "depths must be at least 1, got 0"),
        (bsn, {"activations": ()}, "activations is empty"),
        (bsn, {"learning_rates": (1.0, 0.0)}, "learning_rates must be positive, got 0.0"),
    ],
)
def test_bad_options_are_named(module, options, message):
    with pytest.raises(ValueError, match=message):
        module.Config(**options)
