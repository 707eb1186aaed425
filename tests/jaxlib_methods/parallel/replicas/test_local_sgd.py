"""FedAvg, DiLoCo and its streaming form against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from jaxlib_methods.parallel.replicas.local_sgd import diloco, fed_avg, outer_sgd, streaming_diloco

R = 3
START = {"a": np.array([1.0, -2.0]), "b": np.array([0.5]), "c": np.array([[3.0], [4.0]])}
MOVES = np.random.default_rng(0).standard_normal((20, R))  # of all entries of a replica, in every local step


def run(averaging, steps=20):
    """Parameters of all replicas after every step, [steps][name][R, ...]."""

    @jax.jit
    def step(x, state, move):
        x = jax.tree.map(lambda leaf: leaf + move.reshape(R, *(1,) * (leaf.ndim - 1)), x)
        return jax.vmap(averaging.apply, axis_name="data")(x, state)

    x = jax.tree.map(lambda leaf: jnp.asarray(np.broadcast_to(leaf, (R, *leaf.shape)), jnp.float32), START)
    state, history = jax.vmap(averaging.init)(x), []
    for move in MOVES[:steps]:
        x, state = step(x, state, jnp.asarray(move, jnp.float32))
        history.append(jax.tree.map(np.asarray, x))
    return history


class InNumPy:
    """One parameter of all replicas and the shared one, with Nesterov momentum in the outer step."""

    def __init__(self, leaf, rate, momentum):
        self.shared = np.array(leaf, np.float64)
        self.x = np.broadcast_to(leaf, (R, *leaf.shape)).astype(np.float64)
        self.trace, self.rate, self.momentum = np.zeros_like(self.shared), rate, momentum

    def move(self, move):
        self.x = self.x + move.reshape(R, *(1,) * (self.x.ndim - 1))

    def outer_step(self):
        gradient = self.shared - self.x.mean(axis=0)
        self.trace = gradient + self.momentum * self.trace
        self.shared = self.shared - self.rate * (gradient + self.momentum * self.trace)

    def mix(self, alpha):
        self.x = alpha * self.x + (1 - alpha) * self.shared


def assert_equal(history, expected):
    for t, (x, y) in enumerate(zip(history, expected, strict=True)):
        for name in START:
            np.testing.assert_allclose(x[name], y[name], rtol=2e-5, atol=1e-5, err_msg=f"{name} after step {t + 1}")


@pytest.mark.contract
@pytest.mark.parametrize("every", [1, 4])
def test_fed_avg(every):
    leaves, expected = {name: InNumPy(leaf, 1.0, 0.0) for name, leaf in START.items()}, []
    for t, move in enumerate(MOVES, start=1):
        for leaf in leaves.values():
            leaf.move(move)
            if t % every == 0:
                leaf.outer_step()
                leaf.mix(0.0)
        expected.append({name: leaf.x for name, leaf in leaves.items()})
    history = run(fed_avg(every))
    assert_equal(history, expected)
    assert all(np.ptp(leaf, axis=0).max() == 0 for leaf in history[every - 1].values())  # replicas agree to the bit


def test_diloco():
    leaves, expected = {name: InNumPy(leaf, 0.7, 0.9) for name, leaf in START.items()}, []
    for t, move in enumerate(MOVES, start=1):
        for leaf in leaves.values():
            leaf.move(move)
            if t % 5 == 0:
                leaf.outer_step()
                leaf.mix(0.0)
        expected.append({name: leaf.x for name, leaf in leaves.items()})
    assert_equal(run(diloco(5)), expected)


@pytest.mark.parametrize(("tau", "alpha"), [(0, 0.0), (1, 0.5), (3, 0.25)])
def test_streaming_diloco(tau, alpha):
    H, turns = 4, {"a": 0, "b": 1, "c": 2}  # floor(f H / 3)
    leaves, expected = {name: InNumPy(leaf, 0.4, 0.9) for name, leaf in START.items()}, []
    arriving = []
    for t, move in enumerate(MOVES, start=1):
        for name, leaf in leaves.items():
            leaf.move(move)
            if t % H == turns[name]:
                leaf.outer_step()
                arriving.append((t + tau, name))
        for when, name in arriving:
            if when == t:
                leaves[name].mix(alpha)
        expected.append({name: leaf.x for name, leaf in leaves.items()})
    rules = [("a", 0), ("b", 1), ("c", 2)]
    assert_equal(run(streaming_diloco(H, rules, delay=tau, mixing=alpha)), expected)


def test_with_one_fragment_and_no_delay_streaming_is_diloco():
    assert_equal(run(streaming_diloco(5, [("", 0)], outer_sgd(), delay=0, mixing=0.0)), run(diloco(5)))


@pytest.mark.parametrize("averaging", [fed_avg(2), diloco(2), streaming_diloco(2, [("a|c", 0), ("b", 1)])])
def test_on_devices_it_is_what_it_is_under_vmap(averaging):
    mesh = jax.make_mesh((R,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:R])
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)

    def one(x, state, move):
        x = jax.tree.map(lambda leaf: leaf + move[0], first(x))
        return jax.tree.map(lambda leaf: leaf[None], averaging.apply(x, first(state)))

    step = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    x = jax.tree.map(lambda leaf: jnp.asarray(np.broadcast_to(leaf, (R, *leaf.shape)), jnp.float32), START)
    state, history = jax.vmap(averaging.init)(x), []
    for move in MOVES[:5]:
        x, state = step(x, state, jnp.asarray(move, jnp.float32))
        history.append(x)
    assert_equal(history, run(averaging, steps=5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fed_avg(0), "interval must be at least 1, got 0"),
        (lambda: diloco(0), "interval must be at least 1, got 0"),
        (lambda: streaming_diloco(1, [("a", 0), ("b", 1)]), "interval must be at least 2, got 1; each fragment"),
        (lambda: streaming_diloco(4, [("a", 1)]), "numbered 0, 1"),
        (lambda: streaming_diloco(4, [("a", 0)], delay=4), r"delay must lie in \[0, 4\), got 4"),
        (lambda: streaming_diloco(4, [("a", 0)], mixing=1.5), r"mixing must lie in \[0, 1\], got 1.5"),
        (lambda: streaming_diloco(4, [("a", 0)]).init({"a": 1.0, "b": 2.0}), "b"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_any_outer_optimizer_will_do():
    history = run(diloco(1, optax.sgd(1.0)), steps=3)
    assert_equal(history, run(fed_avg(1), steps=3))
