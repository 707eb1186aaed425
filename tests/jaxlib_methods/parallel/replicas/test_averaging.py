"""Sparse averaging against a loop over replicas in NumPy, and checks of AsyncMesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from jaxlib_methods._core.checks import options_of
from jaxlib_methods.parallel.pipelines.communication import collectives
from jaxlib_methods.parallel.replicas import _subsets
from jaxlib_methods.parallel.replicas.averaging import (
    averaged_per_round,
    ema_weight_schedule,
    replica_mean,
    sparse_averaging,
)
from jaxlib_methods.typing import AveragingMethod

KEY = jax.random.key(3)


def replicas(R, sizes=(40, 7), seed=0):
    rng = np.random.default_rng(seed)
    return {f"w{i}": jnp.asarray(rng.standard_normal((R, size)), jnp.float32) for i, size in enumerate(sizes)}


def runner(averaging, increments=None):
    """One call: a local step with the same increments for all entries of a replica, then a round."""

    @jax.jit
    def run(x, state, increments):
        x = jax.tree.map(lambda leaf: leaf + increments[:, None], x)
        return jax.vmap(averaging.apply, axis_name="data")(x, state)

    return run


def consensus_error(x):
    return sum(float(np.var(np.asarray(leaf), axis=0).sum()) for leaf in x.values())


# ------------------------------------------------------------------------------------------------------------ subsets


@pytest.mark.contract
@pytest.mark.parametrize("kind", ["partition", "strided"])
@pytest.mark.parametrize(("fraction", "size"), [(0.05, 41), (0.3, 10), (1.0, 5), (0.05, 3)])
def test_a_cycle_visits_every_entry_once(kind, fraction, size):
    n = _subsets.parts(fraction, size)
    draw = jax.jit(jax.vmap(lambda t: _subsets.subsets(kind, KEY, t, fraction, (size,))[0]))
    rows = draw(jnp.arange(2 * n, dtype=jnp.int32))
    for cycle in np.asarray(rows).reshape(2, -1):
        np.testing.assert_array_equal(np.sort(cycle[cycle < size]), np.arange(size))
    assert rows.shape[1] == _subsets.capacity(kind, fraction, size) == -(-size // n)


def test_the_number_of_parts():
    assert [_subsets.parts(p, 1000) for p in (0.05, 0.1, 0.3, 0.4, 0.7, 1.0)] == [20, 10, 4, 3, 2, 1]
    assert _subsets.parts(0.05, 6) == 6


def test_bernoulli_has_each_entry_with_the_same_probability():
    draw = jax.jit(jax.vmap(lambda t: _subsets.subsets("bernoulli", KEY, t, 0.2, (50,))[0]))
    rows = np.asarray(draw(jnp.arange(2000, dtype=jnp.int32)))
    hits = np.zeros((2000, 51), int)
    np.add.at(hits, (np.arange(2000)[:, None], rows), 1)
    chosen = hits[:, :50]
    assert chosen.max() == 1
    np.testing.assert_allclose(chosen.mean(axis=0), 0.2, atol=4 * (0.16 / 2000) ** 0.5)
    np.testing.assert_allclose(chosen.sum(axis=1).var(), 50 * 0.16, rtol=0.15)  # of a binomial


def test_overlap_share_of_redrawn_partitions_and_none_without_redrawing():
    """Check 9: with 20 parts and tau = 10, 55 of 400 revisits come within tau rounds."""
    n, tau, cycles, size = 20, 10, 40, 400
    for redraw, share in ((True, 55 / 400), (False, 0.0)):
        draw = jax.jit(jax.vmap(lambda t: _subsets.subsets("partition", KEY, t, 0.05, (size,), redraw)[0]))
        rows = np.asarray(draw(jnp.arange(n * cycles, dtype=jnp.int32)))
        visits = np.zeros((size, cycles), int)
        for t, row in enumerate(rows):
            visits[row, t // n] = t
        assert abs((np.diff(visits, axis=1) <= tau).mean() - share) < 0.01


# ---------------------------------------------------------------------------------------------------------- the rules


partition = jax.jit(functools.partial(_subsets.subsets, "partition"), static_argnums=(2, 3))


def in_numpy(x, rounds, rule, tau, weight, c, increments, fraction, restart=None):
    """The loop as the paper writes it, with a Python queue."""
    x = {name: np.array(leaf, np.float64) for name, leaf in x.items()}
    drift = {name: np.zeros_like(leaf) for name, leaf in x.items()}
    queue, applied = [], 0
    for t in range(rounds):
        if t == restart:
            queue = []
        for leaf in x.values():
            leaf += increments[:, None]
        now = {}
        chosen = partition(KEY, jnp.int32(t), fraction, tuple(leaf.shape[1] for leaf in x.values()))
        for S, (name, leaf) in zip(map(np.asarray, chosen), x.items(), strict=True):
            S = S[leaf.shape[1] > S]
            now[name] = S, leaf[:, S].mean(axis=0), leaf[:, S].copy()
        queue.append(now)
        if len(queue) <= tau:
            continue
        for name, (S, mean, own) in queue.pop(0).items():
            d = x[name][:, S] - own
            if rule == "ema":
                lam = 1.0 if applied == 0 else float(weight(t))
                d = drift[name][:, S] = (1 - lam) * drift[name][:, S] + lam * d
            x[name][:, S] = mean + (0 if rule == "avg" else c * d)
        applied += 1
    return x


@pytest.mark.parametrize("rule", options_of(AveragingMethod))
@pytest.mark.parametrize(("tau", "restart"), [(0, None), (3, None), (3, 5), (0, 5)])
def test_equals_the_loop_with_a_queue_that_a_restart_empties(rule, tau, restart):
    weight = ema_weight_schedule(40, warmup_rounds=10, start=0.5, end=0.1)
    averaging = sparse_averaging(0.3, key=KEY, delay=tau, method=rule, ema_weight=weight, correction=0.8)
    x, increments = replicas(3), jnp.array([0.1, -0.2, 0.3])
    expected = in_numpy(x, 12, rule, tau, weight, 0.8, np.asarray(increments, np.float64), 0.3, restart)
    state, run = jax.vmap(averaging.init)(x), runner(averaging)
    for t in range(12):
        state = averaging.restart(state) if t == restart else state
        x, state = run(x, state, increments)
    for name, leaf in x.items():
        np.testing.assert_allclose(leaf, expected[name], atol=2e-6)


def test_worked_example():
    """Check 6: start (1, 3), increments +0.1 and -0.3 between the rounds."""
    averaging = sparse_averaging(1.0, key=KEY, delay=1, ema_weight=0.5)
    x = {"w": jnp.array([[1.0], [3.0]])}
    state, run, seen, means = jax.vmap(averaging.init)(x), runner(averaging), [], []
    for t in range(4):
        x, state = run(x, state, jnp.array([0.1, -0.3]) * float(t > 0))
        seen.append(np.asarray(x["w"]).ravel())
        means.append(float(state.means[0, 0, 0]))
    np.testing.assert_allclose(seen, [(1, 3), (2.1, 1.7), (2.5, 1.1), (2.3, 1.1)], atol=1e-6)
    np.testing.assert_allclose(means, [2.0, 1.9, 1.8, 1.7], atol=1e-6)


@pytest.mark.parametrize(("rule", "tau"), [("avg", 0), ("ema", 0), ("weight_update", 0), ("weight_update", 4)])
def test_the_mean_of_the_replicas_is_preserved(rule, tau):
    """Check 2, in float64 sums of float32 entries."""
    averaging = sparse_averaging(0.2, key=KEY, delay=tau, method=rule)
    x, increments = replicas(4), jnp.array([0.1, -0.2, 0.3, 0.0])
    state, run = jax.vmap(averaging.init)(x), runner(averaging)
    for t in range(1, 8):
        x, state = run(x, state, increments)
        for name, leaf in replicas(4).items():
            moved = np.asarray(x[name], np.float64).mean(axis=0) - np.asarray(leaf, np.float64).mean(axis=0)
            np.testing.assert_allclose(moved, 0.05 * t, atol=1e-6)


def test_late_plain_averages_lose_the_drift_of_the_mean():
    averaging = sparse_averaging(1.0, key=KEY, delay=4, method="avg")
    x = replicas(2)
    state, run = jax.vmap(averaging.init)(x), runner(averaging)
    for _ in range(6):
        x, state = run(x, state, jnp.array([0.1, 0.1]))
    assert np.all(np.mean(x["w0"], axis=0) - np.mean(replicas(2)["w0"], axis=0) < 0.55)


def test_without_local_steps_replicas_agree_after_one_cycle():
    """Check 3: the squared consensus error loses 1/20 of its start in every round."""
    averaging = sparse_averaging(0.05, key=KEY, delay=0, method="avg")
    x = replicas(4, sizes=(20_000,))
    start, state, run = consensus_error(x), jax.vmap(averaging.init)(x), runner(averaging)
    left = []
    for _ in range(20):
        x, state = run(x, state, jnp.zeros(4))
        left.append(consensus_error(x) / start)
    np.testing.assert_allclose([left[0], left[9]], [0.95, 0.50], atol=0.01)
    assert left[19] < 1e-12


def test_bernoulli_contracts_geometrically():
    averaging = sparse_averaging(0.2, key=KEY, delay=0, method="avg", subsets="bernoulli")
    x = replicas(4, sizes=(20_000,))
    start, state, run = consensus_error(x), jax.vmap(averaging.init)(x), runner(averaging)
    for _ in range(5):
        x, state = run(x, state, jnp.zeros(4))
    assert abs(consensus_error(x) / start - 0.8**5) < 0.01


def test_without_drift_the_three_rules_are_one():
    """Check 4."""
    ends = []
    for rule in options_of(AveragingMethod):
        averaging = sparse_averaging(0.3, key=KEY, delay=2, method=rule)
        x = replicas(3)
        state, run = jax.vmap(averaging.init)(x), runner(averaging)
        for _ in range(3):  # before any entry is visited a second time
            x, state = run(x, state, jnp.zeros(3))
        ends.append(x)
    for other in ends[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ends[0], other)


@pytest.mark.parametrize("rule", options_of(AveragingMethod))
def test_steady_drift(rule):
    """Check 5: all replicas drift by delta = 0.01 per step; tau = 10, p = 0.05, the averages e at their fixed point."""
    tau, delta = 10, 0.01
    averaging = sparse_averaging(0.05, key=KEY, delay=tau, method=rule, redraw=False)
    x = replicas(2, sizes=(100,))
    start, state, run = np.asarray(x["w0"], np.float64), jax.vmap(averaging.init)(x), runner(averaging)
    if rule == "ema":
        state = state._replace(drift=jax.tree.map(lambda e: jnp.full_like(e, tau * delta), state.drift))
    for _ in range(400):
        x, state = run(x, state, jnp.full(2, delta))
    moved = np.asarray(x["w0"], np.float64).mean(axis=0) - start.mean(axis=0)
    if rule != "avg":
        np.testing.assert_allclose(moved, 400 * delta, atol=5e-5)
    else:  # each of the 19 or 20 times an entry was averaged put it back by tau delta
        np.testing.assert_allclose(np.unique((400 * delta - moved).round(2)), [1.9, 2.0])


def test_lambda_schedule():
    """Check 7."""
    weight = ema_weight_schedule(30_000)
    seen = [float(weight(t)) for t in (0, 1000, 8250, 15_500, 22_750, 29_999)]
    np.testing.assert_allclose(seen, [0.5, 0.5, 0.42824, 0.25499, 0.08174, 0.01], atol=5e-6)


# ------------------------------------------------------------------------------------------------------------ training


def test_averaging_all_after_every_step_is_data_parallel_sgd_and_not_nadam():
    """Check 1."""
    averaging = sparse_averaging(1.0, key=KEY, delay=0, method="avg")
    targets = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6)), jnp.float32)
    loss = lambda w, target: jnp.sum(jnp.cos(w - target))

    def train(optimizer):
        def one(w, opt_state, state, target):
            updates, opt_state = optimizer.update(jax.grad(loss)(w, target), opt_state, w)
            w, state = averaging.apply(optax.apply_updates(w, updates), state)
            return w, opt_state, state

        w = jnp.ones((4, 6))
        carry = w, jax.vmap(optimizer.init)(w), jax.vmap(averaging.init)(w)
        step = jax.jit(jax.vmap(one, axis_name="data"))
        together, opt_state = w[0], optimizer.init(w[0])
        for _ in range(5):
            carry = step(*carry, targets)
            grad = jax.grad(lambda w: jnp.mean(jax.vmap(loss, in_axes=(None, 0))(w, targets)))(together)
            updates, opt_state = optimizer.update(grad, opt_state, together)
            together = optax.apply_updates(together, updates)
        return carry[0], together

    replicas_end, together = train(optax.sgd(0.1))
    np.testing.assert_allclose(replicas_end, np.broadcast_to(together, (4, 6)), atol=1e-6)
    with jax.numpy_dtype_promotion("standard"):
        replicas_end, together = train(optax.nadam(0.1))
    assert np.ptp(replicas_end, axis=0).max() == 0
    assert np.abs(replicas_end[0] - together).max() > 1e-3


def test_one_replica_is_left_alone():
    """Check 8."""
    averaging = sparse_averaging(1.0, key=KEY, delay=1)
    x = replicas(1)
    state, run = jax.vmap(averaging.init)(x), runner(averaging)
    for _ in range(3):
        x, state = run(x, state, jnp.array([0.5]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 1.5, atol=1e-6), x, replicas(1))


@pytest.mark.parametrize("interval", [1, 3])
def test_on_devices_it_is_what_it_is_under_vmap(interval):
    averaging = sparse_averaging(0.3, key=KEY, delay=2, interval=interval)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    alone = lambda f: (
        lambda *trees: jax.tree.map(lambda leaf: leaf[None], f(*jax.tree.map(lambda leaf: leaf[0], trees)))
    )
    sharded = jax.jit(jax.shard_map(alone(averaging.apply), mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    x = y = replicas(4)
    state = other = jax.vmap(averaging.init)(x)
    together = jax.jit(jax.vmap(averaging.apply, axis_name="data"))
    for _ in range(7):
        x, state = sharded(jax.tree.map(lambda leaf: leaf * 1.1, x), state)
        y, other = together(jax.tree.map(lambda leaf: leaf * 1.1, y), other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), (x, state), (y, other))


def test_a_compiled_round_reduces_exactly_the_numbers_of_the_formula():
    averaging = sparse_averaging(0.3, key=KEY, delay=2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    one = lambda *trees: jax.tree.map(
        lambda leaf: leaf[None], averaging.apply(*jax.tree.map(lambda leaf: leaf[0], trees))
    )
    x = replicas(4)
    program = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    sent = collectives(program.lower(x, jax.vmap(averaging.init)(x)))
    K = averaged_per_round(jax.tree.map(lambda leaf: leaf[0], x), 0.3)
    assert [(c.kind, c.bytes, c.count) for c in sent] == [("all-reduce", 4 * K, 1)]


def test_half_precision_parameters_keep_their_type():
    averaging = sparse_averaging(0.5, key=KEY, delay=1)
    x = {"w": jnp.ones((2, 10), jnp.bfloat16)}
    x, state = jax.vmap(averaging.apply, axis_name="data")(x, jax.vmap(averaging.init)(x))
    assert x["w"].dtype == jnp.bfloat16 and state.means.dtype == state.drift["w"].dtype == jnp.float32


def test_memory_and_numbers_per_round():
    params = {"w": jnp.zeros((1000, 30)), "b": jnp.zeros(30)}
    K = averaged_per_round(params, 0.05)
    assert K == 1500 + 2
    state = sparse_averaging(0.05, key=KEY, delay=10).init(params)
    assert state.means.shape == state.snapshots.shape == (10, K)
    np.testing.assert_array_equal(jax.vmap(replica_mean, axis_name="data")(jnp.array([1.0, 4.0])), [2.5, 2.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\], got 0.0"),
        ({"fraction": 1.5}, "got 1.5"),
        ({"delay": -1}, "delay must be at least 0, got -1"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"method": "mean"}, "method must be one of"),
        ({"subsets": "top"}, "subsets must be one of"),
        ({"ema_weight": 0.0}, "ema_weight must lie in"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sparse_averaging(**({"fraction": 0.05, "key": KEY} | arguments))


def test_schedules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="warmup_rounds"):
        ema_weight_schedule(100)
    with pytest.raises(ValueError, match="0 < end <= start <= 1"):
        ema_weight_schedule(2000, start=0.1, end=0.5)
