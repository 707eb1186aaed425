r"""The set an attack stays in: the epsilon ball around the image and the box of valid values, to the last bit.

Both hold in real arithmetic for the stored floats: |x - x_0|_inf <= eps, or |x - x_0|_2 <= eps, and low <= x <= high.
Rounded sums leave the ball by half a unit in the last place, so the bounds of the interval are rounded inwards where
the exact sum (Knuth's two-sum) says so, and the L2 ball is drawn in by a bound on the rounding errors, some parts per
million.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class FeasibleSet(NamedTuple):
    """The ball and the box of every image; `lower` and `upper` hold both for "linf", and the box alone otherwise."""

    centre: jax.Array  # [batch, ...]: the images
    lower: jax.Array  # [batch, ...]
    upper: jax.Array  # [batch, ...]
    radius: jax.Array  # [batch, 1 or channels]: of the ball drawn in, for the L2 norms


def feasible_set(images: jax.Array, epsilon: jax.Array, low: jax.Array, high: jax.Array, norm: str) -> FeasibleSet:
    """The feasible set; epsilon, low and high broadcast to the images, epsilon of an L2 norm is a scalar."""
    low, high = (jnp.broadcast_to(value, images.shape) for value in (low, high))
    if norm == "linf":
        epsilon = jnp.broadcast_to(epsilon, images.shape)
        low = jnp.maximum(low, -_sum_rounded_down(-images, epsilon))
        high = jnp.minimum(high, _sum_rounded_down(images, epsilon))
        return FeasibleSet(images, low, high, epsilon)
    rows = _rows(images, norm)
    unit = jnp.finfo(images.dtype).eps / 2
    reach = jnp.max(jnp.abs(rows), axis=2) + epsilon  # no entry of a point of the ball is larger
    margin = epsilon * unit * (2 * _block(rows.shape[2]) + 16) + unit * math.sqrt(rows.shape[2]) * reach
    return FeasibleSet(images, low, high, jnp.maximum(epsilon - margin, 0))


def project(x: jax.Array, to: FeasibleSet, norm: str) -> jax.Array:
    """The point of the set that attacks move on to: into the ball along the radius, then into the box."""
    if norm != "linf":
        delta = _rows(x - to.centre, norm)
        length = row_norms(delta)
        inside = length <= to.radius
        factor = jnp.where(inside, jnp.ones_like(length), to.radius / jnp.where(inside, jnp.ones_like(length), length))
        drawn_in = to.centre + _unrows(delta * factor[:, :, None], x.shape, norm)
        x = jnp.where(_unrows(jnp.broadcast_to(inside[:, :, None], delta.shape), x.shape, norm), x, drawn_in)
    return jnp.clip(x, to.lower, to.upper)


def unit_gradient(gradient: jax.Array, norm: str, floor: jax.Array) -> jax.Array:
    """The direction of steepest ascent with length 1 in the norm; 0 where the gradient is 0."""
    if norm == "linf":
        return jnp.sign(gradient)
    rows = _rows(gradient, "l2")  # the step has length 1 over the whole image, with per-channel balls as well
    length = row_norms(rows)
    length = jnp.maximum(jnp.where(length > 0, length, jnp.ones_like(length)), floor)
    return _unrows(rows / length[:, :, None], gradient.shape, "l2")


def row_norms(rows: jax.Array) -> jax.Array:
    """L2 norms over the last axis of [batch, rows, N], without underflow, with rounding errors of O(sqrt(N)) units."""
    scale = jnp.max(jnp.abs(rows), axis=2)
    safe = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    size = _block(rows.shape[2])
    padding = -rows.shape[2] % size
    squares = jnp.pad((rows / safe[:, :, None]) ** 2, [(0, 0), (0, 0), (0, padding)])
    blocks = jnp.sum(squares.reshape(*rows.shape[:2], -1, size), axis=3)
    blocks = jax.lax.optimization_barrier(blocks)  # XLA would make one long sum of the two
    return scale * jnp.sqrt(jnp.sum(blocks, axis=2))


def _block(count: int) -> int:
    return max(1, math.isqrt(count))


def _rows(x: jax.Array, norm: str) -> jax.Array:
    """[batch, 1, N], or [batch, channels, N] where every channel has its own ball."""
    if norm == "l2_per_channel":
        return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], x.shape[-1], -1)
    return x.reshape(x.shape[0], 1, -1)


def _unrows(rows: jax.Array, shape: tuple[int, ...], norm: str) -> jax.Array:
    if norm == "l2_per_channel":
        return jnp.moveaxis(rows.reshape(shape[0], shape[-1], *shape[1:-1]), 1, -1)
    return rows.reshape(shape)


def _sum_rounded_down(a: jax.Array, b: jax.Array) -> jax.Array:
    """The largest float that is not above the exact a + b."""
    s = a + b
    virtual = s - a
    lost = (a - (s - virtual)) + (b - virtual)  # a + b = s + lost exactly
    return jnp.where(lost < 0, jnp.nextafter(s, jnp.full_like(s, -jnp.inf)), s)
