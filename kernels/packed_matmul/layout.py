"""How codes lie in words: planes along the contraction, so that a plane of the words meets a slice of the activations.

A matrix of codes [K, N] with P = 32 / bits codes to a word takes R = ceil(K / P) rows of words, uint32 [R, N]. Code k
stands in row k mod R at bits [b j, b (j + 1)), j = k // R: plane j of all words is the R x N slice of the matrix that
starts at row j R, and x @ W = sum_j x[:, j R : (j + 1) R] @ plane_j without any transposition.
"""

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks

WORD = 32
BITS = (1, 2, 4, 8)


def bits_for(num_labels: int) -> int:
    """Bits of a code: the fewest of 1, 2, 4 and 8 that tell the labels apart.

    Args:
      num_labels: 2 to 256.

    Returns:
      1 for two labels, 2 up to four, 4 up to sixteen, else 8.

    Raises:
      ValueError: another number of labels.

    Example:
      >>> [bits_for(d) for d in (2, 3, 4, 5, 256)]
      [1, 2, 2, 4, 8]
    """
    checks.within("[2, 256]", num_labels=num_labels)
    return next(bits for bits in BITS if num_labels <= 2**bits)


def rows_for(depth: int, bits: int) -> int:
    """Rows of words for `depth` codes."""
    return -(-depth // (WORD // bits))


def pack_codes(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes into words.

    Args:
      codes: [K, N] integers in [0, 2^bits); what is outside is cut to its low bits.
      bits: 1, 2, 4 or 8.

    Returns:
      uint32 [ceil(K bits / 32), N].

    Raises:
      ValueError: other bits, or codes that are no matrix of integers.

    Example:
      >>> pack_codes(jnp.array([[1], [0], [1], [1]]), 1).tolist()  # one row of words a code each: K < 32
      [[13]]
    """
    checks.one_of(BITS, bits=bits)
    if codes.ndim != 2 or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be a matrix of integers, got {codes.shape} of {codes.dtype}")
    planes, depth = WORD // bits, codes.shape[0]
    rows = rows_for(depth, bits)
    codes = codes.astype(jnp.uint32) & jnp.uint32(2**bits - 1)
    codes = jnp.pad(codes, ((0, planes * rows - depth), (0, 0))).reshape(planes, rows, -1)
    shifts = bits * jnp.arange(planes, dtype=jnp.uint32)
    return jnp.sum(codes << shifts[:, None, None], axis=0, dtype=jnp.uint32)  # no bit meets another


def unpack_codes(words: jax.Array, bits: int, depth: int) -> jax.Array:
    """Undoes `pack_codes`.

    Args:
      words: uint32 [R, N].
      bits: 1, 2, 4 or 8.
      depth: K.

    Returns:
      int32 [K, N].

    Raises:
      ValueError: rows that do not fit the depth.

    Example:
      >>> unpack_codes(jnp.array([[13]], jnp.uint32), 1, 4)[:, 0].tolist()
      [1, 0, 1, 1]
    """
    check_words(words, bits, depth)
    planes = WORD // bits
    shifts = bits * jnp.arange(planes, dtype=jnp.uint32)
    codes = (words[None] >> shifts[:, None, None]) & jnp.uint32(2**bits - 1)
    return codes.reshape(-1, words.shape[1])[:depth].astype(jnp.int32)


def check_words(words: jax.Array, bits: int, depth: int) -> None:
    """Raises ValueError for words that cannot hold `depth` codes of `bits` bits."""
    checks.one_of(BITS, bits=bits)
    if words.ndim != 2 or words.dtype != jnp.uint32 or words.shape[0] != rows_for(depth, bits):
        raise ValueError(
            f"words must be uint32 [{rows_for(depth, bits)}, N] for {depth} codes of {bits} bits, "
            f"got {words.dtype} {words.shape}"
        )


def decode(codes: jax.Array, labels: tuple[float, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """labels[codes] by selects up to four labels, else by a table."""
    if len(labels) > 4:
        return jnp.take(jnp.asarray(labels, dtype), codes.astype(jnp.int32), mode="clip")
    w = jnp.full(codes.shape, labels[0], dtype)
    for code, label in enumerate(labels[1:], start=1):
        w = jnp.where(codes == code, jnp.full(codes.shape, label, dtype), w)
    return w
