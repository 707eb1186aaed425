"""NuMuon: the worked examples and invariants of its step, its schedule, and the transformation against a NumPy loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from jaxlib_methods import trees
from jaxlib_methods.optimizers import BlockKrylovConfig, numuon, scale_by_numuon
from jaxlib_methods.optimizers.muon import AdamConfig, NuMuonState
from jaxlib_methods.optimizers.nuclear_norm import NewtonSchulzConfig, newton_schulz, nuclear_norm_lmo
from jaxlib_methods.optimizers.schedules import cosine_rank_schedule, piecewise_rank_schedule

KEY = jax.random.key(0)
lmo = functools.partial(nuclear_norm_lmo, key=KEY)


@pytest.fixture
def standard_promotion():
    """optax's AdamW raises under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def exact_step(M, tau):
    """D from NumPy's SVD, dyad by dyad."""
    U, s, Vt = np.linalg.svd(np.asarray(M, np.float64), full_matrices=False)
    return sum(np.clip(tau - i, 0, 1) * np.outer(U[:, i], Vt[i]) for i in range(len(s)))


# ------------------------------------------------------------------------------------------------- the step


@pytest.mark.contract
def test_worked_2x2():
    M = jnp.array([[3.0, 0.0], [4.0, 5.0]])
    first = np.array([[1, 1], [3, 3]]) / np.sqrt(20)
    both = np.array([[4, -2], [2, 4]]) / np.sqrt(20)
    np.testing.assert_allclose(lmo(M, 1), first, atol=1e-6)
    np.testing.assert_allclose(lmo(M, 2), both, atol=1e-6)
    assert float(jnp.sum(M * lmo(M, 1))) == pytest.approx(6.7082, abs=1e-4)


def test_worked_diagonal_with_a_fractional_budget():
    M = jnp.diag(jnp.array([10.0, 5.0, 2.0, 1.0]))
    np.testing.assert_allclose(lmo(M, 2), np.diag([1, 1, 0, 0]), atol=1e-6)
    assert float(jnp.sum(M * lmo(M, 2))) == pytest.approx(15, abs=1e-5)
    np.testing.assert_allclose(lmo(M, 2.5), np.diag([1, 1, 0.5, 0]), atol=1e-6)


@pytest.mark.parametrize("tau", [1, 3, 8, 11.25])
def test_partial_isometry_invariants(tau, x64):
    M = jnp.asarray(gaussian(18, 12))
    D = np.asarray(lmo(M, tau, oversampling=12))
    singular = np.linalg.svd(D, compute_uv=False)
    assert singular[0] == pytest.approx(1, abs=1e-12) and singular.sum() == pytest.approx(tau, abs=1e-11)
    assert np.linalg.matrix_rank(D, tol=1e-9) == np.ceil(tau)
    if tau == int(tau):
        assert np.sum(D**2) == pytest.approx(tau, abs=1e-11)
        np.testing.assert_allclose(D @ D.T @ D, D, atol=1e-12)
    np.testing.assert_allclose(D, exact_step(M, tau), atol=1e-10)
    np.testing.assert_allclose(lmo(7.5 * M, tau, oversampling=12), D, atol=1e-10)
    np.testing.assert_allclose(lmo(M.T, tau, oversampling=12), D.T, atol=1e-10)
    Q1, Q2 = (np.linalg.qr(gaussian(n, n, seed=n))[0] for n in (18, 12))
    np.testing.assert_allclose(lmo(Q1 @ M @ Q2, tau, oversampling=12), Q1 @ D @ Q2, atol=1e-10)


def test_no_feasible_step_is_better(x64):
    """<M, D> is the support function: random points of the feasible set stay below it."""
    M, tau = gaussian(9, 7), 2.5
    best = float(jnp.sum(M * lmo(jnp.asarray(M), tau)))
    sigma = np.linalg.svd(M, compute_uv=False)
    assert best == pytest.approx(sigma[0] + sigma[1] + 0.5 * sigma[2], abs=1e-11)
    for seed in range(200):
        U, s, Vt = np.linalg.svd(M + gaussian(9, 7, seed=seed), full_matrices=False)
        s = np.minimum(s / s.sum() * tau, 1)
        assert np.sum(M * ((U * s) @ Vt)) <= best


def test_full_budget_is_the_polar_factor(x64):
    M = gaussian(10, 6)
    U, _, Vt = np.linalg.svd(M, full_matrices=False)
    np.testing.assert_allclose(lmo(jnp.asarray(M), 6), U @ Vt, atol=1e-12)


@pytest.mark.parametrize("tau", [-1, 0, 6.5, float("nan")])
def test_budgets_out_of_range_are_refused(tau):
    with pytest.raises(ValueError, match=r"budget must be in \(0, min\(rows, columns\)\] = \(0, 6\], got"):
        lmo(jnp.ones((10, 6)), tau)


# -------------------------------------------------------------------------------------------- Newton-Schulz


def test_newton_schulz_scalar_trace(x64):
    one = lambda x, steps: float(
        newton_schulz(jnp.array([[x, 0.0], [0.0, np.sqrt(1 - x * x)]]), NewtonSchulzConfig(num_steps=steps))[0, 0]
    )
    trace = [one(0.5, steps) for steps in range(1, 6)]
    np.testing.assert_allclose(trace, [1.18886, 0.89620, 0.82437, 0.93789, 0.76544], atol=2e-5)
    assert one(1.0, 1) == pytest.approx(0.701, abs=1e-6)
    assert one(1e-7, 5) / 1e-7 == pytest.approx(484.88, rel=1e-3)


def test_newton_schulz_of_identity_and_of_a_diagonal(x64):
    np.testing.assert_allclose(newton_schulz(jnp.eye(4), NewtonSchulzConfig()), 0.76544 * np.eye(4), atol=1e-5)
    X = newton_schulz(jnp.diag(jnp.array([10.0, 5.0, 2.0, 1.0])), NewtonSchulzConfig())
    np.testing.assert_allclose(jnp.diagonal(X), [0.7835, 1.1306, 1.0259, 0.7350], atol=5e-5)


def test_newton_schulz_lands_in_its_interval(x64):
    inputs = np.geomspace(0.002, 0.3, 64)
    inputs = np.append(inputs, np.sqrt(1 - np.sum(inputs**2)))
    singular = np.diagonal(newton_schulz(jnp.asarray(np.diag(inputs)), NewtonSchulzConfig()))
    assert singular.min() >= 0.68 and singular.max() <= 1.205


# ------------------------------------------------------------------------------------------------ schedules


def test_cosine_schedule_and_the_ranks_it_gives():
    r = cosine_rank_schedule(1000, 1.0, 0.25, hold=0.1, until=0.9)
    steps = (0, 100, 300, 500, 700, 900, 1000)
    np.testing.assert_allclose([r(t) for t in steps], [1, 1, 0.89017, 0.625, 0.35983, 0.25, 0.25], atol=5e-6)
    from jaxlib_methods.optimizers.schedules import dyads

    assert [int(dyads(r(t), 768)) for t in steps] == [768, 768, 684, 480, 277, 192, 192]
    assert dyads(0.1, 10) == 1 and dyads(0.001, 10) == 1 and dyads(1.0, 10) == 10 and dyads(0.101, 10) == 2


def test_piecewise_schedule():
    r = piecewise_rank_schedule([3, 5], [1.0, 0.5, 0.2])
    np.testing.assert_allclose([r(t) for t in range(7)], [1, 1, 1, 0.5, 0.5, 0.2, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cosine_rank_schedule(0), "total_steps must be at least 1, got 0"),
        (lambda: cosine_rank_schedule(10, end=0.0), r"end must lie in \(0, 1\].*got 0.0"),
        (lambda: cosine_rank_schedule(10, start=1.5), r"start must lie in \(0, 1\].*got 1.5"),
        (lambda: cosine_rank_schedule(10, hold=0.9, until=0.5), "hold < until"),
        (lambda: piecewise_rank_schedule([3], [0.5]), "one more than boundaries"),
        (lambda: piecewise_rank_schedule([3, 3], [0.5, 0.4, 0.3]), "must be positive and increase"),
        (lambda: piecewise_rank_schedule([3], [0.5, 2.0]), r"values\[1\] must lie in"),
        (lambda: scale_by_numuon(0.0, key=KEY), r"rank_schedule must lie in \(0, 1\]"),
        (lambda: scale_by_numuon(1.2, key=KEY), r"rank_schedule must lie in \(0, 1\]"),
        (lambda: scale_by_numuon(0.5, key=KEY, decomposition=BlockKrylovConfig(rank_buckets=(0.5,))), "its own bucket"),
        (
            lambda: scale_by_numuon(
                cosine_rank_schedule(9), key=KEY, decomposition=BlockKrylovConfig(rank_buckets=(0.5, 0.25))
            ),
            "increasing",
        ),
        (
            lambda: scale_by_numuon(cosine_rank_schedule(9), key=KEY, decomposition=BlockKrylovConfig(rank_buckets=())),
            "at least one",
        ),
        (lambda: scale_by_numuon(0.5, key=KEY, decomposition=BlockKrylovConfig(num_iterations=0)), "num_iterations"),
        (lambda: numuon(0.1, 0.5, key=KEY, shape_scaling="mup"), "shape_scaling must be one of"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------ the transformation

SHAPES = {"a": (12, 8), "b": (8, 12), "c": (8, 8), "d": (12, 8)}


def tree(seed=0, shapes=SHAPES, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def run(tx, grads, params=None):
    state, history = tx.init(grads[0] if params is None else params), []
    update = jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        history.append(updates)
    return history, state


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_those_of_a_numpy_loop_along_an_annealing_rank(nesterov, x64):
    schedule = piecewise_rank_schedule([2, 4], [0.75, 0.5, 0.25])
    grads = [tree(seed, dtype=jnp.float64) for seed in range(6)]
    rule = scale_by_numuon(
        schedule,
        momentum=0.9,
        key=KEY,
        decomposition=BlockKrylovConfig(oversampling=12, rank_buckets=(0.25, 0.75)),
        nesterov=nesterov,
    )
    history, state = run(rule, grads)
    M = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for t, (g, updates) in enumerate(zip(grads, history, strict=True)):
        k = [6, 6, 4, 4, 2, 2][t]  # of 8
        for name in SHAPES:
            M[name] = 0.9 * M[name] + 0.1 * np.asarray(g[name])
            X = 0.9 * M[name] + 0.1 * np.asarray(g[name]) if nesterov else M[name]
            np.testing.assert_allclose(updates[name], exact_step(X, k), atol=1e-8)
    jax.tree.map(lambda m, expected: np.testing.assert_allclose(m, expected, atol=1e-12), state.mu, M)
    assert isinstance(state, NuMuonState) and int(state.count) == 6


def test_ranks_in_the_inexact_regime_are_exact_counts_whatever_the_bucket():
    shapes = {"a": (64, 48), "b": (48, 64)}
    schedule = piecewise_rank_schedule([1, 2, 3], [0.05, 0.1, 0.2, 0.24])
    rule = scale_by_numuon(
        schedule, key=KEY, decomposition=BlockKrylovConfig(oversampling=2, rank_buckets=(0.125, 0.25))
    )
    history, state = run(rule, [tree(seed, shapes) for seed in range(4)])
    for updates, k in zip(history, [3, 5, 10, 12], strict=True):
        for D in updates.values():
            singular = np.linalg.svd(np.asarray(D, np.float64), compute_uv=False)
            np.testing.assert_allclose(singular, np.arange(48) < k, atol=1e-5)
    (basis,) = state.bases
    assert basis.shape == (2, 48, 12)


def test_fractional_budgets_follow_the_schedule():
    rule = scale_by_numuon(
        piecewise_rank_schedule([1], [0.3, 0.45]),
        key=KEY,
        decomposition=BlockKrylovConfig(rank_buckets=(0.5,)),
        fractional=True,
    )
    for updates, tau in zip(run(rule, [tree(0), tree(1)])[0], [2.4, 3.6], strict=True):
        for D in updates.values():
            singular = np.linalg.svd(np.asarray(D, np.float64), compute_uv=False)
            np.testing.assert_allclose(singular, np.clip(tau - np.arange(8), 0, 1), atol=1e-5)


def test_warm_start_gains_on_a_constant_gradient():
    g = {"W": jnp.asarray(gaussian(96, 64), jnp.float32)}
    best = np.linalg.svd(np.asarray(g["W"], np.float64), compute_uv=False)[:7].sum()
    reached = lambda history: [float(jnp.sum(g["W"] * updates["W"])) / best for updates in history]
    warm = reached(run(scale_by_numuon(0.1, key=KEY, decomposition=BlockKrylovConfig(oversampling=2)), [g] * 8)[0])
    cold = reached(
        run(scale_by_numuon(0.1, key=KEY, decomposition=BlockKrylovConfig(oversampling=2, warm_start=False)), [g] * 8)[
            0
        ]
    )
    assert warm[-1] > 0.999 > max(cold) and warm[0] < 0.99


def test_a_share_of_one_is_optaxs_muon(standard_promotion):
    grads, params = [tree(seed) for seed in range(4)], tree(9)
    ours, _ = run(numuon(0.1, 1.0, key=KEY, weight_decay=0.3), grads, params)
    theirs, _ = run(optax.contrib.muon(0.1, weight_decay=0.3, nesterov=False), grads, params)
    for a, b in zip(ours, theirs, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def test_dimension_numbers_batches_and_reductions():
    shapes = {"heads": (6, 2, 5), "experts": (3, 7, 4), "plain": (4, 7)}
    spec = {
        "heads": MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2)),
        "experts": MuonDimensionNumbers(reduction_axis=2, output_axis=-2),
        "plain": MuonDimensionNumbers(),
    }
    g = tree(0, shapes)
    (updates,), state = run(scale_by_numuon(0.5, key=KEY, weight_dimension_numbers=spec), [g])
    step = lambda M, k: exact_step(M, k)
    np.testing.assert_allclose(updates["heads"].reshape(6, 10), step(g["heads"].reshape(6, 10), 3), atol=1e-4)
    for expert in range(3):
        np.testing.assert_allclose(updates["experts"][expert].T, step(g["experts"][expert].T, 2), atol=1e-4)
    np.testing.assert_allclose(updates["plain"], step(g["plain"], 2), atol=1e-4)
    assert updates["experts"].shape == (3, 7, 4) and len(state.bases) == 2


def test_leaves_that_are_not_matrices_are_refused_by_name():
    rule = scale_by_numuon(0.5, key=KEY)
    with pytest.raises(ValueError, match=r"\(3,\) at 'mlp/bias'.*AdamW"):
        rule.init({"mlp": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}})
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) at 'qkv'.*MuonDimensionNumbers"):
        rule.init({"qkv": jnp.ones((2, 3, 4))})
    bad = scale_by_numuon(0.5, key=KEY, weight_dimension_numbers=MuonDimensionNumbers(0, 2))
    with pytest.raises(ValueError, match="does not name different axes"):
        bad.init({"W": jnp.ones((3, 4))})
    with pytest.raises(ValueError, match="axis_name must be one of the mesh's axes"):
        scale_by_numuon(0.5, key=KEY, mesh=jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)))


@pytest.mark.parametrize("zero", [True, False])
def test_zero_and_rank_deficient_momenta_give_finite_steps(zero):
    g = {"W": jnp.zeros((96, 64)) if zero else jnp.ones((96, 64)), "good": jnp.asarray(gaussian(96, 64), jnp.float32)}
    for r in (0.1, 0.6, 1.0):
        history, _ = run(scale_by_numuon(r, key=KEY), [g, g])
        for updates in history:
            assert all(jnp.isfinite(leaf).all() for leaf in updates.values())
            size = jnp.linalg.norm(updates["W"])
            assert size == 0 if zero else 0.6 < size < 1.3


def test_one_program_for_all_ranks():
    traces = []
    rule = scale_by_numuon(
        cosine_rank_schedule(8), key=KEY, decomposition=BlockKrylovConfig(rank_buckets=(0.25, 0.5, 1.0))
    )

    @jax.jit
    def update(g, state):
        traces.append(None)
        return rule.update(g, state)

    state = rule.init(tree())
    counts = []
    for t in range(9):
        updates, state = update(tree(t), state)
        counts.append(round(float(jnp.sum(jnp.linalg.svd(updates["a"], compute_uv=False)))))
    assert len(traces) == 1
    assert counts[-1] == 2 and counts[4] == 5 and sorted(counts[1:], reverse=True) == counts[1:]


# ------------------------------------------------------------------------------------------------ the optimizer


def test_paths_shapes_weight_decay_and_scalings(standard_promotion):
    params = {
        "embed": {"embedding": jnp.ones((10, 4))},
        "block": {"up": jnp.asarray(gaussian(4, 16), jnp.float32), "bias": jnp.ones(16)},
        "lm_head": jnp.ones((4, 10)),
    }
    grads = jax.tree.map(lambda p: p + 0.5, params)
    adam = optax.adamw(0.01, weight_decay=0.0)
    expected = adam.update(grads, adam.init(params), params)[0]
    for scaling, s in [
        ({}, 2.0),
        ({"shape_scaling": "spectral"}, 2.0),
        ({"shape_scaling": "rms"}, 0.8),
        ({"shape_scaling": 0.3}, 1.2),
    ]:
        tx = numuon(0.1, 0.5, key=KEY, weight_decay=0.2, adam=AdamConfig(learning_rate=0.01), **scaling)
        updates, state = tx.update(grads, tx.init(params), params)
        for path in (("embed", "embedding"), ("block", "bias")):
            np.testing.assert_allclose(updates[path[0]][path[1]], expected[path[0]][path[1]], rtol=1e-6)
        np.testing.assert_allclose(updates["lm_head"], expected["lm_head"], rtol=1e-6)
        W, G = (np.asarray(tree["block"]["up"], np.float64) for tree in (params, grads))
        np.testing.assert_allclose(updates["block"]["up"], -0.1 * (s * exact_step(G, 2) + 0.2 * W), atol=1e-4)
    (found,) = trees.find_states(state, NuMuonState)
    assert [leaf.shape for leaf in jax.tree.leaves(found.mu)] == [(4, 16)]
    down = {"down": jnp.asarray(gaussian(16, 4), jnp.float32)}
    for scaling, s in [("width", 1.0), ("spectral", 0.5)]:
        tx = numuon(1.0, 0.5, key=KEY, weight_decay=0.0, shape_scaling=scaling)
        updates, _ = tx.update(down, tx.init(down), down)
        np.testing.assert_allclose(updates["down"], -s * exact_step(down["down"], 2), atol=1e-4)


def test_dimension_numbers_and_paths_choose_the_optimizer(standard_promotion):
    params = {"qkv": jnp.ones((4, 2, 6)), "proj": jnp.ones((4, 4)), "tail": jnp.ones((4, 4))}
    spec = {"qkv": MuonDimensionNumbers(0, (1, 2)), "proj": None, "tail": MuonDimensionNumbers()}
    shapes = lambda tx: [leaf.shape for leaf in jax.tree.leaves(trees.find_states(tx.init(params), NuMuonState)[0].mu)]
    assert shapes(numuon(0.1, 0.5, key=KEY)) == [(4, 4), (4, 4)]
    assert shapes(numuon(0.1, 0.5, key=KEY, weight_dimension_numbers=spec)) == [(4, 2, 6), (4, 4)]
    by_function = lambda params: jax.tree.map(lambda p: MuonDimensionNumbers() if p.ndim == 2 else None, params)
    only_proj = numuon(0.1, 0.5, key=KEY, adam=AdamConfig(paths=["tail"]), weight_dimension_numbers=by_function)
    assert shapes(only_proj) == [(4, 4)]
    updates, _ = only_proj.update(params, only_proj.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="'wte' matches no leaf"):
        numuon(0.1, 0.5, key=KEY, adam=AdamConfig(paths=["wte"])).init(params)


# ------------------------------------------------------------------------------------------------------ devices


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


WIDE = {"a": (40, 32), "b": (32, 40), "c": (40, 32), "d": (32, 32)}


def test_every_replica_computes_the_same_update():
    """Data parallel under shard_map: each device averages the gradients and runs the whole update; the bits agree."""
    rule = scale_by_numuon(0.25, key=KEY, decomposition=BlockKrylovConfig(oversampling=2))
    g = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[tree(seed, WIDE) for seed in range(8)])
    whole, split = PartitionSpec(), PartitionSpec("data")
    state = rule.init(tree(0, WIDE))

    def step(g, state):
        updates, state = rule.update(jax.tree.map(lambda x: jax.lax.pmean(x[0], "data"), g), state)
        return jax.tree.map(lambda u: jax.lax.pcast(u, "data", to="varying")[None], updates), state

    replicated = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(split, whole), out_specs=(split, whole)))
    updates, _ = replicated(g, state)
    alone, _ = jax.jit(rule.update)(jax.tree.map(lambda x: x.mean(0), g), state)
    for name in WIDE:
        bits = np.asarray(updates[name])
        assert bits.shape == (8, *WIDE[name]) and (bits == bits[:1]).all()
        np.testing.assert_allclose(bits[0], alone[name], atol=1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("r", [0.25, 0.75, 1.0])
def test_matrices_shared_out_over_the_mesh_give_the_same_steps(kind, r):
    m = mesh(kind)
    grads = [tree(seed, WIDE) for seed in range(3)]
    alone, _ = run(scale_by_numuon(r, key=KEY, decomposition=BlockKrylovConfig(oversampling=2)), grads)
    with jax.set_mesh(m):
        replicate = lambda x: jax.device_put(x, NamedSharding(m, PartitionSpec()))
        rule = scale_by_numuon(r, key=KEY, decomposition=BlockKrylovConfig(oversampling=2), mesh=m)
        shared, state = run(rule, [jax.tree.map(replicate, g) for g in grads])
    for a, b in zip(alone[:1] if r == 0.25 else alone, shared, strict=False):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), a, b)
    for updates in shared:
        for D in updates.values():
            assert D.sharding.is_fully_replicated
            if r < 1:
                singular = np.linalg.svd(np.asarray(D, np.float64), compute_uv=False)
                np.testing.assert_allclose(singular, np.arange(32) < 32 * r, atol=1e-5)
    for basis in jax.tree.leaves(state.bases):
        assert basis.shape[0] % 8 == 0 and basis.sharding.spec[0] == "data"
        assert basis.addressable_shards[0].data.shape[0] == basis.shape[0] // 8
