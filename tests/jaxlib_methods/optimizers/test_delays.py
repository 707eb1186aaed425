"""Delays against a NumPy queue and against a slot-by-slot asynchronous 1F1B pipeline, to the bit."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods.optimizers import delayed_nesterov, nadam
from jaxlib_methods.optimizers.delays import (
    clip_by_group_norm,
    delay_gradients,
    delay_memory,
    keep_param_history,
    pipeline_delays,
    stale_params,
)
from jaxlib_methods.optimizers.no_stash import mixed_versions


def test_delays_of_a_table_worked_by_hand():
    assert pipeline_delays(8) == (7, 6, 5, 4, 3, 2, 1, 0)
    assert pipeline_delays(8, accumulation=2) == (3, 3, 2, 2, 1, 1, 0, 0)
    assert pipeline_delays(8, accumulation=4) == (1, 1, 1, 1, 0, 0, 0, 0)
    assert pipeline_delays(1) == (0,)
    for P in range(1, 20):
        for K in range(1, 9):
            exact = [int(np.floor((2 * (P - i) + 1) / (2 * K))) for i in range(1, P + 1)]
            assert list(pipeline_delays(P, K)) == exact


# ---------------------------------------------------------------- a pipeline of three tanh stages, slot by slot


def stage(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"][None])


def head_loss(params, x, y):
    return jnp.mean((stage(params, x) - y) ** 2)


def chain_params(P, dtype=np.float32):
    rng = np.random.default_rng(0)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {f"stage{j}": {"kernel": leaf(4, 4), "bias": leaf(4)} for j in range(P)}


def chain_batches(count, dtype=np.float32):
    rng = np.random.default_rng(1)
    return [tuple(jnp.asarray(rng.normal(size=(8, 4)), dtype) for _ in range(2)) for _ in range(count)]


def stage_optimizer():
    """Every stage has its own: its clipping is its own too."""
    return optax.chain(optax.clip_by_global_norm(0.5), delayed_nesterov(0.05))


class Stage:
    """One rank of the pipeline: newest weights, stashed weights and inputs, its own optimizer."""

    def __init__(self, params, rank, size):
        self.params, self.rank, self.size = params, rank, size
        self.version, self.stash, self.versions_used = 0, {}, []
        self.optimizer = stage_optimizer()
        self.opt_state = self.optimizer.init(params)

    @property
    def is_last(self):
        return self.rank == self.size - 1

    def forward(self, m, x):
        self.stash[m] = (self.params, x)
        self.versions_used.append(self.version)
        return None if self.is_last else stage(self.params, x)

    def backward(self, m, cotangent, target):
        params, x = self.stash.pop(m)
        if self.is_last:
            grads, to_previous = jax.grad(head_loss, argnums=(0, 1))(params, x, target)
        else:
            grads, to_previous = jax.vjp(stage, params, x)[1](cotangent)
        updates, self.opt_state = self.optimizer.update(grads, self.opt_state, self.params)
        self.params = optax.apply_updates(self.params, updates)
        self.version += 1
        return to_previous


def run_slots(params, batches):
    """F of microbatch m on stage j (from 0) at slot 2 m + j, its B at slot 2 m + (2 P - 1 - j)."""
    P = len(params)
    stages = [Stage(params[f"stage{j}"], j, P) for j in range(P)]
    activations, cotangents, seen = {}, {}, collections.defaultdict(list)
    for slot in range(2 * len(batches) + 2 * P):
        for j, rank in enumerate(stages):
            m, odd = divmod(slot - j, 2)
            if not odd and 0 <= m < len(batches):
                activations[m, j + 1] = rank.forward(m, batches[m][0] if j == 0 else activations.pop((m, j)))
                seen[j].append((slot, "F"))
            m, odd = divmod(slot - (2 * P - 1 - j), 2)
            if not odd and 0 <= m < len(batches):
                cotangents[m, j - 1] = rank.backward(m, cotangents.pop((m, j), None), batches[m][1])
                seen[j].append((slot, "B"))
    assert all(len({slot for slot, _ in work}) == len(work) for work in seen.values())  # one job per slot and stage
    return stages


def chain_loss(params, batch):
    x, y = batch
    P = len(params)
    for j in range(P - 1):
        x = stage(params[f"stage{j}"], x)
    return head_loss(params[f"stage{P - 1}"], x, y)


def run_simulator(params, batches, tau, optimizer):
    """The whole definition: the gradient at the composite stale weights, applied to the newest ones."""
    optimizer = optax.chain(keep_param_history(tau), optimizer)
    state = optimizer.init(params)
    for batch in batches:
        grads = jax.grad(chain_loss)(stale_params(state, params), batch)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def rules(delays):
    return [(f"^stage{j}/", delay) for j, delay in enumerate(delays)]


def per_stage_optimizer(P):
    groups = [(f"^stage{j}/", j) for j in range(P)]
    return optax.chain(clip_by_group_norm(0.5, groups), delayed_nesterov(0.05))


def test_versions_of_the_slot_schedule():
    P, count = 4, 8
    stages = run_slots(chain_params(P), chain_batches(count))
    for j, rank in enumerate(stages):
        assert rank.versions_used == [max(m - (P - 1 - j), 0) for m in range(count)]
        assert rank.versions_used.count(0) == P - j  # the first P - j updates all use version 0
    lag = [m - version for m, version in enumerate(stages[0].versions_used)]
    assert lag[:5] == [0, 1, 2, 3, 3]
    assert [count - 1 - rank.versions_used[-1] for rank in stages] == list(pipeline_delays(P)) == [3, 2, 1, 0]


@pytest.mark.parametrize("P", [1, 3])
def test_simulator_is_the_pipeline_to_the_bit(P):
    params, batches = chain_params(P), chain_batches(12)
    pipeline = {f"stage{j}": rank.params for j, rank in enumerate(run_slots(params, batches))}
    simulated = run_simulator(params, batches, rules(pipeline_delays(P)), per_stage_optimizer(P))
    jax.tree.map(np.testing.assert_array_equal, simulated, pipeline)
    other = run_simulator(params, batches, rules([0] * P), per_stage_optimizer(P))
    if P > 1:  # the delays do matter
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(pipeline), strict=True))


@pytest.mark.parametrize("link", [keep_param_history, delay_gradients])
def test_without_delay_training_is_sequential_to_the_bit(link):
    params, batches = chain_params(3), chain_batches(6)

    def train(optimizer, point):
        w, state = params, optimizer.init(params)
        for batch in batches:
            updates, state = optimizer.update(jax.grad(chain_loss)(point(state, w), batch), state, w)
            w = optax.apply_updates(w, updates)
        return w

    plain = train(nadam(0.05, weight_decay=0.01), lambda state, w: w)
    point = stale_params if link is keep_param_history else lambda state, w: w
    jax.tree.map(
        np.testing.assert_array_equal, train(optax.chain(link(0), nadam(0.05, weight_decay=0.01)), point), plain
    )


# ------------------------------------------------------------------------------------------ both models, as queues


TAUS = {"a": 3, "b": 0, "c": 1}


def coupled(w, batch):
    """A loss whose gradient mixes the groups, so that versions cannot be mistaken."""
    return jnp.sum((w["a"] * w["b"] - batch) ** 2) + jnp.sum(jnp.sin(w["b"] + 2 * w["c"])) + jnp.sum(w["a"] * w["c"])


def coupled_setup():
    rng = np.random.default_rng(2)
    w = {name: jnp.asarray(rng.normal(size=3), jnp.float32) for name in TAUS}
    return w, [jnp.asarray(rng.normal(size=3), jnp.float32) for _ in range(10)]


@pytest.mark.contract
def test_stale_params_are_the_composite_of_a_queue():
    w, batches = coupled_setup()
    optimizer = optax.chain(optax.sgd(0.1), keep_param_history(list(TAUS.items())))
    state, versions = optimizer.init(w), []
    step = jax.jit(lambda grads, state, w: optimizer.update(grads, state, w))
    for m, batch in enumerate(batches):
        versions.append(w)
        composite = {name: versions[max(m - tau, 0)][name] for name, tau in TAUS.items()}
        jax.tree.map(np.testing.assert_array_equal, stale_params(state, w), composite)
        updates, state = step(jax.grad(coupled)(composite, batch), state, w)
        w = optax.apply_updates(w, updates)


def test_delayed_gradients_are_those_of_a_queue():
    rng = np.random.default_rng(3)
    stream = [{name: jnp.asarray(rng.normal(size=2), jnp.float32) for name in TAUS} for _ in range(9)]
    link = delay_gradients(list(TAUS.items()))
    state = link.init(stream[0])
    for t, grads in enumerate(stream):
        late, state = jax.jit(link.update)(grads, state)
        expected = {name: stream[max(t - tau, 0)][name] for name, tau in TAUS.items()}
        jax.tree.map(np.testing.assert_array_equal, late, expected)


def test_the_two_models_agree_for_one_delay_and_one_batch_and_differ_otherwise():
    w0, batches = coupled_setup()

    def train(tau, model):
        link = keep_param_history(tau) if model == "stale weights" else delay_gradients(tau)
        optimizer = optax.chain(link, optax.sgd(0.05))
        w, state = w0, optimizer.init(w0)
        for _ in range(12):
            at = stale_params(state, w) if model == "stale weights" else w
            updates, state = optimizer.update(jax.grad(coupled)(at, batches[0]), state, w)
            w = optax.apply_updates(w, updates)
        return jnp.concatenate([w[name] for name in TAUS])

    np.testing.assert_array_equal(train(4, "stale weights"), train(4, "late gradients"))
    mixed = list(TAUS.items())
    assert np.abs(train(mixed, "stale weights") - train(mixed, "late gradients")).max() > 1e-3


# ------------------------------------------------------------------------------------- memory, compilation, errors


def test_memory_is_known_before_and_is_what_is_allocated():
    P = 4
    params, tau = chain_params(P), rules(pipeline_delays(P))
    shapes = jax.eval_shape(lambda: chain_params(P))
    for link, gradients in ((keep_param_history(tau), False), (delay_gradients(tau), True)):
        history = link.init(params).history
        allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(history))
        assert delay_memory(shapes, tau, late_gradients=gradients) == allocated
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(params["stage0"]))
    assert delay_memory(params, tau) == one * (3 + 2 + 1)  # N (P + 1) / 2 with the newest versions
    assert delay_memory(params, 0) == 0
    assert delay_memory({"w": jax.ShapeDtypeStruct((10,), jnp.bfloat16)}, 3) == 60


@pytest.mark.parametrize("link", [keep_param_history, delay_gradients])
def test_one_compilation_and_no_copy_of_the_ring_per_step(link):
    """With donated buffers a step writes one slot in place: temporaries do not grow with the ring."""
    temporaries, traces = {}, []
    x = jnp.asarray(np.random.default_rng(4).normal(size=(16, 128)), jnp.float32)
    loss = lambda w: jnp.sum(jnp.tanh(x @ w) ** 2)
    for tau in (2, 64):
        optimizer = optax.chain(link(tau), nadam(0.1))

        def step(w, state):
            traces.append(tau)
            at = stale_params(state, w) if link is keep_param_history else w
            updates, state = optimizer.update(jax.grad(loss)(at), state, w)
            return optax.apply_updates(w, updates), state

        step = jax.jit(step, donate_argnums=(0, 1))
        w = jnp.ones((128, 128))
        state = optimizer.init(w)
        temporaries[tau] = step.lower(w, state).compile().memory_analysis().temp_size_in_bytes
        traces.clear()
        for _ in range(3):
            w, state = step(w, state)
        assert len(traces) <= 1
    assert temporaries[64] < temporaries[2] + w.nbytes


def test_history_keeps_dtype_sharding_and_containers(key):
    params = {"w": jnp.ones((4, 2), jnp.bfloat16), "skip": None, "v": (jnp.ones(3), jnp.zeros((), jnp.int32))}
    link = keep_param_history([("^w$", 2), ("", 0)])
    state = link.init(params)
    assert state.history["w"].dtype == jnp.bfloat16 and state.history["w"].shape == (2, 4, 2)
    assert state.history["v"] == (None, None)
    assert jax.tree.structure(stale_params(state, params)) == jax.tree.structure(params)


def test_each_group_is_clipped_by_its_own_norm():
    grads = {"a": {"x": jnp.array([3.0, 0.0]), "y": jnp.array([4.0])}, "b": jnp.array([0.3, 0.4])}
    clip = clip_by_group_norm(1, [("^a/", "first"), ("^b", "second")])
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped["a"]["x"], [0.6, 0.0], rtol=1e-6)
    np.testing.assert_allclose(clipped["a"]["y"], [0.8], rtol=1e-6)
    np.testing.assert_array_equal(clipped["b"], grads["b"])
    together = optax.clip_by_global_norm(1.0)
    assert (together.update(grads, together.init(grads))[0]["b"] != grads["b"]).all()


PARAMS = {"first": jnp.zeros(2), "last": jnp.zeros(2)}


@pytest.mark.parametrize("make", [keep_param_history, delay_gradients, lambda tau: delay_memory(PARAMS, tau)])
@pytest.mark.parametrize("tau", [-1, "7", True, [("first", 2), ("last", -3)], [("first", 1.5), ("last", 0)]])
def test_a_bad_delay_is_refused_at_once(make, tau):
    with pytest.raises(
        ValueError, match=r"delay must be a whole number of updates, 0 or more, got (-1|'7'|True|-3|1\.5)"
    ):
        make(tau)


def test_numpy_integers_are_delays():
    assert delay_memory(PARAMS, np.int64(2)) == delay_memory(PARAMS, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keep_param_history([("first", 1), ("laast", 2)]).init(PARAMS), "'laast', matches no leaf"),
        (lambda: delay_gradients([("first", 1)]).init(PARAMS), "no rule matches 'last'"),
        (lambda: clip_by_group_norm(1.0, [("block", 0)]).init(PARAMS), "'block', matches no leaf"),
        (lambda: clip_by_group_norm(0.0, [("", 0)]), "max_norm must be positive, got 0.0"),
        (lambda: pipeline_delays(0), "num_stages must be at least 1, got 0"),
        (lambda: pipeline_delays(2, 0), "accumulation must be at least 1, got 0"),
        (lambda: stale_params(optax.sgd(0.1).init(PARAMS), PARAMS), r"found 0; put one keep_param_history\(delay\)"),
        (lambda: keep_param_history(1).update(PARAMS, keep_param_history(1).init(PARAMS)), "params must be given"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------- without stashing


def test_mixed_versions_is_a_stage_that_lost_its_weights():
    """Forward of all stages at old weights, backward at new ones on the stored inputs, by hand."""
    old, new = chain_params(3), jax.tree.map(lambda leaf: leaf + 0.1, chain_params(3))
    x, y = chain_batches(1)[0]

    def loss(new):
        h = x
        for j in range(2):
            h = mixed_versions(stage)(old[f"stage{j}"], new[f"stage{j}"], h)
        return mixed_versions(head_loss)(old["stage2"], new["stage2"], h, y)

    inputs = [x]
    for j in range(2):
        inputs.append(stage(old[f"stage{j}"], inputs[-1]))
    assert loss(new) == head_loss(old["stage2"], inputs[2], y)
    expected = {}
    expected["stage2"], cotangent = jax.grad(head_loss, argnums=(0, 1))(new["stage2"], inputs[2], y)
    for j in (1, 0):
        expected[f"stage{j}"], cotangent = jax.vjp(stage, new[f"stage{j}"], inputs[j])[1](cotangent)
    got = jax.grad(loss)(new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)
    same = jax.grad(chain_loss)(new, (x, y))
    assert np.abs(got["stage0"]["kernel"] - same["stage0"]["kernel"]).max() > 1e-3
