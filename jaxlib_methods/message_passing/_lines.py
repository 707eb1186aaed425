"""The layout of messages: a sweep wants [positions, L, lines], all lines of all images side by side.

Horizontal messages live as [W, L, B H] with lines = image rows, all others as [H, L, B W] with lines = image columns (a
diagonal walks over the rows and shifts its columns).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels.scanline import Pairwise
from jaxlib_methods.message_passing.grid import DIRECTIONS

Messages = tuple[jax.Array, ...]


class Lines(NamedTuple):
    """Grid MRFs in sweep layout.

    Attributes:
      thetas: unaries [W, L, B H] and [H, L, B W].
      pairwise: V.
      weights: D arrays [W, B H] or [H, B W], or None.
    """

    thetas: tuple[jax.Array, jax.Array]
    pairwise: Pairwise
    weights: tuple[jax.Array, ...] | None

    @property
    def batch(self) -> int:
        horizontal, vertical = self.thetas
        return vertical.shape[2] // horizontal.shape[0]

    def zeros(self, num_directions: int) -> Messages:
        return tuple(jnp.zeros_like(self.thetas[d >= 2]) for d in range(num_directions))


def to_lines(x: jax.Array, horizontal: bool) -> jax.Array:
    """(B, H, W, L) to [W, L, B H] or [H, L, B W]."""
    b, h, w, num_labels = x.shape
    if horizontal:
        return x.transpose(2, 3, 0, 1).reshape(w, num_labels, b * h)
    return x.transpose(1, 3, 0, 2).reshape(h, num_labels, b * w)


def from_lines(x: jax.Array, horizontal: bool, batch: int) -> jax.Array:
    """The inverse of `to_lines`."""
    positions, num_labels, lines = x.shape
    x = x.reshape(positions, num_labels, batch, lines // batch)
    return x.transpose(2, 3, 0, 1) if horizontal else x.transpose(2, 0, 3, 1)


def turn(x: jax.Array, batch: int) -> jax.Array:
    """[H, L, B W] to [W, L, B H] and back."""
    positions, num_labels, lines = x.shape
    x = x.reshape(positions, num_labels, batch, lines // batch)
    return x.transpose(3, 1, 2, 0).reshape(lines // batch, num_labels, batch * positions)


# Turning an array whose cache lines along one line and all labels do not stay in a processor's cache reads each of them
# again for every position. Label by label they do: Teddy in 10 ms instead of 28 ms, but Tsukuba in 2.7 instead of 1.6.
CPU_TURN_BYTES = 2**20


_CACHE_LINE_BYTES = 64


def plus_turned(base: jax.Array, x: jax.Array, y: jax.Array, batch: int) -> jax.Array:
    """base + turn(x + y)."""
    positions, num_labels, _ = x.shape
    if jax.default_backend() != "cpu" or positions * num_labels * _CACHE_LINE_BYTES <= CPU_TURN_BYTES:
        return base + turn(x + y, batch)

    def one_label(label: jax.Array, total: jax.Array) -> jax.Array:
        at = lambda z: jax.lax.dynamic_slice_in_dim(z, label, 1, 1)
        # The barrier keeps the sum out of the transposition, which then reads one array instead of two.
        turned = turn(jax.lax.optimization_barrier(at(x) + at(y)), batch)
        return jax.lax.dynamic_update_slice_in_dim(total, at(base) + turned, label, 1)

    return jax.lax.fori_loop(0, num_labels, one_label, jnp.zeros_like(base))


def step(d: int) -> tuple[int, int]:
    """The step (positions, lines) of a direction's pair in sweep layout."""
    return (1, 0) if d < 2 else DIRECTIONS[d & ~1]
