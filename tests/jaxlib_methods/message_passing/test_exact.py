"""The oracles against one another: enumeration, dynamic programming, Ishikawa's cut, IRGC; and the toy instance."""

import itertools
import sys

import numpy as np
import pytest

from jaxlib_methods.message_passing import exact as ex, graph_cuts as cuts, reweighted_cuts as reweighted

DISTANCE = np.abs(np.subtract.outer(np.arange(4), np.arange(4))).astype(float)
CONVEX = {
    "linear": DISTANCE,
    "quadratic": DISTANCE**2,
    "huber": np.where(DISTANCE <= 1, DISTANCE**2, 2 * DISTANCE - 1),
    "steps": np.maximum(0, DISTANCE - 1),  # flat at first
    "asymmetric": np.where(np.subtract.outer(np.arange(4), np.arange(4)) > 0, 3 * DISTANCE, DISTANCE**2),
    "not Toeplitz": DISTANCE**2 + np.arange(4.0)[:, None] ** 3 - np.sin(np.arange(4.0))[None],
}


def _instance(seed, height, width, num_labels=4):
    """Integer unaries and integer edge weights, some of them zero."""
    rng = np.random.default_rng(seed)
    unaries = rng.integers(0, 12, (height, width, num_labels))
    weights = {
        "horizontal": rng.integers(0, 4, (height, width - 1)),
        "vertical": rng.integers(0, 4, (height - 1, width)),
    }
    return unaries, weights


def _plain_energy(unaries, table, labels, horizontal, vertical):
    """The energy of the module's docstring, with loops."""
    height, width, _ = np.shape(unaries)
    total = sum(unaries[r][c][labels[r, c]] for r in range(height) for c in range(width))
    for r, c in itertools.product(range(height), range(width)):
        if c + 1 < width:
            total += horizontal[r, c] * table[labels[r, c], labels[r, c + 1]]
        if r + 1 < height:
            total += vertical[r, c] * table[labels[r, c], labels[r + 1, c]]
    return total


@pytest.fixture(scope="module")
def maxflow():
    return pytest.importorskip("maxflow")


@pytest.fixture(scope="module")
def toy(shared_data):
    """Unaries (10, 10, 5) and weights of the toy instance of tajanthan/memf."""
    folder = shared_data / "toy_mrf"
    unaries = np.zeros((100, 5))
    for pixel, label, cost in np.loadtxt(folder / "toy_unary_10_10_5.txt", delimiter=",", dtype=int):
        unaries[pixel, label] = cost
    horizontal, vertical = np.zeros((10, 9)), np.zeros((9, 10))
    for i, j, weight in np.loadtxt(folder / "toy_binary_4_10_10.txt", delimiter=",", dtype=int):
        (horizontal if j == i + 1 else vertical)[i // 10, i % 10] = weight
    assert (unaries.sum(), horizontal.sum() + vertical.sum()) == (2478, 547)
    return unaries.reshape(10, 10, 5), {"horizontal": horizontal, "vertical": vertical}


@pytest.mark.contract
def test_enumeration_equals_the_energy_with_loops():
    unaries, weights = _instance(0, 2, 2, 3)
    table = np.random.default_rng(1).normal(size=(3, 3))
    energies = ex.enumerate_energies(unaries, table, **weights)
    for x in itertools.product(range(3), repeat=4):
        expected = _plain_energy(unaries, table, np.reshape(x, (2, 2)), **weights)
        assert energies[x] == pytest.approx(expected, abs=1e-12)
    solution = ex.solve_by_enumeration(unaries, table, **weights)
    assert solution.energy == pytest.approx(energies.min())
    assert solution.energy == pytest.approx(_plain_energy(unaries, table, solution.labels, **weights))


@pytest.mark.parametrize("seed", range(5))
def test_chain_dynamic_programming_equals_enumeration(seed):
    rng = np.random.default_rng(seed)
    unaries, weights, table = rng.normal(size=(6, 4)), rng.normal(size=5), rng.normal(size=(4, 4))
    energies = ex.enumerate_energies(unaries[None], table, horizontal=weights[None])
    solution = ex.solve_chain(unaries, table, weights=weights)
    assert solution.energy == pytest.approx(energies.min())
    assert energies[tuple(solution.labels)] == pytest.approx(energies.min())
    marginals = ex.chain_min_marginals(unaries, table, weights=weights)
    for i in range(6):
        expected = energies.min(tuple(k for k in range(6) if k != i))
        np.testing.assert_allclose(marginals[i], expected, atol=1e-12)


def test_chain_worked_by_hand():
    unaries, potts = [[0, 2], [1, 0], [3, 0]], [[0, 1], [1, 0]]
    solution = ex.solve_chain(unaries, potts)
    assert (solution.labels.tolist(), solution.energy) == ([0, 1, 1], 1.0)
    # Beliefs [1,2],[2,1],[3,0], worked by hand, each with its minimum moved to the optimum.
    assert ex.chain_min_marginals(unaries, potts).tolist() == [[1, 2], [2, 1], [4, 1]]
    assert ex.solve_chain([[5.0, 3.0]], potts) == (np.array([1]), 3.0)


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize(("height", "width"), [(2, 3), (3, 3), (1, 4)])
def test_graph_cut_equals_enumeration_for_every_convex_cost(maxflow, name, height, width):
    for seed in range(4):
        unaries, weights = _instance(seed, height, width)
        solution = cuts.solve_by_graph_cut(unaries - 5, CONVEX[name], **weights)  # negative unaries too
        best = ex.solve_by_enumeration(unaries - 5, CONVEX[name], **weights)
        assert solution.energy == pytest.approx(best.energy, abs=1e-9)


@pytest.mark.parametrize("name", CONVEX)
def test_maximum_flow_is_the_minimum_energy_and_a_cut_the_energy_of_its_labelling(maxflow, name):
    unaries, weights = _instance(7, 2, 3)
    table = CONVEX[name]
    graph = cuts.ishikawa_graph(unaries, table, **weights)
    flow, _ = cuts._minimum_cut(graph, 6)
    assert flow == pytest.approx(ex.solve_by_enumeration(unaries, table, **weights).energy)
    rng = np.random.default_rng(0)
    for labels in rng.integers(0, 4, (20, 2, 3)):
        source_side = (labels.reshape(6, 1) >= np.arange(1, 4)[None]).ravel()
        cut = graph.source[~source_side].sum() + graph.sink[source_side].sum()
        cut += graph.capacities[source_side[graph.tails] & ~source_side[graph.heads]].sum()
        assert cut + graph.constant == pytest.approx(_plain_energy(unaries, table, labels, **weights))


def test_two_pixels_worked_by_hand(maxflow):
    unaries, table = [[[0, 4, 9], [9, 4, 0]]], [[0, 2, 8], [2, 0, 2], [8, 2, 0]]
    graph = cuts.ishikawa_graph(unaries, table)
    capacity = dict(zip(zip(graph.tails.tolist(), graph.heads.tolist(), strict=True), graph.capacities, strict=True))
    first, second = (0, 1), (2, 3)  # u_{i:1}, u_{i:2} of either pixel
    for a, b in ((first, second), (second, first)):
        assert [capacity[a[0], b[0]], capacity[a[1], b[1]], capacity[a[1], b[0]]] == [2, 2, 4]
        assert (a[0], b[1]) not in capacity
    assert graph.constant == 0
    assert cuts._minimum_cut(graph, 2)[0] == 6
    solution = cuts.solve_by_graph_cut(unaries, table)
    assert solution.energy == 6
    assert solution.labels.tolist() in ([[0, 1]], [[1, 2]])


def test_toy_instance_is_solved_to_446(maxflow, toy):
    unaries, weights = toy
    distance = np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    for table in (distance, distance**2):
        solution = cuts.solve_by_graph_cut(unaries, table, **weights)
        assert solution.energy == 446
        assert np.bincount(solution.labels.ravel(), minlength=5).tolist() == [22, 65, 13, 0, 0]
    prior = reweighted.non_convex_prior("truncated_quadratic", 5, truncation=2)
    solution = reweighted.iteratively_reweighted_graph_cut(unaries, prior, **weights)
    assert solution.energies == [472, 446, 446]
    assert solution.energy == 446
    assert np.bincount(solution.labels.ravel(), minlength=5).tolist() == [22, 65, 13, 0, 0]


@pytest.mark.parametrize("truncation", [1, 2, 3])
@pytest.mark.parametrize("name", ["truncated_linear", "truncated_quadratic", "cauchy"])
def test_irgc_never_increases_the_energy_and_never_beats_enumeration(maxflow, name, truncation):
    prior = reweighted.non_convex_prior(name, 4, truncation=truncation)
    table = prior.cost[DISTANCE.astype(int)]
    for seed in range(4):
        unaries, weights = _instance(seed, 3, 3)
        solution = reweighted.iteratively_reweighted_graph_cut(unaries, prior, **weights)
        assert (np.diff(solution.energies) <= 1e-9).all()
        assert solution.energy == pytest.approx(_plain_energy(unaries, table, solution.labels, **weights))
        assert solution.energy >= ex.solve_by_enumeration(unaries, table, **weights).energy - 1e-9


@pytest.mark.parametrize("truncation", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["truncated_linear", "truncated_quadratic", "cauchy"])
def test_irgc_weights_are_supergradients_and_the_convex_part_is_convex(name, truncation):
    prior = reweighted.non_convex_prior(name, 9, truncation=truncation)
    assert (np.diff(prior.convex, 2) >= -1e-12).all()
    majorant = prior.cost[:, None] + prior.weight[:, None] * (prior.convex[None] - prior.convex[:, None])
    assert (majorant >= prior.cost[None] - 1e-12).all()


def test_irgc_on_a_cost_that_is_not_truncated_is_the_global_optimum(maxflow):
    unaries, weights = _instance(3, 3, 3)
    prior = reweighted.non_convex_prior("truncated_linear", 4, truncation=4)
    solution = reweighted.iteratively_reweighted_graph_cut(unaries, prior, **weights)
    assert (prior.weight == 1).all()
    assert solution.energies[1] == ex.solve_by_enumeration(unaries, DISTANCE, **weights).energy == solution.energy


METRICS = {"Potts": np.minimum(DISTANCE, 1), "truncated linear": np.minimum(DISTANCE, 2), "linear": DISTANCE}


@pytest.mark.parametrize("name", METRICS)
def test_alpha_expansion_keeps_its_guarantee(maxflow, name):
    table = METRICS[name]
    for seed in range(5):
        unaries, weights = _instance(seed, 3, 3)
        solution = cuts.alpha_expansion(unaries, table, **weights)
        best = ex.solve_by_enumeration(unaries, table, **weights).energy
        assert (np.diff(solution.energies) <= 0).all()
        assert best <= solution.energy <= 2 * table.max() / table[table > 0].min() * best
        assert solution.energy == pytest.approx(_plain_energy(unaries, table, solution.labels, **weights))
        # No expansion of any set of pixels lowers the energy: all 2^9 sets, all labels.
        energies = ex.enumerate_energies(unaries, table, **weights)
        sets = np.array(list(itertools.product([False, True], repeat=9)))
        for alpha in range(4):
            moved = np.where(sets, alpha, solution.labels.ravel())
            assert energies[tuple(moved.T)].min() >= solution.energy - 1e-9


def test_alpha_expansion_is_exact_for_two_labels_and_starts_where_asked(maxflow):
    for seed in range(5):
        unaries, weights = _instance(seed, 3, 3, 2)
        best = ex.solve_by_enumeration(unaries, 1 - np.eye(2), **weights)
        solution = cuts.alpha_expansion(unaries, 1 - np.eye(2), labels=np.ones((3, 3), int), **weights)
        assert solution.energy == best.energy
        assert solution.energies[0] == unaries[..., 1].sum()
    with pytest.raises(ValueError, match="V is not a metric"):
        cuts.alpha_expansion(np.zeros((2, 2, 4)), DISTANCE**2)
    with pytest.raises(ValueError, match=r"labels must be \(2, 2\)"):
        cuts.alpha_expansion(np.zeros((2, 2, 4)), DISTANCE, labels=np.zeros((3, 2), int))


def test_graph_cut_refuses_what_is_not_submodular():
    unaries = np.zeros((2, 2, 3))
    with pytest.raises(ValueError, match=r"V is not submodular: .* iteratively_reweighted_graph_cut"):
        cuts.ishikawa_graph(unaries, 1.0 - np.eye(3))  # Potts with three labels
    with pytest.raises(ValueError, match="weights must be non-negative, got -1"):
        cuts.ishikawa_graph(unaries, DISTANCE[:3, :3], horizontal=[[-1], [0]])
    with pytest.raises(ValueError, match="at least two labels"):
        cuts.ishikawa_graph(np.zeros((2, 2, 1)), [[0.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ex.solve_by_enumeration(np.zeros((2, 3)), np.zeros((3, 3))), r"unaries must be \(H, W, L\)"),
        (lambda: ex.solve_by_enumeration(np.zeros((1, 2, 3)), np.zeros((2, 2))), r"V must be \(3, 3\)"),
        (
            lambda: ex.solve_by_enumeration(np.zeros((1, 2, 3)), np.zeros((3, 3)), horizontal=np.zeros(2)),
            r"horizontal edge weights must have shape \(1, 1\)",
        ),
        (
            lambda: ex.solve_by_enumeration(np.zeros((3, 2, 3)), np.zeros((3, 3)), vertical=np.zeros((3, 2))),
            r"vertical edge weights must have shape \(2, 2\)",
        ),
        (lambda: ex.solve_by_enumeration(np.full((1, 2, 2), np.nan), np.zeros((2, 2))), "unaries must be finite"),
        (lambda: ex.enumerate_energies(np.zeros((5, 5, 2)), np.zeros((2, 2))), "2 labels on 25 pixels"),
        (lambda: ex.solve_chain(np.zeros((1, 2, 2)), np.zeros((2, 2))), r"chain must be \(N, L\)"),
        (
            lambda: ex.solve_chain(np.zeros((3, 2)), np.zeros((2, 2)), weights=[1.0]),
            "weights of a chain must be",
        ),
        (lambda: reweighted.non_convex_prior("potts", 3, truncation=1), "name must be .* got 'potts'"),
        (
            lambda: reweighted.non_convex_prior("truncated_linear", 3, truncation=1.5),
            "truncation must be positive, and whole",
        ),
        (
            lambda: reweighted.iteratively_reweighted_graph_cut(
                np.zeros((1, 2, 3)), reweighted.non_convex_prior("cauchy", 4, truncation=2.5)
            ),
            "the prior is for 4 labels, the unaries have 3",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_pymaxflow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "maxflow", None)
    with pytest.raises(ImportError, match="pip install PyMaxflow"):
        cuts.solve_by_graph_cut(np.zeros((1, 2, 2)), np.zeros((2, 2)))
