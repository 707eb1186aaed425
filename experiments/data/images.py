"""Data sets as numpy arrays in memory: embedded digits, prepared TFDS sets (no TensorFlow needed), or a plain `.npz`.

    digits            scikit-learn's bundled 8x8 digits; nothing to download
    mnist, cifar10    and any other image-classification set of TFDS, prepared as array_record under `data_dir`
    tiny_shakespeare  text: each split is one uint8 array of its bytes
    path/to/file.npz  with the keys x_train, y_train, x_test, y_test (images uint8, [n, height, width(, channels)])

Decoded TFDS sets are kept as `.npz` under `$XDG_CACHE_HOME/jaxlib_methods/data`: decoding MNIST's 70,000 PNGs takes
twelve seconds, reading the arrays back a tenth of one.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments._machinery.errors import DataError

KNOWN = ("digits", "mnist", "cifar10", "tiny_shakespeare")
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
      name: one of the names above, another TFDS name (`name`, `name/config` or `name:version`), or a path to an `.npz`.
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
    else:
        splits = _tfds(name, data_dir, download)
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


def _tfds(name: str, data_dir: str | os.PathLike | None, download: bool) -> dict[str, np.ndarray]:
    """All splits of a prepared set, from the cache of decoded arrays where it is there."""
    root = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or pathlib.Path.home() / "tensorflow_datasets")
    folder = _prepared(root.expanduser(), name)
    if folder is None:
        folder = _missing(root, name, download)
    info = (folder / "dataset_info.json").read_bytes()
    digest = hashlib.sha256(str(folder.resolve()).encode() + info).hexdigest()[:16]
    cached = cache_folder() / "data" / f"{name.replace('/', '-').replace(':', '-')}-{digest}.npz"
    with contextlib.suppress(Exception), np.load(cached, allow_pickle=False) as arrays:
        return dict(arrays)  # without a cache, or with a damaged one, decode
    splits = _decode(folder, name)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, suffix=".part", delete=False) as part:
            try:
                np.savez(part, **splits)
                part.flush()
                os.replace(part.name, cached)
            except BaseException:
                os.unlink(part.name)
                raise
    return splits


def cache_folder() -> pathlib.Path:
    """Where decoded data and compiled programs are kept between runs."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "jaxlib_methods"


def _prepared(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The newest prepared version's folder, found by looking, so that TFDS never asks the network."""
    base, _, version = name.partition(":")
    found = [path.parent for path in (root / base).glob("**/dataset_info.json")]
    if version:
        found = [path for path in found if path.name == version]
    number = lambda path: [int(digits) if digits.isdigit() else -1 for digits in path.name.split(".")]
    return max(found, key=number, default=None)


def _missing(root: pathlib.Path, name: str, download: bool) -> pathlib.Path:
    known = f"known are {', '.join(KNOWN)}, every other image-classification set of TFDS, and a path to an .npz"
    try:
        tfds = _import_tfds()
    except ImportError as error:
        if name not in KNOWN:
            raise DataError(f"unknown data set {name!r}; {known}") from error
        raise DataError(
            f"data set {name!r} is read with tensorflow-datasets; "
            "install it with: pip install 'jaxlib_methods[experiments]', or give a path to an .npz"
        ) from error
    if name.partition(":")[0].split("/")[0] not in tfds.list_builders(with_community_datasets=False):
        raise DataError(f"unknown data set {name!r}; {known}")
    if not download:
        raise DataError(
            f"data set {name!r} is not prepared under {root}; point --data-dir to the folder that holds it, "
            "or run once with --download on a machine with network access"
        )
    try:
        tfds.data_source(name, data_dir=str(root), download=True)
    except Exception as error:  # whatever the network and the preparation raise
        raise DataError(
            f"data set {name!r} could not be prepared under {root} ({type(error).__name__}: {error})"
        ) from error
    return _prepared(root, name)


def _import_tfds() -> Any:
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns that OpenCV is absent
    import tensorflow_datasets

    return tensorflow_datasets


def _decode(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    try:
        builder = _import_tfds().builder_from_directory(folder)
        sources = {part: builder.as_data_source(split=part) for part in builder.info.splits}
    except ImportError as error:
        raise DataError(f"reading {folder} needs: pip install 'jaxlib_methods[experiments]' ({error})") from error
    except NotImplementedError as error:
        raise DataError(
            f"{folder} is not stored as array_record; prepare it again with "
            f"tensorflow_datasets.data_source({name!r}), which writes that format"
        ) from error
    features = set(builder.info.features)
    if features == {"text"}:
        text = {part: b"".join(row["text"] for row in source) for part, source in sources.items()}
        return {"text": np.zeros(0, np.uint8)} | {part: np.frombuffer(rows, np.uint8) for part, rows in text.items()}
    shape = builder.info.features["image"].shape if "image" in features else (None,)
    if not {"image", "label"} <= features or None in shape or not {"train", "test"} <= set(sources):
        raise DataError(
            f"data set {name!r} has the features {sorted(features)} and the splits {sorted(sources)}; "
            "needed are images of one size, labels, and the splits train and test"
        )
    print(f"decoding {name} once; later runs read the arrays from {cache_folder()}", file=sys.stderr)
    arrays = {}
    for part in ("train", "test"):
        rows = len(sources[part])
        images, labels = np.empty((rows, *shape), np.uint8), np.empty(rows, np.int32)
        for i, row in enumerate(sources[part]):
            images[i], labels[i] = row["image"], row["label"]
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    return arrays
