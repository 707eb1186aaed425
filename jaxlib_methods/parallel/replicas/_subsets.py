"""Small rotating subsets of parameters, the same on all replicas: drawn again from a key, never stored or sent.

A subset of round t takes, of each array with N entries, the entries at `k` positions; k is static, so that a round's
all-reduce has a static size. Positions that a round leaves unused hold N, which gathers drop.

  partition   n = min(ceil(1 / p), N) parts of a random permutation, one a round, then another permutation: every entry
              is averaged exactly once in n rounds
  strided     the same without the permutation: entries r, r + n, r + 2 n, ...
  bernoulli   each entry with probability p, independently in every round
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core.sampling import shuffled_each
from jaxlib_methods.typing import ParameterSubsets


def parts(fraction: float | int, size: int) -> int:
    """n_p, the rounds in which the entries of an array are averaged once."""
    # 1 / 0.05 is 20 and 1 / 0.07 just above 14: only what is more than round-off above an integer counts.
    return max(1, min(math.ceil(1 / fraction - 1e-9), size))


def capacity(kind: ParameterSubsets, fraction: float | int, size: int) -> int:
    """Static number of positions of a round; for "bernoulli" it is exceeded with a probability below 1e-8."""
    if kind != "bernoulli":
        return math.ceil(size / parts(fraction, size))
    return min(size, math.ceil(fraction * size + 6 * math.sqrt(fraction * (1 - fraction) * size)) + 1)


def subsets(
    kind: ParameterSubsets,
    key: jax.Array,
    t: jax.Array,
    fraction: float | int,
    sizes: Sequence[int],
    redraw: bool = True,
) -> list[jax.Array]:
    """Positions of round t in arrays of N = `sizes` entries: one int32 [capacity] each, N where a place is empty.

    Args:
      kind: of the subsets.
      key: typed key, the same on all replicas.
      t: int32 (), the round.
      fraction: p in (0, 1]. Static.
      sizes: N of each array. Static.
      redraw: whether "partition" takes another permutation after n_p rounds. Static.
    """
    k = [capacity(kind, fraction, N) for N in sizes]
    which = np.repeat(np.arange(len(sizes), dtype=np.int32), k)
    place = jnp.asarray(np.concatenate([np.arange(count, dtype=np.int32) for count in k]))
    N = jnp.asarray(sizes, jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(sizes), dtype=jnp.int32))
    if kind == "bernoulli":
        keys, counts = jax.vmap(lambda key: tuple(jax.random.split(jax.random.fold_in(key, t))))(keys)
        draw = lambda key, size: jax.random.binomial(key, size.astype(jnp.float32), fraction, dtype=jnp.float32)
        chosen = jax.vmap(draw)(counts, N).astype(jnp.int32)
        there, position = place < chosen[which], place
    else:
        n = jnp.asarray([parts(fraction, size) for size in sizes], jnp.int32)
        position = (t % n)[which] + n[which] * place
        there = position < N[which]
        keys = jax.vmap(jax.random.fold_in)(keys, t // n if redraw else jnp.zeros_like(n))
    entry = position
    if kind != "strided":
        entry = shuffled_each(keys, jnp.asarray(which), jnp.minimum(position, N[which] - 1), N)
    return jnp.split(jnp.where(there, entry, N[which]), np.cumsum(k)[:-1].tolist())
