"""Graph cuts on the host: the global optimum for convex V, a strong local one for metric V. Arrays as in `exact`.

Minimum cuts are PyMaxflow's, an optional extra that is imported when the first cut is made.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxlib_methods.message_passing.exact import ExactSolution, grid_problem

__all__ = [
    "GraphCutSolution",
    "IshikawaGraph",
    "alpha_expansion",
    "ishikawa_graph",
    "solve_by_graph_cut",
]


class IshikawaGraph(NamedTuple):
    """A min-cut problem whose cuts are labellings. Node i (L − 1) + k − 1 on the source side means x_i ≥ k, k = 1..L−1.

    Attributes:
      source: (nodes,) capacities from the source.
      sink: (nodes,) capacities to the sink.
      tails: (edges,) node indices.
      heads: (edges,) node indices.
      capacities: (edges,) from tail to head.
      constant: energy of a labelling minus the value of its cut.

    Example:
      >>> ishikawa_graph([[[0, 4, 9], [9, 4, 0]]], [[0, 2, 8], [2, 0, 2], [8, 2, 0]]).sink.tolist()
      [0.0, 9.0, 0.0, 0.0]

    Source: Ishikawa (TPAMI 2003) [ishikawa2003exact].
    """

    source: np.ndarray
    sink: np.ndarray
    tails: np.ndarray
    heads: np.ndarray
    capacities: np.ndarray
    constant: float


def ishikawa_graph(
    unaries: ArrayLike, table: ArrayLike, *, horizontal: ArrayLike | None = None, vertical: ArrayLike | None = None
) -> IshikawaGraph:
    """Ishikawa's graph for a multi-label submodular V, whose minimum cut is the minimum energy.

    Column i: source → u_{i:1} with θ_i(0), u_{i:k} → u_{i:k+1} with θ_i(k), u_{i:L−1} → sink with θ_i(L−1), the
    reverse edges practically infinite, so that exactly one of them is cut. With
    φ_{lk} = V(l, k−1) + V(l−1, k) − V(l−1, k−1) − V(l, k), edges u_{i:l} → u_{j:k} of capacity w φ_{lk} for l > k,
    u_{j:k} → u_{i:l} for l < k, and half of it each way for l = k. What V has beyond that, a function of x_i plus
    one of x_j, goes to the unaries; it vanishes for V = g(|λ − μ|), g(0) = 0.

    Args:
      unaries: (H, W, L), L ≥ 2.
      table: V, (L, L) with all φ ≥ 0, in particular any convex function of λ − μ.
      horizontal: (H, W − 1) non-negative weights, None = 1.
      vertical: (H − 1, W) non-negative weights, None = 1.

    Returns:
      An `IshikawaGraph`.

    Raises:
      ValueError: for a V that is not submodular (truncated, or Potts with three labels), negative weights, wrong
        shapes.

    Example:
      >>> graph = ishikawa_graph([[[0, 4, 9], [9, 4, 0]]], [[0, 2, 8], [2, 0, 2], [8, 2, 0]])
      >>> len(graph.source), graph.constant
      (4, 0.0)

    Source: Ishikawa (TPAMI 2003) [ishikawa2003exact]; in this notation Ajanthan, Hartley, Salzmann (TPAMI 2018),
    arXiv:1702.05888 [ajanthan2018memory].
    """
    problem = grid_problem(unaries, table, horizontal, vertical)
    pixels, num_labels = problem.unaries.shape
    if num_labels < 2:
        raise ValueError(f"a cut needs at least two labels, got unaries of shape {(*problem.shape, num_labels)}")
    if problem.weights.size and problem.weights.min() < 0:
        raise ValueError(f"edge weights must be non-negative, got {problem.weights.min()}")
    v = problem.table
    phi = v[1:, :-1] + v[:-1, 1:] - v[:-1, :-1] - v[1:, 1:]  # φ_{l+1, k+1}
    noise = 1e-9 * np.abs(v).max()
    if phi.min() < -noise:
        l, k = np.unravel_index(phi.argmin(), phi.shape)
        raise ValueError(
            f"V is not submodular: V({l + 1},{k}) + V({l},{k + 1}) - V({l},{k}) - V({l + 1},{k + 1}) = {phi.min():g}; "
            "only convex costs are solved by one cut: use iteratively_reweighted_graph_cut for truncated ones"
        )
    phi = np.maximum(phi, 0)
    # What the pairwise edges pay for x: those i -> j pay w φ_lk [x_i >= l, x_j < k], and those j -> i the mirror image.
    at_or_above = np.arange(num_labels)[:, None] >= np.arange(1, num_labels)[None]
    lower, upper = np.tril(phi, -1) + np.diag(np.diag(phi)) / 2, np.triu(phi, 1) + np.diag(np.diag(phi)) / 2
    paid = at_or_above @ lower @ ~at_or_above.T + ~at_or_above @ upper @ at_or_above.T
    rest = v - paid  # = rest_i(λ) + rest_j(μ)
    theta = problem.unaries.copy()
    np.add.at(theta, problem.tails, problem.weights[:, None] * rest[:, 0])
    np.add.at(theta, problem.heads, problem.weights[:, None] * (rest[0] - rest[0, 0]))
    shift = theta.min(1, keepdims=True)
    theta -= shift

    node = np.arange(pixels * (num_labels - 1)).reshape(pixels, num_labels - 1)
    source, sink = np.zeros(node.shape), np.zeros(node.shape)
    source[:, 0], sink[:, -1] = theta[:, 0], theta[:, -1]
    edges = [(node[:, :-1], node[:, 1:], theta[:, 1:-1])]
    for tails, heads, capacity in ((problem.tails, problem.heads, lower), (problem.heads, problem.tails, upper.T)):
        first, second = np.nonzero(capacity)
        cost = problem.weights[:, None] * capacity[first, second]
        edges.append((node[tails][:, first], node[heads][:, second], cost))
    infinite = 1.0 + sum(capacity.sum() for *_, capacity in edges) + source.sum() + sink.sum()
    edges.append((node[:, 1:], node[:, :-1], np.full((pixels, num_labels - 2), infinite)))
    tails, heads, capacities = (np.concatenate([part[k].ravel() for part in edges]) for k in range(3))
    used = capacities > 0
    return IshikawaGraph(source.ravel(), sink.ravel(), tails[used], heads[used], capacities[used], float(shift.sum()))


def _maxflow() -> Any:
    try:
        import maxflow
    except ImportError as error:
        raise ImportError("graph cuts need PyMaxflow: pip install PyMaxflow") from error
    return maxflow


def solve_by_graph_cut(
    unaries: ArrayLike, table: ArrayLike, *, horizontal: ArrayLike | None = None, vertical: ArrayLike | None = None
) -> ExactSolution:
    """The global minimum for a convex (multi-label submodular) V, by one minimum cut of Ishikawa's graph.

    Flows are float64: exact for integers and multiples of a power of two. The graph has H W (L − 1) nodes;
    a linear V adds two edges per node, a quadratic one L; keep H W L below about 10⁶.

    Args:
      unaries: (H, W, L), L ≥ 2.
      table: V, (L, L), e.g. any convex function of |λ − μ|.
      horizontal: (H, W − 1) non-negative weights, None = 1.
      vertical: (H − 1, W) non-negative weights, None = 1.

    Returns:
      An `ExactSolution`.

    Raises:
      ValueError: for a V that is not submodular, negative weights, shapes that do not fit.
      ImportError: without PyMaxflow.

    Example:
      >>> solve_by_graph_cut([[[0, 4, 9], [9, 4, 0]]], [[0, 2, 8], [2, 0, 2], [8, 2, 0]]).energy  # doctest: +SKIP
      6.0

    Source: Ishikawa (TPAMI 2003) [ishikawa2003exact].
    """
    problem = grid_problem(unaries, table, horizontal, vertical)
    graph = ishikawa_graph(unaries, table, horizontal=horizontal, vertical=vertical)
    _, labels = _minimum_cut(graph, len(problem.unaries))
    return problem.solution(labels)


def _minimum_cut(graph: IshikawaGraph, pixels: int) -> tuple[float, np.ndarray]:
    """Maximum flow plus the constant, and the (pixels,) labelling of the minimum cut."""
    flow = _maxflow().Graph[float](len(graph.source), len(graph.tails))
    nodes = flow.add_nodes(len(graph.source))
    flow.add_edges(graph.tails, graph.heads, graph.capacities, np.zeros_like(graph.capacities))
    flow.add_grid_tedges(nodes, graph.source, graph.sink)
    value = flow.maxflow() + graph.constant
    on_source_side = ~flow.get_grid_segments(nodes).reshape(pixels, -1)
    if (np.diff(on_source_side.astype(np.int8), axis=1) > 0).any():
        raise FloatingPointError("a column was cut more than once: the costs span too wide a range for float64 flows")
    return value, on_source_side.sum(1)


class GraphCutSolution(NamedTuple):
    """A labelling, its energy, and how the iterations got there.

    Attributes:
      labels: (H, W) int64.
      energy: E(labels).
      energies: E of every iterate; the last is that of the one before where they ended because nothing changed.

    Example:
      >>> GraphCutSolution(np.zeros((1, 1), int), 2.0, [3.0, 2.0, 2.0]).energies[0]
      3.0
    """

    labels: np.ndarray
    energy: float
    energies: list[float]


def alpha_expansion(
    unaries: ArrayLike,
    table: ArrayLike,
    *,
    horizontal: ArrayLike | None = None,
    vertical: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    max_iterations: int = 100,
) -> GraphCutSolution:
    """A local minimum for a metric V (Potts, truncated linear): no switch of any set of pixels to one label lowers it.

    For each label α in turn, one binary cut decides which pixels change to α. If θ ≥ 0, the energy is at most
    2 max V / min_{λ≠μ} V times the least one.

    Args:
      unaries: (H, W, L).
      table: V, (L, L), with V(λ, μ) + V(α, α) <= V(λ, α) + V(α, μ).
      horizontal: (H, W − 1) non-negative weights, None = 1.
      vertical: (H − 1, W) non-negative weights, None = 1.
      labels: (H, W) to start from; None: the best label of every pixel alone.
      max_iterations: number of rounds over all labels at most.

    Returns:
      A `GraphCutSolution`, with the energy after every round.

    Raises:
      ValueError: for a V that is not a metric, negative weights, wrong shapes.
      ImportError: without PyMaxflow.

    Example:
      >>> alpha_expansion([[[0, 2], [1, 0], [3, 0]]], [[0, 1], [1, 0]]).labels.tolist()  # doctest: +SKIP
      [[0, 1, 1]]

    Source: Boykov, Veksler, Zabih (TPAMI 2001) [boykov2001fast].
    """
    problem = grid_problem(unaries, table, horizontal, vertical)
    v, tails, heads = problem.table, problem.tails, problem.heads
    if problem.weights.size and problem.weights.min() < 0:
        raise ValueError(f"edge weights must be non-negative, got {problem.weights.min()}")
    same = np.diag(v)
    if (v[:, :, None] + same > v[:, None, :] + v.T[None] + 1e-9 * np.abs(v).max()).any():  # [λ, μ, α]
        raise ValueError("V is not a metric: some V(l, m) > V(l, a) + V(a, m) - V(a, a); expansion moves need one")
    x = problem.unaries.argmin(1) if labels is None else np.array(labels, np.int64).ravel()
    if x.shape != (len(problem.unaries),):
        raise ValueError(f"labels must be {problem.shape}, got shape {np.shape(labels)}")
    pixels = np.arange(len(x))
    energies = [problem.energy(x)]
    for _ in range(max_iterations):
        for alpha in range(len(v)):
            # b = 1 (source side) takes α: E_00 + (E_10 − E_00) b_i + (E_11 − E_10) b_j + c (1 − b_i) b_j.
            e00, e01 = v[x[tails], x[heads]], v[x[tails], alpha]
            e10, e11 = v[alpha, x[heads]], v[alpha, alpha]
            change = problem.unaries[:, alpha] - problem.unaries[pixels, x]
            np.add.at(change, tails, problem.weights * (e10 - e00))
            np.add.at(change, heads, problem.weights * (e11 - e10))
            capacity = np.maximum(problem.weights * (e01 + e10 - e00 - e11), 0)
            flow = _maxflow().Graph[float](len(x), len(tails))
            nodes = flow.add_nodes(len(x))
            flow.add_edges(heads, tails, capacity, np.zeros_like(capacity))
            flow.add_grid_tedges(nodes, np.maximum(-change, 0), np.maximum(change, 0))
            flow.maxflow()
            moved = np.where(flow.get_grid_segments(nodes), x, alpha)
            if problem.energy(moved) < problem.energy(x):
                x = moved
        energies.append(problem.energy(x))
        if energies[-1] == energies[-2]:
            break
    return GraphCutSolution(*problem.solution(x), energies)
