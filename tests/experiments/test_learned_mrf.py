"""The experiment learned_mrf: its networks and a smoke run from end to end."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.methods import learned_mrf


def test_all_methods_start_from_the_same_network():
    config = learned_mrf.Config(width=4)
    build = lambda method: learned_mrf.Segmenter(config, method, 1, 11, nnx.Rngs(params=jax.random.key(0)))
    alone, layered = build("none"), build("trwp")
    for a, b in zip(alone.convs, layered.convs, strict=True):
        np.testing.assert_array_equal(a.kernel[...], b.kernel[...])
    np.testing.assert_array_equal(alone.logits.kernel[...], layered.logits.kernel[...])


@pytest.mark.parametrize(
    ("options", "message"), [({"steps": 0}, "steps must be at least 1"), ({"methods": ()}, "methods is empty")]
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        learned_mrf.Config(**options)
