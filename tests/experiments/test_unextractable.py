"""The experiment on unextractable models: a smoke run, and what it refuses."""

import pytest

from experiments.methods import unextractable


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "gpt_tiny"}, "transforms need norm='rms', got 'layer'"),
        ({"layers": 1}, "layers must be at least 2, got 1; stitching needs two blocks"),
        ({"transforms": 0}, "transforms must be at least 1, got 0"),
        ({"evaluate_every": 7}, "evaluate_every must divide steps, got 7 and 600"),
        ({"margin": 0.0}, "margin must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        unextractable.Config(**options)
