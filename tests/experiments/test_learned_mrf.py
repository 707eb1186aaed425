"""The experiment learned_mrf: its networks and a smoke run from end to end."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments._machinery import runner
from experiments.methods import learned_mrf


def test_all_methods_start_from_the_same_network():
    config = learned_mrf.Config(width=4)
    build = lambda method: learned_mrf.Segmenter(config, method, 1, 11, nnx.Rngs(params=jax.random.key(0)))
    alone, layered = build("none"), build("trwp")
    for a, b in zip(alone.convs, layered.convs, strict=True):
        np.testing.assert_array_equal(a.kernel[...], b.kernel[...])
    np.testing.assert_array_equal(alone.logits.kernel[...], layered.logits.kernel[...])


def test_smoke_run_leaves_results_and_figures(tmp_path):
    # 31 is prime and keeps to one of the eight fake devices: eight threads on two cores wait for one another.
    config = learned_mrf.Config(**learned_mrf.SMOKE | {"batch_size": 31, "methods": ("trwp",)})
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to its int32 counter
        (record,) = runner.run(learned_mrf, config, tmp_path, smoke=True)["records"]
    assert record["variant"] == "trwp" and record["metrics"]["test_pixel_error"] < 60
    assert np.isfinite(record["metrics"]["test_loss"])
    assert (tmp_path / "learned_mrf.png").stat().st_size > 10_000
    assert (tmp_path / "segmentations.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"), [({"steps": 0}, "steps must be at least 1"), ({"methods": ()}, "methods is empty")]
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        learned_mrf.Config(**options)
