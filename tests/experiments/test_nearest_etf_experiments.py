"""The experiments nearest_etf and unconstrained_features: smoke runs from end to end, and what they refuse."""

import pytest

from experiments import nearest_etf, unconstrained_features
from experiments._machinery import runner


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


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nearest_etf, {"seeds": 0}, "seeds must be positive, got 0"),
        (nearest_etf, {"methods": ()}, "methods is empty"),
        (nearest_etf, {"model": "vgg_d"}, "got 'vgg_d'"),
        (unconstrained_features, {"classes": (10, 1)}, "classes must be at least 2, got 1"),
        (unconstrained_features, {"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
    ],
)
def test_bad_options_are_named(module, options, message):
    with pytest.raises(ValueError, match=message):
        module.Config(**options)
