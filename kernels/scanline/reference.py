"""The sweep in plain `jax.numpy`: works everywhere, and is what every other implementation is compared with.

The loop writes each message into a buffer that it never reads, so XLA updates it in place; what it reads is
loop-invariant. Each kind of V has its own exact min-plus product:

* Potts: min(a, min a + w);
* truncated linear: doubling, o <- min(o, shift(o, +-2^k) + s 2^k) for 2^k < T, then the floor min a + s T;
* Toeplitz profile: the shifts inside the window, then the floor;
* table (and wide profiles): a loop over the sending label.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels.scanline.api import index_dtype
from jaxlib_methods.kernels.scanline.cost import MAX_WINDOW, window_radius
from jaxlib_methods.kernels.scanline.pairwise import Pairwise, base_cost
from jaxlib_methods.kernels.scanline.request import Backward, Sweep

# Sending labels per trip of the table loop: the accumulator is then read and written once for all of them.
_UNROLL = 8


def sweep(request: Sweep) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """See `jaxlib_methods.kernels.scanline.sweep`.

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    u, pairwise = request.u, request.pairwise
    buffers = (jnp.zeros_like(u) if request.out is None else request.out,)
    if request.with_indices:
        index = index_dtype(u.shape[1])
        buffers = (*buffers, jnp.zeros(u.shape, index), jnp.zeros((u.shape[0], u.shape[2]), index))
    product = lambda a, w: minplus(a, pairwise, w, request.with_indices)
    # A semimetric V turns the zero carry into a zero message by itself; others need the mask.
    found = walk(request, product, buffers, mask=not pairwise.semimetric)
    return (found[0], found[1], found[2]) if request.with_indices else found[0]


def walk(
    request: Sweep,
    product: Callable[[jax.Array, jax.Array | None], tuple[jax.Array, ...]],
    buffers: tuple[jax.Array, ...],
    *,
    mask: bool,
) -> tuple[jax.Array, ...]:
    """The recursion of a sweep around any `product(a, w_i)`, which returns the message and whatever else is to be kept.

    `mask` sets the messages of first positions to zero where the product does not.
    """
    u, opposite, edge_weight = request.u, request.opposite, request.edge_weight
    positions, num_labels, lines = u.shape
    rho, reverse, images = jnp.asarray(request.edge_probability, u.dtype), request.reverse, request.num_images
    rows, shift = request.step
    shift = -shift if reverse else shift
    inside = _inside(lines, shift, images)

    def body(k: jax.Array, carry: tuple) -> tuple:
        senders, buffers = carry
        i = positions - 1 - k if reverse else k
        found = product(_shift_lines(senders[0], shift, images), None if edge_weight is None else _at(edge_weight, i))
        m_i = found[0]
        if mask or rows > 1:
            m_i = jnp.where(k >= rows, m_i, jnp.zeros_like(m_i))
        if inside is not None:
            m_i = jnp.where(inside, m_i, jnp.zeros_like(m_i))
        if opposite is None:
            a = rho * (_at(u, i) + m_i)
        else:
            q_i = _at(opposite, i)
            a = rho * (_at(u, i) + q_i + m_i) - q_i
        buffers = tuple(_put(b, value, i) for b, value in zip(buffers, (m_i, *found[1:]), strict=True))
        return (*senders[1:], a), buffers

    start = tuple(jnp.zeros((num_labels, lines), u.dtype) for _ in range(rows))
    return jax.lax.fori_loop(0, positions, body, (start, buffers))[1]


def minplus(
    a: jax.Array, pairwise: Pairwise, edge_weight: jax.Array | None, with_indices: bool, normalise: bool = True
) -> tuple[jax.Array, ...]:
    """(m,) or (m, P, Q) for m = min_mu [a(mu) + w V(mu, lam)] along the first axis of a [L, lines], less its min."""
    num_labels = a.shape[0]
    index = index_dtype(num_labels)
    scale = jnp.asarray(pairwise.weight).astype(a.dtype)
    scale = scale[None] if edge_weight is None else scale * edge_weight  # [1 or lines]
    label = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0)
    low = a.min(0, keepdims=True)
    first = first_label(a == low) if with_indices else None
    p = None
    radius = window_radius(pairwise, num_labels)

    if pairwise.kind == "potts":
        t, p = a, label
        limit = scale
    elif pairwise.kind == "truncated_linear":
        t, p = _doubling(a, label if with_indices else None, pairwise.truncation, scale)
        limit = scale * jnp.asarray(pairwise.truncation, a.dtype)
    elif radius is not None:
        profile = jnp.asarray(pairwise.profile).astype(a.dtype)
        t, p = _window(a, label if with_indices else None, profile, radius, scale)
        limit = scale * profile[-1] if radius < num_labels - 1 else None
    else:
        t, p = _table(a, dense_base(pairwise, num_labels, a.dtype), scale, with_indices)
        limit = None

    # The floor min a + limit, with min a taken off both sides: messages of a semimetric then never exceed the limit.
    t = t - low
    if limit is not None and with_indices:
        through = (limit[None] < t) | ((limit[None] == t) & (first[None] < p))
        p = jnp.where(through, first[None], p)
    if limit is not None:
        t = jnp.minimum(t, limit[None])
    if not normalise:
        return (t + low,)
    # For a semimetric min t = min a, attained at argmin a.
    m = t if pairwise.semimetric else t - t.min(0, keepdims=True)
    if not with_indices:
        return (m,)
    q = first if pairwise.semimetric else first_label(m == 0)
    return m, p.astype(index), q.astype(index)


def first_label(true: jax.Array) -> jax.Array:
    """Lowest label where `true`, [lines] of [L, lines]; an `argmin` that XLA vectorises on the CPU."""
    num_labels = true.shape[0]
    label = jax.lax.broadcasted_iota(jnp.int32, true.shape, 0)
    return jnp.where(true, label, num_labels - 1).min(0)


def dense_base(pairwise: Pairwise, num_labels: int, dtype: Any) -> jax.Array:
    """The (L, L) table without `weight`."""
    label = jnp.arange(num_labels, dtype=jnp.int32)
    return base_cost(pairwise, *jnp.meshgrid(label, label, indexing="ij"), dtype)


def _doubling(
    a: jax.Array, p: jax.Array | None, truncation: int, scale: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Truncated linear up to distance 2^K - 1 >= T - 1; farther labels pay the floor."""
    for k in range(math.ceil(math.log2(truncation))):
        cost = (scale * jnp.asarray(2**k, a.dtype))[None]
        t, winner = a, p
        costs = _shifts(a, 2**k, jnp.inf)
        # At first every label is its own sender, so that its neighbours' need no look in memory.
        senders = None if p is None else (lambda d: p - d) if k == 0 else _shifts(p, 2**k, 0)
        for offset in (2**k, -(2**k)):
            candidate = costs(offset) + cost
            if senders is not None:
                sender = senders(offset)
                better = (candidate < t) | ((candidate == t) & (sender < winner))
                winner = jnp.where(better, sender, winner)
            t = jnp.minimum(t, candidate)
        a, p = t, winner
    return a, p


def _window(
    a: jax.Array, label: jax.Array | None, profile: jax.Array, radius: int, scale: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """All senders within `radius`. Ascending |d| with <= for lower senders and < for higher ones keeps the lowest
    index."""
    t, p = a + (scale * profile[0])[None], label
    shifted = _shifts(a, radius, jnp.inf)
    for d in range(1, radius + 1):
        cost = (scale * profile[d])[None]
        below, above = shifted(d) + cost, shifted(-d) + cost
        if p is not None:
            p = jnp.where(below <= t, label - d, p)
            p = jnp.where(above < jnp.minimum(below, t), label + d, p)
        t = jnp.minimum(jnp.minimum(t, below), above)
    return t, p


def _table(a: jax.Array, base: jax.Array, scale: jax.Array, with_indices: bool) -> tuple[jax.Array, jax.Array | None]:
    """Loop over the sending label, ascending with <: the lowest index wins."""
    num_labels, lines = a.shape

    def visit(mu: jax.Array, found: tuple) -> tuple:
        cost = jax.lax.dynamic_slice_in_dim(base, mu, 1, 0)[0]  # [L]
        candidate = jax.lax.dynamic_slice_in_dim(a, mu, 1, 0) + scale[None] * cost[:, None]
        if not with_indices:
            return (jnp.minimum(found[0], candidate),)
        t, p = found
        return jnp.minimum(t, candidate), jnp.where(candidate < t, mu, p)

    start = (jnp.full(a.shape, jnp.inf, a.dtype),)
    if with_indices:
        start = (*start, jnp.zeros((num_labels, lines), jnp.int32))
    found = jax.lax.fori_loop(0, num_labels, visit, start, unroll=min(_UNROLL, num_labels))
    return found if with_indices else (found[0], None)


def sweep_backward(request: Backward) -> tuple[jax.Array, jax.Array | None, Pairwise]:
    """See `jaxlib_methods.kernels.scanline.sweep_backward`.

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    dm, opposite_ds, p, q = request.dm, request.opposite, request.p, request.q
    pairwise, edge_weight = request.pairwise, request.edge_weight
    positions, num_labels, lines = dm.shape
    dtype = dm.dtype
    rho, reverse, images = request.edge_probability, request.reverse, request.num_images
    rows, shift = request.step
    shift = -shift if reverse else shift
    inside = _inside(lines, shift, images)
    label = jax.lax.broadcasted_iota(jnp.int32, (num_labels, lines), 0)
    ds = jnp.zeros_like(dm) if request.out is None else request.out
    dw = None if edge_weight is None else jnp.zeros((positions, lines), dtype)
    histogram = _empty_histogram(pairwise, num_labels, lines, dtype)
    at = lambda k: positions - 1 - k if reverse else k

    def body(n: jax.Array, carry: tuple) -> tuple:
        sent, ds, dw, histogram = carry  # sent[0] is dS of this pixel, from the one that it sent to
        k = positions - 1 - n  # steps from the start of the sweep
        i = at(k)
        p_i, q_i = _at(p, i).astype(jnp.int32), _at(q, i).astype(jnp.int32)
        ds = _put(ds, sent[0], i)
        v = _at(dm, i) + jnp.asarray(rho, dtype) * sent[0]
        if opposite_ds is not None:
            v += jnp.asarray(rho - 1.0, dtype) * _at(opposite_ds, i)
        if inside is not None:
            v = jnp.where(inside, v, jnp.zeros_like(v))
        v, routed = _route(v, p_i, q_i, label, pairwise)
        if dw is not None:
            paid = (v * base_cost(pairwise, p_i, label, dtype)).sum(0) * jnp.asarray(pairwise.weight).astype(dtype)
            dw = _put(dw, paid, i)
        weighted = v if edge_weight is None else v * _at(edge_weight, i)[None]
        histogram = _add_to_histogram(histogram, pairwise, weighted, p_i, label)
        return (*sent[1:], _shift_lines(routed, -shift, images)), ds, dw, histogram

    # The last pixels of a line send to nobody, the first ones (the last to be visited) have received nothing.
    carry = ((jnp.zeros((num_labels, lines), dtype),) * rows, ds, dw, histogram)
    sent, ds, dw, histogram = jax.lax.fori_loop(0, positions - rows, body, carry)
    for n, value in enumerate(sent):
        ds = _put(ds, value, at(rows - 1 - n))
    return ds, dw, _pairwise_gradient(histogram, pairwise)


def _route(
    v: jax.Array, p: jax.Array, q: jax.Array, label: jax.Array, pairwise: Pairwise
) -> tuple[jax.Array, jax.Array]:
    """(v, routed): v less its sum at Q (the normalisation), and routed(mu) = sum over lam with P(lam) = mu of it.

    Where V is truncated this takes shifts and one floor, else a loop over the senders.
    """
    num_labels = v.shape[0]
    zero = jnp.zeros_like(v)
    if pairwise.kind == "potts":
        radius = 0
    elif pairwise.kind == "truncated_linear":
        radius = pairwise.truncation - 1
    else:
        radius = window_radius(pairwise, num_labels)
    shifts = radius is not None and 2 * radius + 1 <= min(num_labels, MAX_WINDOW)
    if not (shifts and pairwise.semimetric):
        total = v.sum(0, keepdims=True)
        v = v - jnp.where(label == q[None], total, jnp.zeros_like(total))
    if not shifts:
        send = lambda mu: jnp.where(p == mu, v, zero).sum(0)
        return v, jax.lax.map(send, jnp.arange(num_labels, dtype=jnp.int32))
    offset = p - label
    near = jnp.where(jnp.abs(offset) <= radius, v, zero)
    routed = jnp.where(offset == 0, v, zero)
    values, offsets = _shifts(v, radius, 0), _shifts(offset, radius, 0)
    for d in range(1, radius + 1):
        for shift in (d, -d):
            routed += jnp.where(offsets(shift) == shift, values(shift), zero)
    # Every entry that took the floor has the same sender, argmin a.
    if pairwise.semimetric:
        # It is Q, which also pays for the normalisation: floor - total = -near. V(Q, Q) = 0, so that V need not see it.
        return v, routed - jnp.where(label == q[None], near.sum(0, keepdims=True), zero)
    far = jnp.abs(offset) > radius
    sender = jnp.where(far, p, 0).max(0, keepdims=True)
    return v, routed + jnp.where(label == sender, v.sum(0, keepdims=True) - near.sum(0, keepdims=True), zero)


def _empty_histogram(pairwise: Pairwise, num_labels: int, lines: int, dtype: Any) -> jax.Array:
    """Gradient of the loss in base(mu, lam), summed over the edges; per line or per distance as the kind allows."""
    if pairwise.kind in ("potts", "truncated_linear"):
        return jnp.zeros(lines, dtype)
    if pairwise.kind == "toeplitz":
        return jnp.zeros(pairwise.profile.shape[0], dtype)
    return jnp.zeros((num_labels, num_labels), dtype)


def _add_to_histogram(
    histogram: jax.Array, pairwise: Pairwise, v: jax.Array, p: jax.Array, label: jax.Array
) -> jax.Array:
    if pairwise.kind in ("potts", "truncated_linear"):
        return histogram + (v * base_cost(pairwise, p, label, v.dtype)).sum(0)
    zero = jnp.zeros_like(v)
    if pairwise.kind == "toeplitz":
        radius = pairwise.profile.shape[0] - 1
        distance = jnp.minimum(jnp.abs(p - label), radius)
        count = lambda d: jnp.where(distance == d, v, zero).sum()
        return histogram + jax.lax.map(count, jnp.arange(radius + 1, dtype=jnp.int32))
    count = lambda mu: jnp.where(p == mu, v, zero).sum(1)
    return histogram + jax.lax.map(count, jnp.arange(v.shape[0], dtype=jnp.int32))


def _pairwise_gradient(histogram: jax.Array, pairwise: Pairwise) -> Pairwise:
    weight = jnp.asarray(pairwise.weight)
    scale = weight.astype(histogram.dtype)
    if pairwise.kind in ("potts", "truncated_linear"):
        gradient = {"weight": histogram.sum().astype(weight.dtype)}
    else:
        name = "profile" if pairwise.kind == "toeplitz" else "table"
        values = jnp.asarray(getattr(pairwise, name))
        gradient = {
            "weight": (histogram * values.astype(histogram.dtype)).sum().astype(weight.dtype),
            name: (scale * histogram).astype(values.dtype),
        }
    return Pairwise(
        pairwise.kind, truncation=pairwise.truncation, semimetric=pairwise.semimetric, **{"weight": None, **gradient}
    )


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
    """x[i] without the wrapping of negative indices, as `_put` is `x.at[i].set` without its bounds check."""
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: jax.Array, value: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


def _shifts(x: jax.Array, radius: int, fill: Any) -> Callable[[int], jax.Array]:
    """d -> y with y(lam) = x(lam - d) along the first axis, |d| <= radius.

    Slices of one array padded in memory: fused into its readers, the padding would cost XLA a branch per element.
    """
    padded = jax.lax.optimization_barrier(jnp.pad(x, ((radius, radius), (0, 0)), constant_values=fill))
    return lambda d: jax.lax.slice_in_dim(padded, radius - d, radius - d + x.shape[0])


def _shift_lines(x: jax.Array, offset: int, images: int) -> jax.Array:
    """y(line) = x(line - offset) inside each image, zero where there is no such line."""
    if offset == 0:
        return x
    grid = x.reshape(x.shape[0], images, -1)
    size = min(abs(offset), grid.shape[2])
    pad = jnp.zeros((x.shape[0], images, size), x.dtype)
    kept = grid.shape[2] - size
    parts = [pad, grid[..., :kept]] if offset > 0 else [grid[..., grid.shape[2] - kept :], pad]
    return jnp.concatenate(parts, axis=2).reshape(x.shape)


def _inside(lines: int, shift: int, images: int) -> jax.Array | None:
    """[1, lines]: whether the sender of a diagonal lies inside the image."""
    if shift == 0:
        return None
    width = lines // images
    column = jnp.arange(lines, dtype=jnp.int32) % width - shift
    return ((column >= 0) & (column < width))[None]
