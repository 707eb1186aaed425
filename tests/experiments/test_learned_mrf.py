"""The experiment learned_mrf: its scenes, its networks and a smoke run from end to end."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import learned_mrf
from experiments._machinery import runner
from experiments.data import images as data


def test_scenes_are_tiled_digits_with_their_class_on_every_stroke():
    config = learned_mrf.Config(tiles=2, noise=0.3)
    split = data.load("digits").train
    clean = learned_mrf.make_scenes(split, 5, config, 0, noisy=False)
    noisy = learned_mrf.make_scenes(split, 5, config, 0, noisy=True)
    assert clean.images.shape == (5, 16, 16, 1) and clean.images.dtype == np.float32
    np.testing.assert_array_equal(clean.labels, noisy.labels)
    np.testing.assert_array_equal(clean.labels > 0, clean.images[..., 0] >= config.ink)
    assert abs(float((noisy.images - clean.images).std()) - 0.3) < 0.02
    for tile in clean.labels.reshape(5, 2, 8, 2, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 64):
        assert len(np.unique(tile[tile > 0])) == 1
    # The first tile is a digit of the set, with its label.
    digits = split.images[..., 0] / split.images.max()
    found = np.flatnonzero((np.abs(digits - clean.images[0, :8, :8, 0]) < 1e-6).all((1, 2)))
    assert clean.labels[0, :8, :8].max() - 1 in split.labels[found]


def test_all_methods_start_from_the_same_network():
    config = learned_mrf.Config(width=4)
    build = lambda method: learned_mrf._Segmenter(config, method, 11, nnx.Rngs(params=jax.random.key(0)))
    alone, layered = build("none"), build("trwp")
    for a, b in zip(alone.convs, layered.convs, strict=True):
        np.testing.assert_array_equal(a.kernel[...], b.kernel[...])
    np.testing.assert_array_equal(alone.logits.kernel[...], layered.logits.kernel[...])


def test_learned_mrf_smoke_run_leaves_results_and_figures(tmp_path):
    # 31 is prime and keeps to one of the eight fake devices: eight threads on two cores wait for one another.
    config = learned_mrf.Config(**learned_mrf.SMOKE | {"batch_size": 31, "methods": ("trwp",)})
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to its int32 counter
        metrics = runner.run(learned_mrf, config, tmp_path, smoke=True)["metrics"]
    for method in config.methods:
        assert metrics[f"test_pixel_error {method}"] < 60
        assert np.isfinite(metrics[f"test_loss {method}"])
    assert (tmp_path / "learned_mrf.png").stat().st_size > 10_000
    assert (tmp_path / "segmentations.png").stat().st_size > 10_000


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "steps must be positive"), ({"methods": ()}, "empty")])
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        learned_mrf.Config(**options)
