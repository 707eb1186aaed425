"""Iteratively reweighted graph cuts: truncated and other non-convex V by a sequence of convex problems."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxlib_methods.message_passing.exact import grid_problem
from jaxlib_methods.message_passing.graph_cuts import GraphCutSolution, solve_by_graph_cut

__all__ = ["NonConvexPrior", "iteratively_reweighted_graph_cut", "non_convex_prior"]


class NonConvexPrior(NamedTuple):
    """V = h(f(d)) with f convex and h concave, on the label distances d = 0..L−1.

    Attributes:
      cost: (L,) g(d) = h(f(d)).
      convex: (L,) f(d).
      weight: (L,) a supergradient of h at f(d): cost[e] <= cost[d] + weight[d] (convex[e] - convex[d]) for all d, e.

    Example:
      >>> non_convex_prior("truncated_linear", 5, truncation=2).weight.tolist()
      [1.0, 1.0, 0.5, 0.0, 0.0]

    Source: Ajanthan, Hartley, Salzmann, Li (CVPR 2015), arXiv:1411.6340 [ajanthan2015iteratively].
    """

    cost: np.ndarray
    convex: np.ndarray
    weight: np.ndarray


def non_convex_prior(name: str, num_labels: int, *, truncation: float | int) -> NonConvexPrior:
    """The priors of IRGC and how they split into a concave function of a convex one, λ the truncation.

    - truncated_linear: min(d, λ); f = d
    - truncated_quadratic: min(d, λ)²; f = d² up to λ, λ² + 2λ(d − λ) beyond
    - cauchy: λ²/2 log(1 + (d/λ)²); f = the same up to its inflection λ, linear with its slope λ/2 beyond

    h' is 1 below the truncation, 1/2 on it and 0 above; for Cauchy 1 up to λ and 2λd / (λ² + d²) above.

    Args:
      name: one of the three above.
      num_labels: L.
      truncation: λ > 0, in labels; a whole number for the truncated ones (f must be convex on whole distances).

    Returns:
      A `NonConvexPrior`.

    Raises:
      ValueError: for another name or a truncation that does not fit.

    Example:
      >>> non_convex_prior("truncated_quadratic", 5, truncation=2).convex.tolist()
      [0.0, 1.0, 4.0, 8.0, 12.0]

    Source: Ajanthan, Hartley, Salzmann, Li (CVPR 2015), arXiv:1411.6340 [ajanthan2015iteratively].
    """
    if not truncation > 0 or (name != "cauchy" and truncation != int(truncation)):
        raise ValueError(f"truncation must be positive, and whole for a truncated prior, got {truncation}")
    d, t = np.arange(num_labels, dtype=np.float64), float(truncation)
    below_on_above = np.where(d < t, 1.0, np.where(d == t, 0.5, 0.0))
    if name == "truncated_linear":
        return NonConvexPrior(np.minimum(d, t), d, below_on_above)
    if name == "truncated_quadratic":
        return NonConvexPrior(np.minimum(d, t) ** 2, np.where(d <= t, d**2, t**2 + 2 * t * (d - t)), below_on_above)
    if name == "cauchy":
        cost = t**2 / 2 * np.log1p((d / t) ** 2)
        beyond = t**2 / 2 * np.log(2) + t / 2 * (d - t)
        return NonConvexPrior(cost, np.where(d <= t, cost, beyond), np.where(d <= t, 1.0, 2 * t * d / (t**2 + d**2)))
    raise ValueError(f"name must be 'truncated_linear', 'truncated_quadratic' or 'cauchy', got {name!r}")


def iteratively_reweighted_graph_cut(
    unaries: ArrayLike,
    prior: NonConvexPrior,
    *,
    horizontal: ArrayLike | None = None,
    vertical: ArrayLike | None = None,
    max_iterations: int = 100,
    tolerance: float | int = 1e-5,
) -> GraphCutSolution:
    """A local minimum for a truncated or Cauchy V, by exact cuts of convex majorants: the energy never increases.

    w_ij = γ_ij h'(f(|x_i − x_j|)), then x = argmin Σθ + Σ w_ij f(|x_i − x_j|) by `solve_by_graph_cut`; w = γ/2 first.

    Args:
      unaries: (H, W, L), L ≥ 2.
      prior: from `non_convex_prior`; V = prior.cost[|λ − μ|].
      horizontal: (H, W − 1) non-negative weights γ, None = 1.
      vertical: (H − 1, W) non-negative weights γ, None = 1.
      max_iterations: number of cuts at most.
      tolerance: stop when the energy changes by less.

    Returns:
      An `GraphCutSolution`, the best labelling met.

    Raises:
      ValueError: for shapes that do not fit, or negative weights.
      ImportError: without PyMaxflow.

    Example:
      >>> theta = [[[0, 4, 9], [9, 4, 0]]]
      >>> potts = non_convex_prior("truncated_linear", 3, truncation=1)
      >>> iteratively_reweighted_graph_cut(theta, potts).energy  # doctest: +SKIP
      1.0

    Source: Ajanthan, Hartley, Salzmann, Li (CVPR 2015), arXiv:1411.6340 [ajanthan2015iteratively].
    """
    num_labels = np.shape(unaries)[-1]
    if len(prior.cost) != num_labels:
        raise ValueError(f"the prior is for {len(prior.cost)} labels, the unaries have {num_labels}")
    distance = np.abs(np.subtract.outer(np.arange(num_labels), np.arange(num_labels)))
    problem = grid_problem(unaries, prior.cost[distance], horizontal, vertical)
    height, width = problem.shape
    across = height * (width - 1)  # that many horizontal edges come first
    reweighting = np.full(len(problem.weights), 0.5)
    energies, best = [], None
    for _ in range(max_iterations):
        weights = problem.weights * reweighting
        labels = solve_by_graph_cut(
            unaries,
            prior.convex[distance],
            horizontal=weights[:across].reshape(height, width - 1),
            vertical=weights[across:].reshape(height - 1, width),
        ).labels.ravel()
        energies.append(problem.energy(labels))
        if best is None or energies[-1] < best.energy:
            best = problem.solution(labels)
        if len(energies) > 1 and abs(energies[-2] - energies[-1]) < tolerance:
            break
        reweighting = prior.weight[np.abs(labels[problem.tails] - labels[problem.heads])]
    return GraphCutSolution(best.labels, best.energy, energies)
