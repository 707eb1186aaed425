"""Labelled images: scenes of digits, and the user's own."""

import numpy as np
import pytest

from experiments._machinery.errors import DataError
from experiments.data import images, scenes

OPTIONS = {"count": 8, "tiles": 2, "ink": 0.4, "noise": 0.1}


def test_scenes_are_tiled_digits_with_their_class_on_every_stroke():
    split = images.load("digits").train
    clean, noisy = (scenes.tiled(split, 5, tiles=2, ink=0.4, seed=0, noise=noise) for noise in (0.0, 0.3))
    assert clean.images.shape == (5, 16, 16, 1) and clean.images.dtype == np.float32
    np.testing.assert_array_equal(clean.labels, noisy.labels)
    np.testing.assert_array_equal(clean.labels > 0, clean.images[..., 0] >= 0.4)
    assert abs(float((noisy.images - clean.images).std()) - 0.3) < 0.02
    for tile in clean.labels.reshape(5, 2, 8, 2, 8).transpose(0, 1, 3, 2, 4).reshape(-1, 64):
        assert len(np.unique(tile[tile > 0])) == 1
    # The first tile is a digit of the set, with its label.
    digits = split.images[..., 0] / split.images.max()
    found = np.flatnonzero((np.abs(digits - clean.images[0, :8, :8, 0]) < 1e-6).all((1, 2)))
    assert clean.labels[0, :8, :8].max() - 1 in split.labels[found]


def test_own_images_are_read_and_what_is_wrong_with_them_is_named(tmp_path):
    pixels, labels = np.full((6, 8, 9, 3), 51, np.uint8), np.arange(432).reshape(6, 8, 9) % 5
    arrays = {"x_train": pixels, "y_train": labels, "x_test": pixels[:2], "y_test": labels[:2]}

    def saved(**changes):
        np.savez(tmp_path / "own.npz", **arrays | changes)
        return scenes.load(str(tmp_path / "own.npz"), **OPTIONS)

    found = saved()
    assert found.num_labels == 5 and found.train.images.shape == (6, 8, 9, 3) and found.train.labels.dtype == np.int32
    np.testing.assert_array_equal(found.train.images, np.full((6, 8, 9, 3), 0.2, np.float32))
    assert 0.05 < (found.test.images - 0.2).std() < 0.15
    for changes, message in [
        ({"y_train": labels[:, :4]}, r"labels \[n, height, width\], got \(6, 8, 9, 3\) and \(6, 4, 9\)"),
        ({"x_test": pixels[:2] / 255}, "images must be uint8 and labels integers from 0 on, got float64 and int64"),
        ({"y_test": labels[:2] - 1}, "labels integers from 0 on"),
    ]:
        with pytest.raises(DataError, match=message):
            saved(**changes)
    with pytest.raises(DataError, match=r"there is no file gone\.npz; an \.npz must hold the arrays x_train"):
        scenes.load("gone.npz", **OPTIONS)
