"""Exact and graph-cut solvers for small grid problems, in NumPy on the host: oracles for the message-passing solvers.

All take the same dense arrays: unaries θ (H, W, L), one table V (L, L) with V[λ, μ] for λ at the left or upper pixel,
and edge weights w, horizontal (H, W − 1) and vertical (H − 1, W), None for 1. The energy is

    E(x) = Σ_i θ_i(x_i) + Σ_(ij) w_ij V(x_i, x_j),   (ij) over right and down neighbours.

The graph cuts need PyMaxflow, an optional extra.

BibTeX:

    @article{ishikawa2003exact,
      author  = {Ishikawa, Hiroshi},
      title   = {Exact Optimization for {Markov} Random Fields with Convex Priors},
      journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
      volume  = {25},
      number  = {10},
      year    = {2003},
    }
    @inproceedings{ajanthan2015iteratively,
      author    = {Ajanthan, Thalaiyasingam and Hartley, Richard and Salzmann, Mathieu and Li, Hongdong},
      title     = {Iteratively Reweighted Graph Cut for Multi-label {MRFs} with Non-convex Priors},
      booktitle = {Conference on Computer Vision and Pattern Recognition},
      year      = {2015},
    }
    @article{ajanthan2018memory,
      author  = {Ajanthan, Thalaiyasingam and Hartley, Richard and Salzmann, Mathieu},
      title   = {Memory Efficient Max Flow for Multi-label Submodular {MRFs}},
      journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
      year    = {2018},
    }
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

MAX_LABELLINGS = 2**24


class ExactSolution(NamedTuple):
    """A labelling and its energy.

    Attributes:
      labels: (H, W) or (N,) int64.
      energy: E(labels), summed in float64.

    Example:
      >>> ExactSolution(np.zeros((1, 2), int), 3.0).energy
      3.0

    Source: this library.
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


def _problem(unaries: Any, table: Any, horizontal: Any, vertical: Any) -> _Problem:
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


# --- enumeration


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

    Source: this library.
    """
    problem = _problem(unaries, table, horizontal, vertical)
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

    Source: this library.
    """
    problem = _problem(unaries, table, horizontal, vertical)
    energies = enumerate_energies(unaries, table, horizontal=horizontal, vertical=vertical)
    return problem.solution(np.array(np.unravel_index(energies.argmin(), energies.shape)))


# --- chains


def _chain(unaries: Any, table: Any, weights: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    unaries = np.asarray(unaries)
    if unaries.ndim != 2:
        raise ValueError(f"unaries of a chain must be (N, L), got shape {unaries.shape}")
    weights = None if weights is None else np.asarray(weights)
    if weights is not None and weights.shape != (len(unaries) - 1,):
        raise ValueError(f"weights of a chain must be {(len(unaries) - 1,)}, got shape {weights.shape}")
    problem = _problem(unaries[None], table, None if weights is None else weights[None], None)
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


# --- graph cuts


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
    problem = _problem(unaries, table, horizontal, vertical)
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
    problem = _problem(unaries, table, horizontal, vertical)
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


# --- iteratively reweighted graph cut


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


class IRGCSolution(NamedTuple):
    """A labelling, its energy, and how the iterations got there.

    Attributes:
      labels: (H, W) int64.
      energy: E(labels).
      energies: E of every iterate, the last one repeated where the iterations ended because nothing changed.

    Example:
      >>> IRGCSolution(np.zeros((1, 1), int), 2.0, [3.0, 2.0, 2.0]).energies[0]
      3.0

    Source: Ajanthan, Hartley, Salzmann, Li (CVPR 2015), arXiv:1411.6340 [ajanthan2015iteratively].
    """

    labels: np.ndarray
    energy: float
    energies: list[float]


def iteratively_reweighted_graph_cut(
    unaries: ArrayLike,
    prior: NonConvexPrior,
    *,
    horizontal: ArrayLike | None = None,
    vertical: ArrayLike | None = None,
    max_iterations: int = 100,
    tolerance: float | int = 1e-5,
) -> IRGCSolution:
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
      An `IRGCSolution`, the best labelling met.

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
    problem = _problem(unaries, prior.cost[distance], horizontal, vertical)
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
    return IRGCSolution(best.labels, best.energy, energies)
