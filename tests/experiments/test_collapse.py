"""Nearest-ETF heads on networks and on free features: features that collapse, and what the experiments refuse."""

import pytest

from experiments.methods import nearest_etf, unconstrained_features


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
