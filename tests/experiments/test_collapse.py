"""Nearest-ETF heads on networks and on free features: features that collapse, and what the experiments refuse."""

import pytest

from experiments._machinery import runner
from experiments.methods import nearest_etf, unconstrained_features


def test_free_features_collapse_under_a_learned_and_a_fixed_head(tmp_path):
    config = unconstrained_features.Config(**unconstrained_features.SMOKE | {"methods": ("standard", "fixed")})
    result = runner.run(unconstrained_features, config, tmp_path, smoke=True)
    metrics = {record["variant"]: record["metrics"] for record in result["records"]}
    assert list(metrics) == ["standard K=10", "fixed K=10"]
    for row in metrics.values():
        assert row["train_error"] == 0
        assert row["nc1"] < 0.2
    assert metrics["fixed K=10"]["nc2"] < 1e-12  # an ETF by construction


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nearest_etf, {"seeds": 0}, "seeds must be at least 1, got 0"),
        (nearest_etf, {"methods": ()}, "methods is empty"),
        (nearest_etf, {"model": "vgg_d"}, "got 'vgg_d'"),
        (unconstrained_features, {"classes": (10, 1)}, "classes must be at least 2, got 1"),
        (unconstrained_features, {"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
    ],
)
def test_bad_options_are_named(module, options, message):
    with pytest.raises(ValueError, match=message):
        module.Config(**options)
