"""The checks of optax transformations: each takes a registry entry and raises where the transformation misbehaves."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

CHECKS: dict[str, Callable[..., None]] = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def gradients(params: Any, seed: int = 1) -> Any:
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return structure.unflatten([jax.device_put(rng.normal(size=p.shape).astype(p.dtype), p.sharding) for p in leaves])


def updates_of(transformation: Any, entry: Any, params: Any, steps: int = 3) -> list[Any]:
    """The updates of a few steps, each with its own gradient, the parameters moving along."""
    update = jax.jit(transformation.update)
    state, history = transformation.init(params), []
    for step in range(steps):
        updates, state = update(gradients(params, step), state, params, **entry.extra_args)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history


def types(tree: Any) -> list[Any]:
    return [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


# ----------------------------------------------------------------------------------------------- the optax contract


@check
def unknown_extra_args(entry):
    params = entry.example()
    tx = entry.make(params)
    assert isinstance(tx, optax.GradientTransformationExtraArgs), f"{type(tx)} cannot take extra arguments in a chain"
    grads, state = gradients(params), tx.init(params)
    plain, _ = tx.update(grads, state, params, **entry.extra_args)
    extra, _ = tx.update(grads, state, params, **entry.extra_args, an_argument_that_nobody_knows=1.0)
    assert_same(extra, plain, rtol=0)


@check
def traced_once(entry):
    params = entry.example()
    tx = entry.make(params)
    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(None)
        return tx.update(grads, state, params, **entry.extra_args)

    state = tx.init(params)
    for seed in range(3):
        updates, state = update(gradients(params, seed), state, params)
        params = optax.apply_updates(params, updates)
    assert len(traces) == 1, f"{len(traces)} traces in 3 steps: the state changes its type from step to step"


@check
def tree_map_params(entry):
    params = entry.example()
    tx = entry.make(params)
    state = tx.init(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    mapped = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf.shape in shapes and leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert_same(mapped, state, rtol=0)


@check
def state_is_arrays(entry):
    params = entry.example()
    for leaf in jax.tree.leaves(entry.make(params).init(params)):
        assert isinstance(leaf, jax.Array), f"{leaf!r} in the state can neither be checkpointed nor sharded"


@check
def injected_hyperparams(entry):
    params = entry.example()
    injected = optax.inject_hyperparams(entry.factory, static_args=entry.static_args)
    expected = updates_of(entry.make(params), entry, params)
    assert_same(updates_of(injected(**entry.hyperparams, **entry.for_params(params)), entry, params), expected)


@check
def scheduled_learning_rate(entry):
    if "learning_rate" not in inspect.signature(entry.factory).parameters:
        return
    params = entry.example()
    schedule = optax.exponential_decay(entry.hyperparams["learning_rate"], transition_steps=1, decay_rate=0.5)
    arguments = {**entry.hyperparams, **entry.for_params(params), "learning_rate": schedule}
    native = updates_of(entry.factory(**arguments), entry, params)
    injected = optax.inject_hyperparams(entry.factory, static_args=entry.static_args)(**arguments)
    assert_same(native, updates_of(injected, entry, params))


@check
def multi_steps(entry):
    params = entry.example()
    tx = entry.make(params)
    accumulating = optax.MultiSteps(tx, every_k_schedule=2)
    first, second = gradients(params, 1), gradients(params, 2)
    update = jax.jit(accumulating.update)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps itself divides a float by an int
        nothing, state = update(first, accumulating.init(params), params, **entry.extra_args)
        updates, _ = update(second, state, params, **entry.extra_args)
    assert_same(nothing, jax.tree.map(jnp.zeros_like, params), rtol=0)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    assert_same(updates, jax.jit(tx.update)(mean, tx.init(params), params, **entry.extra_args)[0], rtol=1e-4)


@check
def masked(entry):
    params = entry.example()
    leaves, structure = jax.tree.flatten(params)
    mask = structure.unflatten([index == 0 for index in range(len(leaves))])
    seen = jax.tree.map(lambda leaf, m: leaf if m else optax.MaskedNode(), params, mask)
    (updates,) = updates_of(optax.masked(entry.make(seen), mask), entry, params, steps=1)
    grads = jax.tree.leaves(gradients(params, 0))
    assert_same(jax.tree.leaves(updates)[1:], grads[1:], rtol=0)
    assert types(updates) == types(params)


# ------------------------------------------------------------------------------------------------ types and containers


@check
def keeps_dtype(entry):
    for dtype in (jnp.bfloat16, jnp.float32):
        params = entry.example(dtype)
        tx = entry.make(params)
        update = lambda grads, state, params: tx.update(grads, state, params, **entry.extra_args)
        updates, _ = jax.eval_shape(update, gradients(params), tx.init(params), params)
        assert types(updates) == types(params), f"{types(params)} became {types(updates)}"


@check
def stable_through_cond(entry):
    with jax.enable_x64(True):
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
            params = entry.example(dtype)
            tx = entry.make(params)
            state = tx.init(params)

            def either(go, grads, state, params):
                step = lambda: tx.update(grads, state, params, **entry.extra_args)
                return jax.lax.cond(go, step, lambda: (grads, state))

            _, after = jax.eval_shape(either, jnp.array(True), gradients(params), state, params)
            assert types(after) == types(state), f"{dtype.__name__}: {types(state)} became {types(after)}"


@check
def containers(entry):
    leaves = jax.tree.leaves(entry.example())
    names = [f"p{index:02d}" for index in range(len(leaves))]
    boxes = {
        "dict": dict(zip(names, leaves, strict=True)),
        "tuple": tuple(leaves),
        "nested list with None": [None, [leaf for leaf in leaves]],
        "nnx.State": nnx.State({name: nnx.Param(leaf) for name, leaf in zip(names, leaves, strict=True)}),
    }
    results = {kind: updates_of(entry.make(params), entry, params) for kind, params in boxes.items()}
    for kind, history in results.items():
        assert jax.tree.structure(history[-1]) == jax.tree.structure(boxes[kind]), kind
        assert_same(history, results["dict"])


@check
def bare_array(entry):
    array = jax.tree.leaves(entry.example())[-1]
    history = updates_of(entry.make(array), entry, array)
    boxed = updates_of(entry.make({"only": array}), entry, {"only": array})
    assert_same(history, boxed)


# ------------------------------------------------------------------------------------------------------- sharding


def _keeps_sharding(entry, axis_type):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type, axis_type))

    def sharded(leaf):
        axes = ("a", "b")[-leaf.ndim :] if leaf.ndim else ()
        spec = [
            axis if size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, leaf.shape[-2:], strict=True)
        ]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - len(spec)), *spec)))

    with jax.set_mesh(mesh):
        params = jax.tree.map(sharded, entry.example())
        tx = entry.make(params)
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(gradients(params), state, params, **entry.extra_args)
        assert types(after) == types(state), f"{types(state)} became {types(after)}"
        assert types(updates) == types(params), f"{types(params)} became {types(updates)}"
        for new, old in zip(jax.tree.leaves((updates, after)), jax.tree.leaves((params, state)), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim), f"{old.sharding} became {new.sharding}"


@check
def sharding_auto(entry):
    _keeps_sharding(entry, AxisType.Auto)


@check
def sharding_explicit(entry):
    _keeps_sharding(entry, AxisType.Explicit)


# ------------------------------------------------------------------------------------------------------ convergence


def _converges(entry, start, target, loss):
    start, target = entry.constrain(start), entry.constrain(target)
    tx = entry.as_optimizer(entry.make(start))

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, target), state, params, **entry.extra_args)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=entry.steps)[0][0]

    reached = run(start, tx.init(start))
    for a, b in zip(jax.tree.leaves(reached), jax.tree.leaves(target), strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-2, atol=3e-2)


def _squared_distance(params, target):
    return sum(jnp.sum((p - t) ** 2) for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))


@check
def parabola(entry):
    _converges(entry, jnp.array([-1.0, 10.0, 1.0]), jnp.array([1.0, -1.0, 1.0]), _squared_distance)


@check
def rosenbrock(entry):
    loss = lambda params, _: (1.0 - params[0]) ** 2 + 100.0 * (params[1] - params[0] ** 2) ** 2
    _converges(entry, jnp.array([0.0, 0.0]), jnp.array([1.0, 1.0]), loss)


@check
def matrix(entry):
    rng = np.random.default_rng(0)
    _converges(entry, jnp.zeros((4, 3)), jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), _squared_distance)


@check
def mixed_ranks(entry):
    target = {
        "scalar": jnp.array(0.5),
        "vector": jnp.array([1.0, -1.0]),
        "matrix": jnp.array([[0.2, 0.4], [0.0, -2.0]]),
    }
    _converges(entry, jax.tree.map(jnp.zeros_like, target), target, _squared_distance)
