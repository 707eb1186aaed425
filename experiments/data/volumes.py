"""Labelled volumes: a set of objects made of parts that is generated here, and voxel files in the style of ShapeNet.

    parts             three kinds of objects of seven parts on a grid, drawn from the seed alone
    path/to/file.npz  x_train, x_test: uint8 [n, D, H, W] or [n, D, H, W, channels]; y_train, y_test: uint8 [n, D, H, W]

A label of 255 is ignored in loss and scores: where there is no object.
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments._machinery.errors import DataError
from experiments.data import images

IGNORED = 255
PARTS = ("table top", "table leg", "mug body", "mug handle", "rocket body", "rocket nose", "rocket fin")


class Split(NamedTuple):
    volumes: Any  # uint8 [n, D, H, W, channels]
    labels: Any  # uint8 [n, D, H, W]; 255 is ignored


class Dataset(NamedTuple):
    name: str
    train: Split
    test: Split
    num_classes: int


def load(name: str, *, size: int = 16, train: int = 192, test: int = 64) -> Dataset:
    """Generates "parts", or reads an `.npz`.

    Args:
      name: "parts", or a path.
      size: voxels of a side of the generated volumes, a multiple of 8.
      train: number of generated volumes to train on.
      test: number of generated volumes to test on.

    Raises:
      DataError: for an unknown name, a file that lacks an array, and arrays of other shapes or types.
    """
    if name == "parts":
        if size < 16 or size % 8:
            raise DataError(f"size must be a multiple of 8 from 16 on, got {size}")
        volumes, labels = parts(train + test, size, seed=0)
        cut = lambda rows: Split(volumes[rows], labels[rows])
        return Dataset(name, cut(slice(None, train)), cut(slice(train, None)), len(PARTS))
    if not name.endswith(".npz"):
        raise DataError(f'unknown volumes {name!r}; "parts" are generated, and a path must end in .npz')
    return _npz(pathlib.Path(name))


def parts(count: int, size: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables, mugs and rockets with labelled parts, at random sizes and places, turned by right angles.

    Returns:
      Occupancy uint8 [count, size, size, size, 1], one in twenty voxels of an object missing, and labels uint8 [count,
      size, size, size].
    """
    rng = np.random.default_rng(seed)
    labels = np.full((count, size, size, size), IGNORED, np.uint8)
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij")
    for i in range(count):
        cy, cx, cz = rng.uniform(-0.15, 0.15, 3)
        u, v, w = y - cy, x - cx, z - cz
        drawn = (_table, _mug, _rocket)[i % 3](rng, u, v, w)
        volume = labels[i]
        for label, inside in drawn:  # later parts are drawn over earlier ones
            volume[inside] = label
        labels[i] = np.rot90(volume, rng.integers(4), axes=(1, 2))
    present = (labels != IGNORED) & (rng.random(labels.shape) > 0.05)
    order = rng.permutation(count)
    return present[order][..., None].astype(np.uint8), labels[order]


def _table(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> list[tuple[int, np.ndarray]]:
    a, b, height, thick = *rng.uniform(0.5, 0.8, 2), rng.uniform(0.1, 0.4), rng.uniform(0.15, 0.25)
    within = (np.abs(u) < a) & (np.abs(v) < b)
    corner = (np.abs(u) > a - 0.25) & (np.abs(v) > b - 0.25)
    return [(1, within & corner & (w < height) & (w > -0.8)), (0, within & (np.abs(w - height) < thick))]


def _mug(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> list[tuple[int, np.ndarray]]:
    radius, height = rng.uniform(0.4, 0.55), rng.uniform(0.4, 0.65)
    around = np.hypot(u, v)
    ring = np.hypot(v - radius - 0.1, w)
    handle = (np.abs(u) < 0.15) & (np.abs(ring - 0.25) < 0.12) & (around > radius - 0.05)
    hollow = (around < radius - 0.2) & (w > -height + 0.2)
    return [(3, handle), (2, (around < radius) & (np.abs(w) < height) & ~hollow)]


def _rocket(rng: np.random.Generator, u: np.ndarray, v: np.ndarray, w: np.ndarray) -> list[tuple[int, np.ndarray]]:
    radius, height = rng.uniform(0.25, 0.4), rng.uniform(0.3, 0.5)
    around = np.hypot(u, v)
    fins = (np.minimum(np.abs(u), np.abs(v)) < 0.1) & (around < radius + 0.35) & (w < -0.2) & (w > -0.8)
    nose = (w >= height) & (around < radius * (1 - (w - height) / 0.45))
    return [(6, fins), (4, (around < radius) & (w < height) & (w > -0.8)), (5, nose)]


def _npz(path: pathlib.Path) -> Dataset:
    x_train, y_train, x_test, y_test = images.read_npz(path)
    splits = [_checked(path, x_train, y_train), _checked(path, x_test, y_test)]
    if splits[0].volumes.shape[1:] != splits[1].volumes.shape[1:]:
        raise DataError(f"{path}: training and test volumes have different shapes")
    if not any((split.labels != IGNORED).any() for split in splits):
        raise DataError(f"{path} has no labels but {IGNORED}, which is ignored")
    classes = max(int(split.labels[split.labels != IGNORED].max(initial=0)) for split in splits) + 1
    return Dataset(str(path), *splits, classes)


def _checked(path: pathlib.Path, volumes: np.ndarray, labels: np.ndarray) -> Split:
    if volumes.ndim == 4:
        volumes = volumes[..., None]
    if volumes.ndim != 5 or labels.shape != volumes.shape[:4] or not len(labels):
        raise DataError(
            f"{path}: volumes must be [n, D, H, W(, channels)] and labels [n, D, H, W], "
            f"got {volumes.shape} and {labels.shape}"
        )
    if volumes.dtype != np.uint8 or labels.dtype != np.uint8:
        raise DataError(f"{path}: volumes and labels must be uint8, got {volumes.dtype} and {labels.dtype}")
    if any(n % 8 for n in labels.shape[1:]):
        raise DataError(f"{path}: the sides of a volume must be multiples of 8, got {labels.shape[1:]}; pad them")
    return Split(volumes, labels)
