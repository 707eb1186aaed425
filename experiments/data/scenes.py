"""Labelled images: squares of digits whose strokes are labelled, or the user's own images and labels.

digits, mnist     or another set of single grey digits, of which scenes are made
path/to/file.npz  x_train, x_test: uint8 [n, H, W(, channels)]; y_train, y_test: uint8 [n, H, W], 0 is background
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments._machinery.errors import DataError
from experiments.data import images


class Scenes(NamedTuple):
    """Images of which every pixel has a label."""

    images: Any  # float32 [n, height, width, channels]; ink is 1
    labels: Any  # int32 [n, height, width]; 0 is the background


class Dataset(NamedTuple):
    """Scenes to train on and to test on."""

    name: str
    train: Scenes  # without noise, which is drawn anew in every step
    test: Scenes  # with noise, drawn once
    num_labels: int


def load(
    name: str, data_dir: str | None = None, *, count: int, tiles: int, ink: float, noise: float, least: int = 1
) -> Dataset:
    """Makes scenes of digits, or reads an `.npz`.

    Args:
      name: a set of single grey digits, or a path.
      data_dir: folder of prepared TFDS sets.
      count: scenes to train on; a quarter as many to test on, made of test digits only.
      tiles: digits along each side of a scene.
      ink: a pixel at least this dark belongs to the stroke.
      noise: standard deviation in the test scenes, where ink is 1.
      least: number of test scenes at least.

    Raises:
      DataError: for an unknown name, a file that lacks an array, and arrays of other shapes or types.
    """
    if name.endswith(".npz"):
        train, test = _own(pathlib.Path(name))
        num_labels = 1 + int(max(train.labels.max(), test.labels.max()))
        return Dataset(
            name, train, test._replace(images=_noisy(test.images, noise, np.random.default_rng(1))), num_labels
        )
    digits = images.load(name, data_dir)
    train = tiled(digits.train, count, tiles=tiles, ink=ink, seed=0)
    test = tiled(digits.test, max(count // 4, least), tiles=tiles, ink=ink, seed=1, noise=noise)
    return Dataset(name, train, test, digits.num_classes + 1)


def tiled(split: images.Split, count: int, *, tiles: int, ink: float, seed: int, noise: float = 0.0) -> Scenes:
    """Squares of random digits: labels k + 1 on the strokes of digit k, as the image without noise shows them."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(split.labels), size=(count, tiles, tiles))
    clean = split.images[..., :1].astype(np.float32)[chosen] / float(split.images.max())  # [n, t, t, h, w, 1]
    classes = np.broadcast_to(split.labels[chosen][..., None, None, None], clean.shape)
    labels = np.where(clean >= ink, classes + 1, 0)
    height, width = tiles * clean.shape[3], tiles * clean.shape[4]
    together = lambda x: x.transpose(0, 1, 3, 2, 4, 5).reshape(count, height, width, 1)
    return Scenes(_noisy(together(clean), noise, rng), together(labels)[..., 0].astype(np.int32))


def _noisy(clean: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    return clean + rng.normal(0, noise, clean.shape).astype(np.float32) if noise else clean


def _own(path: pathlib.Path) -> tuple[Scenes, Scenes]:
    x_train, y_train, x_test, y_test = images.read_npz(path)
    return _checked(path, x_train, y_train), _checked(path, x_test, y_test)


def _checked(path: pathlib.Path, pixels: np.ndarray, labels: np.ndarray) -> Scenes:
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.ndim != 4 or labels.shape != pixels.shape[:3] or not len(labels):
        raise DataError(
            f"{path}: images must be [n, height, width(, channels)] and labels [n, height, width], "
            f"got {pixels.shape} and {labels.shape}"
        )
    if pixels.dtype != np.uint8 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"{path}: images must be uint8 and labels integers from 0 on, got {pixels.dtype} and {labels.dtype}"
        )
    return Scenes(pixels.astype(np.float32) / np.float32(255), labels.astype(np.int32))
