"""The experiment bsn: what it tunes, norms that stay, and what it refuses."""

import pytest

from experiments.methods import bsn


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
