"""Text as arrays of token ids: a training part and a validation part that share no token.

    python_docs        the help topics that every CPython bundles (pydoc_data): nothing to download
    tiny_shakespeare   and any other TFDS set of texts prepared as array_record under `data_dir`; WikiText, which TFDS
                       prepares from Hugging Face, is huggingface:salesforce__wikitext/wikitext-103-raw-v1
    path/to/file.txt   UTF-8 text; so is any other file that is there
    path/to/file.npy   token ids of any tokenizer, one axis of integers

python_docs is the default because nothing larger comes with Python or what the experiments install: 0.4 MB of English
and code under the PSF licence, where scikit-learn's descriptions have a tenth of it. Topics repeat one another, so each
paragraph is kept once; else the validation part would hold text that was trained on. Its wording changes with Python's
minor version, which a run's `result.json` names.
"""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments._machinery.errors import DataError
from experiments.data import images as data

TOKENIZERS = ("byte", "character")
NAMES = "texts are python_docs, a TFDS set of texts such as tiny_shakespeare, and a path to a .txt or .npy"


class Text(NamedTuple):
    name: str
    train: np.ndarray  # unsigned [tokens]
    validation: np.ndarray  # unsigned [tokens]
    vocab_size: int
    decode: Callable[[np.ndarray], str]  # token ids to text


def load(
    name: str,
    *,
    validation: str | None = None,
    tokenizer: str = "byte",
    validation_fraction: float = 0.1,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
) -> Text:
    """Loads a text by name or path.

    Args:
      name: one of the names above, or a path.
      validation: another name or path, wholly for validation; None takes the set's own validation (else test) split,
        and where it has none, the end of the text.
      tokenizer: "byte" (256 tokens of UTF-8) or "character" (the alphabet of both parts); a .npy is tokenized already.
      validation_fraction: share of the text, in (0, 1), that is cut off its end where there is no other validation.
      data_dir: folder of prepared TFDS sets; None means TFDS's own default.
      download: let TFDS download and prepare a set that is missing.

    Raises:
      DataError: the text is unknown, unreadable or empty, or training and validation are the same.
    """
    if tokenizer not in TOKENIZERS:
        raise DataError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction must lie in (0, 1), got {validation_fraction}")
    if validation == name:
        raise DataError(f"{name!r} is the training text; name another for validation, or none to set its end aside")
    train, held_out = _parts(name, data_dir, download)
    if validation is not None:
        other, _ = _parts(validation, data_dir, download)
        if isinstance(other, str) != isinstance(train, str):
            raise DataError(f"{name!r} and {validation!r} must both be texts or both be token ids")
        held_out = other
    if isinstance(train, str):
        train, held_out, vocab_size, decode = _tokenize(train, held_out, tokenizer)
    else:
        vocab_size = 1 + max(int(part.max(initial=0)) for part in (train, held_out) if part is not None)
        decode = lambda ids: " ".join(map(str, ids))
    if held_out is None:
        kept = len(train) - round(validation_fraction * len(train))
        train, held_out = train[:kept], train[kept:]
    for part, ids in (("training", train), ("validation", held_out)):
        if not len(ids):
            raise DataError(f"the {part} part of {name!r} is empty; give a longer text")
    return Text(name, train, held_out, vocab_size, decode)


def training_rows(tokens: np.ndarray, block: int) -> np.ndarray:
    """Overlapping rows [n, 2 block] for `fit`, of which `random_window` cuts windows; a start belongs to one row."""
    width = min(2 * block, _long_enough(tokens, block))
    return np.lib.stride_tricks.sliding_window_view(tokens, width)[::block].copy()


def validation_rows(tokens: np.ndarray, block: int, count: int | None = None) -> np.ndarray:
    """At most `count` windows [n, block + 1], spread evenly over the text; their targets do not overlap."""
    _long_enough(tokens, block)
    rows = data.windows(tokens, block)
    return rows if count is None else rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def random_window(rows: jax.Array, key: jax.Array, *, block: int) -> jax.Array:
    """A window [batch, block + 1] at a random place of each training row: `augment` of `fit`, a function of its key."""
    starts = jax.random.randint(key, rows.shape[:1], 0, rows.shape[1] - block)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (block + 1,)))(rows, starts)


def _long_enough(tokens: np.ndarray, block: int) -> int:
    if len(tokens) <= block:
        raise DataError(
            f"the text has {len(tokens)} tokens, too few for a block of {block} and its target; "
            "give a longer text or a smaller block"
        )
    return len(tokens)


def _tokenize(train: str, held_out: str | None, tokenizer: str) -> tuple[Any, Any, int, Callable]:
    if tokenizer == "byte":
        encode = lambda text: np.frombuffer(text.encode(), np.uint8)
        return (
            encode(train),
            None if held_out is None else encode(held_out),
            256,
            lambda ids: bytes(bytearray(np.asarray(ids))).decode(errors="replace"),
        )
    codes = lambda text: np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet = np.unique(codes(train + (held_out or "")))
    smallest = np.min_scalar_type(len(alphabet))
    encode = lambda text: np.searchsorted(alphabet, codes(text)).astype(smallest)
    decode = lambda ids: alphabet[np.asarray(ids)].tobytes().decode("utf-32-le")
    return encode(train), None if held_out is None else encode(held_out), len(alphabet), decode


def _parts(name: str, data_dir: str | os.PathLike | None, download: bool) -> tuple[Any, Any]:
    """The text and, where the set has one, its validation part: strings, or arrays of ids."""
    if name == "python_docs":
        return _python_docs(), None
    if name.endswith(".npy"):
        return _ids(pathlib.Path(name)), None
    if name.endswith(".txt") or pathlib.Path(name).is_file():
        try:
            return pathlib.Path(name).read_text(encoding="utf-8"), None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name} cannot be read as UTF-8 text ({error})") from error
    try:
        dataset = data.load(_folder_name(name), data_dir, download=download)
    except DataError as error:
        raise DataError(f"{error}; {NAMES}") from error
    if not isinstance(dataset.train, np.ndarray):
        raise DataError(f"data set {name!r} has no texts; {NAMES}")
    held_out = dataset.validation if dataset.validation is not None else dataset.test
    text = lambda array: None if array is None else array.tobytes().decode(errors="replace")
    return text(dataset.train), text(held_out)


def _folder_name(name: str) -> str:
    """The name under which TFDS prepares a set: one from Hugging Face loses the characters that TFDS does not allow."""
    base = name.removeprefix("huggingface:")
    return name if base == name else re.sub(r"[^\w/]", "_", base.lower())


def _python_docs() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"this Python comes without pydoc_data ({error}); name a text with --text, for example a .txt"
        ) from error
    paragraphs = (paragraph for name in sorted(topics) for paragraph in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraph.strip("\n") for paragraph in paragraphs))


def _ids(path: pathlib.Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as .npy ({error})") from error
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or (len(ids) and ids.min() < 0):
        raise DataError(
            f"{path} must hold token ids, one axis of integers from 0 on; got {ids.dtype} of shape {ids.shape}"
        )
    return ids.astype(np.min_scalar_type(int(ids.max(initial=0))))
