"""Sets that TensorFlow Datasets has prepared as array_record, read without TensorFlow and without the network.

Decoded arrays are kept as `.npz` under `$XDG_CACHE_HOME/jaxlib_methods/data`: decoding MNIST's 70,000 PNGs takes
twelve seconds, reading the arrays back a tenth of one.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np

from experiments._machinery.errors import DataError
from experiments._machinery.files import cache_folder

KNOWN = ("digits", "mnist", "cifar10", "tiny_shakespeare")  # names that an error suggests


def load(name: str, data_dir: str | os.PathLike | None, download: bool) -> dict[str, np.ndarray]:
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


def _prepared(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The newest prepared version's folder, found by looking, so that TFDS never asks the network."""
    base, _, version = name.partition(":")
    found = [path.parent for path in (root / base).glob("**/dataset_info.json")]
    if version:
        found = [path for path in found if path.name == version]
    number = lambda path: [int(digits) if digits.isdigit() else -1 for digits in path.name.split(".")]
    return max(found, key=number, default=None)


def _missing(root: pathlib.Path, name: str, download: bool) -> pathlib.Path:
    known = (
        f"known are {', '.join(KNOWN)}, every other image-classification set of TFDS, and a path to an .npz or a folder"
    )
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
