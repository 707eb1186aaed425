"""Exact solvers for small grid problems, in NumPy on the host: oracles for the message-passing solvers.

Here and in `_graph_cuts` all take the same dense arrays: unaries θ (H, W, L), one table V (L, L) with V[λ, μ] for λ at
the left or upper pixel, and edge weights w, horizontal (H, W − 1) and vertical (H − 1, W), None for 1. The energy is

    E(x) = Σ_i θ_i(x_i) + Σ_(ij) w_ij V(x_i, x_j),   (ij) over right and down neighbours.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "ExactSolution",
    "chain_min_marginals",
    "enumerate_energies",
    "solve_by_enumeration",
    "solve_chain",
]

MAX_LABELLINGS = 2**24


class ExactSolution(NamedTuple):
    """A labelling and its energy.

    Attributes:
      labels: (H, W) or (N,) int64.
      energy: E(labels), summed in float64.

    Example:
      >>> ExactSolution(np.zeros((1, 2), int), 3.0).energy
      3.0
    """

    labels: np.ndarray
    energy: float


class _Problem(NamedTuple):
    """A validated problem in float64; pixels numbered in raster order."""

    unaries: np.ndarray  # (N, L)
    table: np.ndarray  # (L, L)
    tails: np.ndarray  # (E,) int, the left or upper pixel
    heads: np.ndarray  # (E,) int, the right or lower pixel
    weights: np.ndarray  # (E,)
    shape: tuple[int, int]

    def energy(self, labels: np.ndarray) -> float:
        x = np.asarray(labels).ravel()
        pair = self.weights * self.table[x[self.tails], x[self.heads]]
        return float(np.take_along_axis(self.unaries, x[:, None], 1).sum() + pair.sum())

    def solution(self, labels: np.ndarray) -> ExactSolution:
        return ExactSolution(labels.reshape(self.shape).astype(np.int64), self.energy(labels))


def grid_problem(unaries: Any, table: Any, horizontal: Any, vertical: Any) -> _Problem:
    unaries = np.asarray(unaries, np.float64)
    if unaries.ndim != 3:
        raise ValueError(f"unaries must be (H, W, L), got shape {unaries.shape}; take the problems of a batch apart")
    height, width, num_labels = unaries.shape
    table = np.asarray(table, np.float64)
    if table.shape != (num_labels, num_labels):
        raise ValueError(f"the table V must be {(num_labels, num_labels)} for these unaries, got shape {table.shape}")
    pixel = np.arange(height * width).reshape(height, width)
    weights = []
    for name, value, shape in (
        ("horizontal", horizontal, (height, width - 1)),
        ("vertical", vertical, (height - 1, width)),
    ):
        value = np.ones(shape) if value is None else np.asarray(value, np.float64)
        if value.shape != shape:
            raise ValueError(f"{name} edge weights must have shape {shape}, got {value.shape}")
        weights.append(value.ravel())
    tails = np.concatenate([pixel[:, :-1].ravel(), pixel[:-1].ravel()])
    heads = np.concatenate([pixel[:, 1:].ravel(), pixel[1:].ravel()])
    weights = np.concatenate(weights)
    for name, value in (("unaries", unaries), ("V", table), ("edge weights", weights)):
        if not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite; forbid a label by a large finite cost instead")
    return _Problem(unaries.reshape(-1, num_labels), table, tails, heads, weights, (height, width))


def enumerate_energies(
    unaries: ArrayLike, table: ArrayLike, *, horizontal: ArrayLike | None = None, vertical: ArrayLike | None = None
) -> np.ndarray:
    """The energy of every labelling, as an array with one axis per pixel.

    Its minimum over all axes but i are the min-marginals of pixel i.

    Args:
      unaries: (H, W, L).
      table: V, (L, L).
      horizontal: (H, W − 1) weights, None = 1.
      vertical: (H − 1, W) weights, None = 1.

    Returns:
      Energies of shape (L,) * (H W), pixels in raster order.

    Raises:
      ValueError: for shapes that do not fit, or more than 2²⁴ labellings.

    Example:
      >>> enumerate_energies(np.zeros((1, 2, 2)), [[0, 1], [1, 0]]).tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    problem = grid_problem(unaries, table, horizontal, vertical)
    pixels, num_labels = problem.unaries.shape
    if num_labels**pixels > MAX_LABELLINGS:
        raise ValueError(
            f"{num_labels} labels on {pixels} pixels are {num_labels}^{pixels} labellings, more than {MAX_LABELLINGS}; "
            "use a graph cut, or bounds from message passing"
        )
    energies = np.zeros((num_labels,) * pixels)
    for i, costs in enumerate(problem.unaries):
        energies += costs.reshape([-1 if k == i else 1 for k in range(pixels)])
    for i, j, w in zip(problem.tails, problem.heads, problem.weights, strict=True):  # i < j: V's axes are in order
        energies += (w * problem.table).reshape([num_labels if k in (i, j) else 1 for k in range(pixels)])
    return energies


def solve_by_enumeration(
    unaries: ArrayLike, table: ArrayLike, *, horizontal: ArrayLike | None = None, vertical: ArrayLike | None = None
) -> ExactSolution:
    """The global minimum by trying every labelling; the lexicographically first of several.

    Args:
      unaries: (H, W, L).
      table: V, (L, L), any.
      horizontal: (H, W − 1) weights, None = 1.
      vertical: (H − 1, W) weights, None = 1.

    Returns:
      An `ExactSolution`.

    Raises:
      ValueError: for shapes that do not fit, or more than 2²⁴ labellings.

    Example:
      >>> solve_by_enumeration([[[0, 2], [1, 0], [3, 0]]], [[0, 1], [1, 0]])
      ExactSolution(labels=array([[0, 1, 1]]), energy=1.0)
    """
    problem = grid_problem(unaries, table, horizontal, vertical)
    energies = enumerate_energies(unaries, table, horizontal=horizontal, vertical=vertical)
    return problem.solution(np.array(np.unravel_index(energies.argmin(), energies.shape)))


def _chain(unaries: Any, table: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    unaries = np.asarray(unaries)
    if unaries.ndim != 2:
        raise ValueError(f"unaries of a chain must be (N, L), got shape {unaries.shape}")
    weights = None if weights is None else np.asarray(weights)
    if weights is not None and weights.shape != (len(unaries) - 1,):
        raise ValueError(f"weights of a chain must be {(len(unaries) - 1,)}, got shape {weights.shape}")
    problem = grid_problem(unaries[None], table, None if weights is None else weights[None], None)
    return problem.unaries, problem.table, problem.weights


def solve_chain(unaries: ArrayLike, table: ArrayLike, *, weights: ArrayLike | None = None) -> ExactSolution:
    """The global minimum on a chain by dynamic programming (Viterbi).

    m_1 = 0, m_{i+1}(μ) = min_λ [θ_i(λ) + m_i(λ) + w_i V(λ, μ)]; the last pixel takes the best label of θ + m, and the
    minimising λ are followed back.

    Args:
      unaries: (N, L).
      table: V, (L, L), any.
      weights: (N − 1,), None = 1.

    Returns:
      An `ExactSolution` with labels (N,).

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> solve_chain([[0, 2], [1, 0], [3, 0]], [[0, 1], [1, 0]])
      ExactSolution(labels=array([0, 1, 1]), energy=1.0)

    Source: Viterbi's recursion as in Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    unaries, table, weights = _chain(unaries, table, weights)
    message, back = np.zeros(unaries.shape[1]), []
    for costs, w in zip(unaries[:-1], weights, strict=True):
        candidates = (costs + message)[:, None] + w * table
        back.append(candidates.argmin(0))
        message = candidates.min(0)
    last = unaries[-1] + message
    labels = [int(last.argmin())]
    for pointers in reversed(back):
        labels.append(int(pointers[labels[-1]]))
    return ExactSolution(np.array(labels[::-1]), float(last.min()))


def chain_min_marginals(unaries: ArrayLike, table: ArrayLike, *, weights: ArrayLike | None = None) -> np.ndarray:
    """min E(x) over the labellings with x_i = λ, for every pixel i and label λ of a chain.

    Args:
      unaries: (N, L).
      table: V, (L, L), any.
      weights: (N − 1,), None = 1.

    Returns:
      (N, L) min-marginals: θ_i plus the messages from both ends.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> chain_min_marginals([[0, 2], [1, 0], [3, 0]], [[0, 1], [1, 0]]).tolist()
      [[1.0, 2.0], [2.0, 1.0], [4.0, 1.0]]

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    unaries, table, weights = _chain(unaries, table, weights)
    forward, backward = np.zeros_like(unaries), np.zeros_like(unaries)
    for i, w in enumerate(weights):
        forward[i + 1] = ((unaries[i] + forward[i])[:, None] + w * table).min(0)
    for i in range(len(weights))[::-1]:
        backward[i] = ((unaries[i + 1] + backward[i + 1])[None] + weights[i] * table).min(1)
    return unaries + forward + backward
