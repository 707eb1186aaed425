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
from jaxlib_methods.kernels.scanline.reference import dense_base, first_label, minplus
from jaxlib_methods.message_passing._lines import Lines, Messages, from_lines, plus_turned, to_lines, turn
from jaxlib_methods.message_passing._problem import Problem, Schedule
from jaxlib_methods.message_passing.grid import GridMRF

__all__ = ["chain_lower_bound", "sequential_rounding"]

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
      >>> mrf = mp.GridMRF(jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2), mp.potentials.potts(1.0))
      >>> solution = mp.trwp(mrf, num_iterations=10)
      >>> float(chain_lower_bound(mrf, solution.messages)), float(mp.energy(mrf, solution.labels))
      (2.0, 2.0)
    """
    bound = _chain_lower_bound(_problem(mrf, messages))
    return bound if mrf.unaries.ndim == 4 else bound[0]


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
      >>> mrf = mp.GridMRF(jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2), mp.potentials.potts(1.0))
      >>> sequential_rounding(mrf, mp.trwp(mrf).messages)
      Array([[0, 1, 1],
             [0, 1, 1]], dtype=int32)
    """
    labels = _sequential_rounding(_problem(mrf, messages))
    return labels if mrf.unaries.ndim == 4 else labels[0]


def _problem(mrf: GridMRF, messages: Messages) -> Problem:
    if len(messages) != 4:
        raise ValueError(f"rows and columns need the messages of 4 directions, got {len(messages)}")
    return Problem.of(mrf, _FOUR, messages)


@jax.jit
def _chain_lower_bound(problem: Problem) -> jax.Array:
    return bound_of(problem.lines(), problem.messages)


@jax.jit
def _sequential_rounding(problem: Problem) -> jax.Array:
    return round_sequentially(problem, problem.messages)


def bound_of(p: Lines, messages: Messages) -> jax.Array:
    """`chain_lower_bound` in sweep layout, (B,)."""
    batch = p.batch
    total = jnp.zeros((batch,), p.thetas[0].dtype)
    for k in range(2):
        forward, backward = messages[2 * k], messages[2 * k + 1]
        b = plus_turned(p.thetas[k], messages[2 - 2 * k], messages[3 - 2 * k], batch) + (forward + backward)
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


def round_sequentially(problem: Problem, messages: Messages) -> jax.Array:
    """`sequential_rounding` of a batch, (B, H, W).

    Wave k holds the pixels with row + column = k, one of every row: labels first, rows (of all images) last.
    """
    unaries, pairwise, weights = problem.unaries, problem.pairwise, problem.weights
    batch, height, width, num_labels = unaries.shape
    theta, rows = to_lines(unaries, False), batch * height
    waves = width + height - 1

    def one_label(label: jax.Array, costs: jax.Array) -> jax.Array:
        at = lambda x: jax.lax.dynamic_slice_in_dim(x, label, 1, 1)
        cost = at(theta) + at(messages[3]) + turn(jax.lax.optimization_barrier(at(messages[1])), batch)
        cost = from_lines(jax.lax.optimization_barrier(cost), False, batch)[..., 0]
        return jax.lax.dynamic_update_slice_in_dim(costs, _skew(cost)[:, None], label, 1)

    costs = jnp.zeros((waves, num_labels, rows), unaries.dtype)
    costs = jax.lax.fori_loop(0, num_labels, one_label, costs)
    right = None if weights is None else _skew(weights[0])
    down = None if weights is None else _skew(weights[2])
    label = jax.lax.broadcasted_iota(jnp.int32, (num_labels, rows), 0)
    row = jnp.arange(rows, dtype=jnp.int32)[None] % height
    scale = jnp.asarray(pairwise.weight).astype(unaries.dtype)

    elementwise = pairwise.kind in ("potts", "truncated_linear")
    table = None if elementwise else dense_base(pairwise, num_labels, unaries.dtype)

    def cost_of(neighbour: jax.Array, weight: jax.Array | None, exists: jax.Array) -> jax.Array:
        if elementwise:
            v = base_cost(pairwise, jnp.broadcast_to(neighbour[None], label.shape), label, unaries.dtype)
        else:
            v = table[neighbour].T
        v = scale * v if weight is None else scale * v * weight[None]
        return jnp.where(exists, v, jnp.zeros_like(v))

    def wave(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        previous, labels = carry
        at = lambda x: None if x is None else jax.lax.dynamic_index_in_dim(x, k, keepdims=False)
        above = jnp.roll(previous, 1)  # of first rows nobody asks
        total = at(costs) + cost_of(previous, at(right), k - row > 0) + cost_of(above, at(down), row > 0)
        x = first_label(total == total.min(0, keepdims=True))
        return x, jax.lax.dynamic_update_index_in_dim(labels, x, k, 0)

    start = (jnp.zeros(rows, jnp.int32), jnp.zeros((waves, rows), jnp.int32))
    _, labels = jax.lax.fori_loop(0, waves, wave, start)
    return _unskew(labels, batch, width)


def _skew(x: jax.Array) -> jax.Array:
    """(B, H, W) to (W + H - 1, B H) with y[r + c, b H + r] = x[b, r, c]: row r waits r steps."""
    batch, height, width = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, height)))
    flat = padded.reshape(batch, height * (width + height))[:, : height * (width + height - 1)]
    return flat.reshape(batch * height, width + height - 1).T


def _unskew(x: jax.Array, batch: int, width: int) -> jax.Array:
    """(W + H - 1, B H) to (B, H, W)."""
    waves, rows = x.shape
    height = rows // batch
    flat = jnp.pad(x.T.reshape(batch, height * waves), ((0, 0), (0, height)))
    return flat.reshape(batch, height, waves + 1)[:, :, :width]
