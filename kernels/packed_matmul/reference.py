"""The product in plain jax.numpy: a block of columns is decoded and multiplied, then the next, so that the decoded
weights never stand in memory as a whole."""

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels.packed_matmul.layout import decode, unpack_codes

COLUMNS = 256  # of a block: decoded it stays within a CPU's second-level cache up to a depth of about a thousand


def matmul(x: jax.Array, words: jax.Array, labels: tuple[float, ...], bits: int) -> jax.Array:
    """x [m, K] @ labels[codes] [K, n] in the dtype of x, summed in float32 (float64)."""
    depth, n = x.shape[1], words.shape[1]
    sums = jnp.float64 if x.dtype == jnp.float64 else jnp.float32

    def product(words: jax.Array) -> jax.Array:
        weights = decode(unpack_codes(words, bits, depth), labels, x.dtype)
        return jnp.matmul(x, weights, preferred_element_type=sums)

    if n < 2 * COLUMNS:
        return product(words).astype(x.dtype)
    whole = n // COLUMNS * COLUMNS
    blocks = jnp.moveaxis(words[:, :whole].reshape(-1, n // COLUMNS, COLUMNS), 1, 0)
    out = jnp.moveaxis(jax.lax.map(product, blocks), 0, 1).reshape(-1, whole)
    if whole < n:
        out = jnp.concatenate([out, product(words[:, whole:])], axis=1)
    return out.astype(x.dtype)
