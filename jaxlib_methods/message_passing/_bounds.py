"""What messages say about the solution: a lower bound on the energy, and labellings better than the pixelwise argmin.

Both are additions to the paper. Messages are a reparametrisation whatever their values: with b_i = theta_i + sum of
incoming messages,

    sum_i b_i(x_i) + sum_(ij) [w V(x_i, x_j) - m_j^{i->j}(x_j) - m_i^{j->i}(x_i)] = E(x).

Half of every b goes to its row, half to its column; each is then a chain with an exact minimum by dynamic programming.
"""

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels.scanline import Pairwise
from jaxlib_methods.kernels.scanline.pairwise import base_cost
from jaxlib_methods.kernels.scanline.reference import dense_base, minplus
from jaxlib_methods.message_passing._grid import GridMRF, check
from jaxlib_methods.message_passing._schedule import Messages, Problem, Schedule, batch_size, from_lines, problem, turn

_FOUR = Schedule(4, 1.0, True)


def chain_lower_bound(mrf: GridMRF, messages: Messages) -> jax.Array:
    """LB = sum over rows and columns of the minimum of their chain <= min E.

    Valid for any messages, tight for those of TRWP, useless (often negative) for those of ISGMR. It does not rise
    monotonically:
    keep the best.

    Args:
      mrf: the problem.
      messages: four directions, as in `Solution.messages`.

    Returns:
      (B,) bounds on the 4-connected energy, or a scalar without a batch axis.

    Raises:
      ValueError: if there are not four directions of messages, or the problem is not valid.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> mrf = mp.GridMRF(jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2), mp.potts(1.0))
      >>> solution = mp.trwp(mrf, iterations=10)
      >>> float(chain_lower_bound(mrf, solution.messages)), float(mp.energy(mrf, solution.labels))
      (2.0, 2.0)

    Source: this library.
    """
    unaries, weights, batched = _prepare(mrf, messages)
    bound = _chain_lower_bound(unaries, mrf.pairwise, weights, messages)
    return bound if batched else bound[0]


def sequential_rounding(mrf: GridMRF, messages: Messages) -> jax.Array:
    """Labels in raster order: x_i = argmin theta_i + m_i from the right and from below + w V(x_left, .) + w V(x_up, .).

    All pixels of an anti-diagonal at once. Nearly always of lower energy than the argmin of the beliefs; it is how
    TRW-S rounds.

    Args:
      mrf: the problem.
      messages: four directions, as in `Solution.messages`.

    Returns:
      (B, H, W) or (H, W) int32 labels, the lowest of equal ones.

    Raises:
      ValueError: if there are not four directions of messages, or the problem is not valid.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> mrf = mp.GridMRF(jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2), mp.potts(1.0))
      >>> sequential_rounding(mrf, mp.trwp(mrf).messages)
      Array([[0, 1, 1],
             [0, 1, 1]], dtype=int32)

    Source: this library.
    """
    unaries, weights, batched = _prepare(mrf, messages)
    labels = _sequential_rounding(unaries, mrf.pairwise, weights, messages)
    return labels if batched else labels[0]


def _prepare(mrf: GridMRF, messages: Messages) -> tuple[jax.Array, jax.Array | None, bool]:
    check(mrf, 4)
    if len(messages) != 4:
        raise ValueError(f"rows and columns need the messages of 4 directions, got {len(messages)}")
    batched = mrf.unaries.ndim == 4
    weights = None if mrf.edge_weights is None else mrf.edge_weights[:4]
    return (mrf.unaries, weights, True) if batched else (mrf.unaries[None], _add_batch(weights), False)


def _add_batch(weights: jax.Array | None) -> jax.Array | None:
    return None if weights is None else weights[:, None]


@jax.jit
def _chain_lower_bound(
    unaries: jax.Array, pairwise: Pairwise, weights: jax.Array | None, messages: Messages
) -> jax.Array:
    return bound_of(problem(_FOUR, unaries, pairwise, weights), messages)


def bound_of(p: Problem, messages: Messages) -> jax.Array:
    """`chain_lower_bound` in sweep layout, (B,)."""
    batch = batch_size(p)
    total = jnp.zeros((batch,), p.thetas[0].dtype)
    for k in range(2):
        forward, backward = messages[2 * k], messages[2 * k + 1]
        b = p.thetas[k] + turn(messages[2 - 2 * k] + messages[3 - 2 * k], batch) + (forward + backward)
        weight = None if p.weights is None else p.weights[2 * k]
        total = total + _chain_minima(b, forward, backward, p.pairwise, weight).reshape(batch, -1).sum(-1)
    return total


def _chain_minima(
    b: jax.Array, forward: jax.Array, backward: jax.Array, pairwise: Pairwise, weight: jax.Array | None
) -> jax.Array:
    """min_x [sum 1/2 b_i(x_i) + sum (w V - m_j^forward - m_i^backward)] of every line, [lines]."""
    half = jnp.asarray(0.5, b.dtype)

    def step(carry: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
        (t,) = minplus(carry, pairwise, None if weight is None else at(weight), False, normalise=False)
        t = jnp.where(i > 0, t, jnp.zeros_like(t))
        alpha = half * at(b) - at(forward) + t
        low = alpha.min(0)
        # Minima are split off and summed apart, so that the carry stays small and loses no digits.
        return alpha - low[None] - at(backward), low

    _, lows = jax.lax.scan(step, jnp.zeros_like(b[0]), jnp.arange(b.shape[0], dtype=jnp.int32))
    return lows.sum(0)


@jax.jit
def _sequential_rounding(
    unaries: jax.Array, pairwise: Pairwise, weights: jax.Array | None, messages: Messages
) -> jax.Array:
    return round_sequentially(unaries, pairwise, weights, messages)


def round_sequentially(
    unaries: jax.Array, pairwise: Pairwise, weights: jax.Array | None, messages: Messages
) -> jax.Array:
    """`sequential_rounding` of a batch, (B, H, W)."""
    batch, height, width, num_labels = unaries.shape
    costs = unaries + from_lines(messages[1], True, batch) + from_lines(messages[3], False, batch)
    waves = width + height - 1
    costs = _skew(costs)  # (waves, B, H, L)
    right = None if weights is None else _skew(weights[0][..., None])[..., 0]
    down = None if weights is None else _skew(weights[2][..., None])[..., 0]
    label = jnp.arange(num_labels, dtype=jnp.int32).reshape(1, 1, num_labels)
    row = jnp.arange(height, dtype=jnp.int32).reshape(1, height, 1)
    scale = jnp.asarray(pairwise.weight).astype(unaries.dtype)

    elementwise = pairwise.kind in ("potts", "truncated_linear")
    table = None if elementwise else dense_base(pairwise, num_labels, unaries.dtype)

    def cost_of(neighbour: jax.Array, weight: jax.Array | None, exists: jax.Array) -> jax.Array:
        shape = (batch, height, num_labels)
        mu, lam = jnp.broadcast_to(neighbour[..., None], shape), jnp.broadcast_to(label, shape)
        v = scale * (base_cost(pairwise, mu, lam, unaries.dtype) if elementwise else table[neighbour])
        v = v if weight is None else v * weight[..., None]
        return jnp.where(exists, v, jnp.zeros_like(v))

    def wave(previous: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = lambda x: None if x is None else jax.lax.dynamic_index_in_dim(x, k, keepdims=False)
        above = jnp.concatenate([previous[:, :1], previous[:, :-1]], axis=1)
        total = at(costs) + cost_of(previous, at(right), k - row > 0) + cost_of(above, at(down), row > 0)
        x = jnp.argmin(total, -1).astype(jnp.int32)
        return x, x

    start = jnp.zeros((batch, height), jnp.int32)
    _, labels = jax.lax.scan(wave, start, jnp.arange(waves, dtype=jnp.int32))
    return _unskew(labels, width)


def _skew(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (W + H - 1, B, H, C) with y[r + c, :, r] = x[:, r, c]: row r waits r steps."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, height), (0, 0)))
    flat = padded.reshape(batch, height * (width + height), channels)[:, : height * (width + height - 1)]
    return flat.reshape(batch, height, width + height - 1, channels).transpose(2, 0, 1, 3)


def _unskew(x: jax.Array, width: int) -> jax.Array:
    """(W + H - 1, B, H) to (B, H, W)."""
    waves, batch, height = x.shape
    flat = jnp.pad(x.transpose(1, 2, 0).reshape(batch, height * waves), ((0, 0), (0, height)))
    return flat.reshape(batch, height, waves + 1)[:, :, :width]
