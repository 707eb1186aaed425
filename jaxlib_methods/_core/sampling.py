"""A keyed random permutation whose values are computed one by one: no sort, no stored table."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

ROUNDS = 64  # about four times log2 of the sizes in use


def shuffled(key: jax.Array, positions: jax.Array, size: int) -> jax.Array:
    """Where a keyed random permutation of range(size) sends `positions`, each computed on its own.

    Swap-or-not (Hoang, Morris, Rogaway, CRYPTO 2012): round i pairs x with K_i - x mod size and a hashed bit of the
    pair's larger member says whether to swap. Every round is an involution, so the whole is a bijection for every
    size, and k values cost O(k) where a sorted permutation costs O(size log size).
    """
    swap, salt = _tables(key, jnp.uint32(size))
    return _rounds(positions, jnp.uint32(size), lambda i: (swap[i], salt[i]))


def shuffled_each(keys: jax.Array, which: jax.Array, positions: jax.Array, sizes: jax.Array) -> jax.Array:
    """`shuffled` of several ranges in one loop: entry e is the image of positions[e] in range number which[e].

    Args:
      keys: typed keys [ranges].
      which: int32 [entries].
      positions: int32 [entries].
      sizes: int32 [ranges].
    """
    sizes = sizes.astype(jnp.uint32)
    swap, salt = jax.vmap(_tables, out_axes=1)(keys, sizes)  # [2][ROUNDS, ranges]
    return _rounds(positions, sizes[which], lambda i: (swap[i][which], salt[i][which]))


def _tables(key: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    swap, salt = jax.random.bits(key, (2, ROUNDS), jnp.uint32)
    return swap % size, salt


def _rounds(positions: jax.Array, n: jax.Array, table: Callable[[jax.Array], tuple[jax.Array, jax.Array]]) -> jax.Array:
    def one_round(i: jax.Array, x: jax.Array) -> jax.Array:
        swap, salt = table(i)
        partner = swap + (n - x)
        partner = jnp.where(partner >= n, partner - n, partner)
        bits = jnp.maximum(x, partner) ^ salt  # then the finaliser of MurmurHash3
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        return jnp.where((bits >> 16) & 1 == 1, partner, x)

    return jax.lax.fori_loop(0, ROUNDS, one_round, positions.astype(jnp.uint32)).astype(jnp.int32)
