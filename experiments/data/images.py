"""Data sets as numpy arrays in memory: embedded digits, prepared TFDS sets, a plain `.npz`, or a folder of images.

digits            scikit-learn's bundled 8x8 digits; nothing to download
mnist, cifar10    and any other image-classification set of TFDS, prepared as array_record under `data_dir`
tiny_shakespeare  text: each split is one uint8 array of its bytes
path/to/file.npz  with the keys x_train, y_train, x_test, y_test (images uint8, [n, height, width(, channels)])
path/to/folder    of images, one folder a class, or the same in folders train and test; see `image_folder`
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments._machinery.errors import DataError
from experiments.data import image_folder, prepared

NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


class Split(NamedTuple):
    images: Any  # uint8 [n, height, width, channels]
    labels: Any  # int32 [n]


class Dataset(NamedTuple):
    name: str
    train: Any  # Split, or for text uint8 [bytes]
    validation: Any  # the same, or None
    test: Any  # the same
    num_classes: int


def load(
    name: str,
    data_dir: str | os.PathLike | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    *,
    download: bool = False,
) -> Dataset:
    """Loads a data set by name or path.

    Args:
      name: one of the names above, another TFDS name (`name`, `name/config` or `name:version`), or a path to an `.npz`
        or to a folder of images.
      data_dir: folder of prepared TFDS sets; None means TFDS's own default.
      validation_fraction: share of the training set, in [0, 1), to set aside for validation.
      seed: draws which training examples are set aside.
      download: let TFDS download and prepare a set that is missing. Off, the network is never touched.

    Returns:
      A `Dataset` of numpy arrays.

    Raises:
      DataError: the set is unknown, not prepared, or not an image-classification set.
    """
    if not 0 <= validation_fraction < 1:
        raise DataError(f"validation_fraction must lie in [0, 1), got {validation_fraction}")
    if name == "digits":
        train, test = _digits()
    elif name.endswith(".npz"):
        train, test = _npz(pathlib.Path(name))
    elif name not in prepared.KNOWN and pathlib.Path(name).expanduser().is_dir():
        train, test = (Split(*part) for part in image_folder.load(pathlib.Path(name).expanduser()))
    else:
        splits = prepared.load(name, data_dir, download)
        if "text" in splits:
            return _text(name, splits)
        train, test = (Split(splits[f"{part}_images"], splits[f"{part}_labels"]) for part in ("train", "test"))
    for part, split in (("training", train), ("test", test)):
        if not len(split.labels):
            raise DataError(f"data set {name!r} has an empty {part} split")
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    validation = None
    if validation_fraction:
        train, validation = _set_aside(train, validation_fraction, seed)
    return Dataset(name, train, validation, test, num_classes)


def global_statistics(images: np.ndarray) -> tuple[np.float32, np.float32]:
    """One mean and one standard deviation over all pixels of the training images, in units of the stored pixels."""
    mean, std = channel_statistics(images.reshape(-1, 1))
    return mean[0], std[0]


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel (last axis), float32 [channels]; exact integer sums for uint8 images."""
    flat = images.reshape(-1, images.shape[-1])
    wide = np.uint64 if images.dtype == np.uint8 else np.float64
    mean = flat.sum(0, dtype=wide) / len(flat)
    square = np.einsum("nc,nc->c", flat, flat, dtype=wide, casting="unsafe") / len(flat)
    return mean.astype(np.float32), np.sqrt(np.maximum(square - mean**2, 1e-12)).astype(np.float32)


def standardise(images: Any, mean: Any, std: Any) -> Any:
    """(images - mean) / std in float32; numpy in numpy out, and inside jit for jax arrays."""
    shape = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (np.asarray(value, np.float32).reshape(shape) for value in (mean, std))
    return (images.astype(np.float32) - mean) / std


def windows(text: np.ndarray, length: int) -> np.ndarray:
    """Cuts bytes [n] into rows uint8 [(n-1) // length, length + 1]; each row's last byte is the next row's first."""
    rows = (len(text) - 1) // length
    if rows < 1:
        raise DataError(f"the text has {len(text)} bytes, too few for a window of {length} and its target")
    return np.lib.stride_tricks.sliding_window_view(text, length + 1)[: rows * length : length].copy()


def _set_aside(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    order = np.random.default_rng(seed).permutation(len(train.labels))
    count = round(fraction * len(order))
    if not 0 < count < len(order):
        raise DataError(f"validation_fraction {fraction} of {len(order)} training examples leaves a split empty")
    kept, aside = np.sort(order[count:]), np.sort(order[:count])
    return Split(train.images[kept], train.labels[kept]), Split(train.images[aside], train.labels[aside])


def _digits() -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn; install it with: pip install scikit-learn") from error
    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8)[..., None], bunch.target.astype(np.int32)
    # The file is ordered by writer; a fixed shuffle makes training and test set alike. 1,437 train, 360 test.
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def read_npz(path: pathlib.Path, keys: Sequence[str] = NPZ_KEYS) -> list[np.ndarray]:
    """The named arrays of a file.

    Raises:
      DataError: the file is missing, cannot be read or lacks an array.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}; an .npz must hold the arrays {', '.join(keys)}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in keys if key in arrays}
    except Exception as error:  # a truncated zip and an unreadable array raise many types
        raise DataError(f"{path} cannot be read as .npz ({error})") from error
    if missing := [key for key in keys if key not in found]:
        raise DataError(f"{path} lacks {', '.join(missing)}; it must hold {', '.join(keys)}")
    return [found[key] for key in keys]


def _npz(path: pathlib.Path) -> tuple[Split, Split]:
    x_train, y_train, x_test, y_test = read_npz(path)
    return _as_split(path, x_train, y_train), _as_split(path, x_test, y_test)


def _as_split(path: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> Split:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: images must be [n, height, width(, channels)] and labels [n], "
            f"got {images.shape} and {labels.shape}"
        )
    if images.dtype != np.uint8 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{path}: images must be uint8 and labels integers, got {images.dtype} and {labels.dtype}; "
            "convert them before saving"
        )
    return Split(images, labels.astype(np.int32))


def _text(name: str, splits: dict[str, np.ndarray]) -> Dataset:
    parts = {part: splits.get(part) for part in ("train", "validation", "test")}
    return Dataset(name, parts["train"], parts["validation"], parts["test"], 256)
