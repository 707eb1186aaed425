"""The min-plus product of one position and its backward, on arrays [L, lines] held by a Pallas kernel.

Shared by the TPU and the GPU kernel, which differ in how a label vector is reduced, broadcast and shifted (`Lanes`).
A "row" holds one value per line; each backend has its own shape for it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels.scanline.cost import MAX_WINDOW, window_radius
from jaxlib_methods.kernels.scanline.pairwise import Pairwise, base_cost
from jaxlib_methods.kernels.scanline.reference import _pairwise_gradient as pairwise_gradient
from jaxlib_methods.kernels.scanline.request import Backward

# Truncated linear by a window up to this T: 2 (T - 1) shifts of values only, where doubling also shifts the indices.
MAX_WINDOW_TRUNCATION = 4


class Lanes(NamedTuple):
    """What the backends spell differently.

    spread: row -> [L, lines]. least, total: [L, lines] -> row, minimum and sum over the labels.
    shifts: x [L, lines] -> function (offset, fill) -> y(lam) = x(lam - offset), `fill` where there is no such label.
    """

    spread: Callable[[Any], Any]
    least: Callable[[Any], Any]
    total: Callable[[Any], Any]
    shifts: Callable[[Any], Callable[[int, Any], Any]]


def structure(pairwise: Pairwise) -> Pairwise:
    """Static facts only: a kernel must not close over arrays."""
    shape = lambda x: None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype)
    return dataclasses.replace(pairwise, weight=None, profile=shape(pairwise.profile), table=shape(pairwise.table))


def form(pairwise: Pairwise, num_labels: int) -> str:
    """How the kernels compute V's product: "potts", "window", "doubling" or "table"."""
    if pairwise.kind == "potts" or (pairwise.kind == "truncated_linear" and pairwise.truncation == 1):
        return "potts"
    if pairwise.kind == "truncated_linear":
        return "window" if pairwise.truncation <= min(MAX_WINDOW_TRUNCATION, num_labels) else "doubling"
    return "table" if window_radius(pairwise, num_labels) is None else "window"


def argmin(x: jax.Array, low: Any, label: jax.Array, lanes: Lanes) -> Any:
    """Row of the lowest label that attains the row `low` of minima."""
    return lanes.least(jnp.where(x == lanes.spread(low), label, jnp.full_like(label, x.shape[0])))


def minplus(
    a: jax.Array,
    label: jax.Array,
    scale: Any,
    profile: Callable[[int], Any] | None,
    table: Callable[[jax.Array], tuple[jax.Array, jax.Array | None]] | None,
    pairwise: Pairwise,
    lanes: Lanes,
    with_indices: bool,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, Any]:
    """(m, P, Q): min_mu [a(mu) + scale V(mu, lam)] less its minimum over lam, and the argmins (lowest index).

    Args:
      a: [L, lines].
      label: int32 [L, lines], the label of each entry.
      scale: row of weight * edge weight.
      profile: d -> row of profile[d], for a Toeplitz window.
      table: a -> (t, P) by the loop over senders, for a table.
      pairwise: static structure only.
      lanes: the backend.
      with_indices: whether P and Q are wanted.
      valid: [L, lines] False at padding labels (where a = +inf); None where there are none.
    """
    num_labels = a.shape[0]
    low = lanes.least(a)
    first = argmin(a, low, label, lanes) if with_indices else None
    how = form(pairwise, num_labels)
    floor, p = None, label if with_indices else None
    if how == "potts":
        t, floor = a, low + scale
    elif how == "table":
        t, p = table(a)
    elif how == "doubling":
        t, p = _doubling(a, p, pairwise.truncation, scale, lanes)
        floor = low + scale * jnp.float32(pairwise.truncation)
    else:
        if pairwise.kind == "truncated_linear":
            radius, cost = pairwise.truncation - 1, lambda d: scale * jnp.float32(d)
            floor = low + scale * jnp.float32(pairwise.truncation)
        else:
            radius, cost = window_radius(pairwise, num_labels), lambda d: scale * profile(d)
            last = pairwise.profile.shape[0] - 1
            floor = low + cost(last) if last < num_labels - 1 else None
        t = a if pairwise.kind == "truncated_linear" else a + lanes.spread(cost(0))
        t, p = _window(a, t, p, label, radius, cost, lanes)
    if floor is not None:
        floor = lanes.spread(floor)
        if with_indices:
            # Strictly lower, or equal with the lower sender: the lowest index wins.
            sender = lanes.spread(first)
            p = jnp.where((floor < t) | ((floor == t) & (sender < p)), sender, p)
        t = jnp.minimum(t, floor)
    if pairwise.semimetric:  # then min t = min a, attained at argmin a
        return t - lanes.spread(low), p, first
    inside = t if valid is None else jnp.where(valid, t, jnp.full_like(t, jnp.inf))
    least = lanes.least(inside)
    return t - lanes.spread(least), p, argmin(inside, least, label, lanes) if with_indices else None


def _doubling(
    a: jax.Array, p: jax.Array | None, truncation: int, scale: Any, lanes: Lanes
) -> tuple[jax.Array, jax.Array | None]:
    """Truncated linear up to distance 2^K - 1 >= T - 1; farther labels pay the floor."""
    for k in range(math.ceil(math.log2(min(truncation, a.shape[0])))):
        cost = lanes.spread(scale * jnp.float32(2**k))
        values = lanes.shifts(a)
        candidates = [values(offset, jnp.inf) + cost for offset in (2**k, -(2**k))]
        if p is None:
            a = jnp.minimum(jnp.minimum(a, candidates[0]), candidates[1])
            continue
        indices = lanes.shifts(p)
        for candidate, offset in zip(candidates, (2**k, -(2**k)), strict=True):
            sender = indices(offset, p.shape[0])
            better = (candidate < a) | ((candidate == a) & (sender < p))
            p, a = jnp.where(better, sender, p), jnp.minimum(a, candidate)
    return a, p


def _window(
    a: jax.Array,
    t: jax.Array,
    p: jax.Array | None,
    label: jax.Array,
    radius: int,
    cost: Callable[[int], Any],
    lanes: Lanes,
) -> tuple[jax.Array, jax.Array | None]:
    """All senders within `radius`: ascending |d|, <= for lower senders and < for higher ones keeps the lowest index."""
    values = lanes.shifts(a) if radius else None
    for d in range(1, radius + 1):
        paid = lanes.spread(cost(d))
        for offset in (d, -d):
            candidate = values(offset, jnp.inf) + paid
            if p is not None:
                p = jnp.where(candidate <= t if offset > 0 else candidate < t, label - jnp.int32(offset), p)
            t = jnp.minimum(t, candidate)
    return t, p


def route_radius(pairwise: Pairwise, num_labels: int) -> int | None:
    """Radius of the shifts that route a gradient back, or None where the loop over the senders does it."""
    if pairwise.kind == "potts":
        return 0
    radius = pairwise.truncation - 1 if pairwise.kind == "truncated_linear" else window_radius(pairwise, num_labels)
    return None if radius is None or 2 * radius + 1 > min(num_labels, MAX_WINDOW) else radius


def route(
    v: jax.Array, p: jax.Array, q: Any, label: jax.Array, radius: int, semimetric: bool, lanes: Lanes
) -> jax.Array:
    """sum over lam with P(lam) = mu of v(lam), by shifts; what is farther took the floor, whose sender is one label."""
    zero = jnp.zeros_like(v)
    routed = jnp.where(p == label, v, zero)
    values, senders = (lanes.shifts(v), lanes.shifts(p)) if radius else (None, None)
    for d in range(1, radius + 1):
        for offset in (-d, d):
            routed += jnp.where(senders(offset, p.shape[0]) == label, values(offset, 0.0), zero)
    offset = p - label
    near = (offset >= -radius) & (offset <= radius)
    if semimetric:
        sender = q  # the floor's sender is argmin a, stored as Q
    else:
        away = jnp.full_like(p, p.shape[0])
        sender = lanes.least(jnp.where(near, away, p))
    floor = lanes.total(jnp.where(near, zero, v))
    return routed + jnp.where(label == lanes.spread(sender), lanes.spread(floor), zero)


def pairwise_gradients(request: Backward, ds: jax.Array) -> tuple[jax.Array | None, Pairwise]:
    """(dw, dpairwise) of a whole sweep along the lines, from its dS: no recursion is left, so XLA does it.

    dS of a pixel is what the pixel after it sent back, so v = dm + rho dS + (rho - 1) opposite_ds, less its sum at Q,
    is known everywhere at once. A caller who does not use these gradients does not pay for them under `jax.jit`.
    """
    dm, pairwise, edge_weight = request.dm, request.pairwise, request.edge_weight
    positions, num_labels, _ = dm.shape
    label = jax.lax.broadcasted_iota(jnp.int32, dm.shape, 1)
    p, q = request.p.astype(jnp.int32), request.q.astype(jnp.int32)
    zero = jnp.zeros_like(dm)
    v = dm + jnp.asarray(request.edge_probability, dm.dtype) * ds
    if request.opposite is not None:
        v += jnp.asarray(request.edge_probability - 1.0, dm.dtype) * request.opposite
    v = v - jnp.where(label == q[:, None], v.sum(1, keepdims=True), zero)
    # The first pixel of a line receives nothing; its indices are unspecified.
    first = jnp.arange(positions, dtype=jnp.int32)[:, None, None] == (positions - 1 if request.reverse else 0)
    v, p = jnp.where(first, zero, v), jnp.where(first, label, p)
    weighted = v if edge_weight is None else v * edge_weight[:, None]
    dw = None
    if edge_weight is not None:
        dw = (v * base_cost(pairwise, p, label, v.dtype)).sum(1) * jnp.asarray(pairwise.weight).astype(v.dtype)
    if pairwise.kind in ("potts", "truncated_linear"):
        histogram = weighted * base_cost(pairwise, p, label, v.dtype)
    elif pairwise.kind == "toeplitz":
        radius = pairwise.profile.shape[0] - 1
        distance = jnp.minimum(jnp.abs(p - label), radius)
        count = lambda d: jnp.where(distance == d, weighted, zero).sum()
        histogram = jax.lax.map(count, jnp.arange(radius + 1, dtype=jnp.int32))
    else:
        count = lambda mu: jnp.where(p == mu, weighted, zero).sum((0, 2))
        histogram = jax.lax.map(count, jnp.arange(num_labels, dtype=jnp.int32))
    return dw, pairwise_gradient(histogram, pairwise)
