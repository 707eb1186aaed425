"""Every optax transformation of the library passes every check, and every check can fail."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec, reshard

from tests.batteries.transformation_checks import CHECKS
from tests.registry.transformations import ENTRIES, Entry

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_battery(entry, check):
    if check in entry.opt_outs:
        pytest.skip(f"{entry.name} is not held to {check}: {entry.opt_outs[check]}")
    with jax.numpy_dtype_promotion(entry.promotion):
        CHECKS[check](entry)


def test_names_are_unique_and_opt_outs_are_real_checks_with_a_reason():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names)
    for entry in ENTRIES:
        assert entry.opt_outs.keys() <= CHECKS.keys(), entry.name
        assert all(reason.strip() for reason in entry.opt_outs.values()), entry.name


# --------------------------------------------------------- gradient descent, and ways to get it wrong one by one


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def descend(grads, rate=0.1):
    return jax.tree.map(lambda g: -rate * g, grads)


def transformation(update, init=zeros):
    return lambda learning_rate=0.1: optax.GradientTransformationExtraArgs(
        init, lambda grads, state, params=None, **extra_args: update(grads, state)
    )


def ignores_extra_args(learning_rate=0.1):
    return optax.GradientTransformation(zeros, lambda grads, state, params=None: (descend(grads), state))


def needs_a_number(learning_rate):
    return transformation(lambda grads, state: (descend(grads, float(learning_rate)), state))()


def freezes_the_schedule(learning_rate):
    rate = learning_rate(0) if callable(learning_rate) else learning_rate
    return transformation(lambda grads, state: (descend(grads, rate), state))()


def counts_in_python(learning_rate):
    calls = []

    def update(grads, state):
        calls.append(None)
        return descend(grads, learning_rate / len(calls)), state

    return transformation(update)()


def replicates(tree):
    """Drops the sharding of the state on a mesh of either kind."""
    explicit = jax.typeof(jax.tree.leaves(tree)[0]).sharding.mesh.axis_types[0] == jax.sharding.AxisType.Explicit
    place = reshard if explicit else jax.lax.with_sharding_constraint
    return jax.tree.map(lambda leaf: place(leaf, PartitionSpec()), tree)


def by_parent_key(grads):
    return jax.tree.map_with_path(lambda path, g: -0.1 * g if path[-1] else g, grads)


changes_type = transformation(lambda grads, count: (descend(grads), jnp.float32(count)), lambda params: jnp.int32(0))
loses_precision = transformation(lambda grads, state: (descend(grads), jax.tree.map(jnp.float32, state)))
loses_sharding = transformation(lambda grads, state: (descend(grads), replicates(state)))
# check -> (a transformation that breaks this promise, the error that says so)
BROKEN = {
    "unknown_extra_args": (ignores_extra_args, AssertionError),
    "traced_once": (changes_type, AssertionError),
    "tree_map_params": (
        transformation(lambda grads, state: (descend(grads), state), lambda params: {**params}),
        TypeError,
    ),
    "state_is_arrays": (
        transformation(lambda grads, state: (descend(grads), state), lambda params: 0.5),
        AssertionError,
    ),
    "injected_hyperparams": (needs_a_number, jax.errors.ConcretizationTypeError),
    "scheduled_learning_rate": (freezes_the_schedule, AssertionError),
    "multi_steps": (counts_in_python, AssertionError),
    "masked": (
        transformation(lambda grads, state: (descend({name: g + 0.0 for name, g in grads.items()}), state)),
        TypeError,
    ),
    "keeps_dtype": (
        transformation(lambda grads, state: (descend(jax.tree.map(jnp.float32, grads)), state)),
        AssertionError,
    ),
    "stable_through_cond": (loses_precision, TypeError),
    "containers": (transformation(lambda grads, state: (descend({**grads}), state)), TypeError),
    "bare_array": (transformation(lambda grads, state: (by_parent_key(grads), state)), IndexError),
    "sharding_auto": (loses_sharding, AssertionError),
    "sharding_explicit": (loses_sharding, AssertionError),
    "parabola": (transformation(lambda grads, state: (descend(grads, -0.1), state)), AssertionError),
    "rosenbrock": (transformation(lambda grads, state: (descend(grads, 1e-5), state)), AssertionError),
    "matrix": (
        transformation(lambda grads, state: (jax.tree.map(lambda g: -0.1 * g.at[1:].set(0.0), grads), state)),
        AssertionError,
    ),
    "mixed_ranks": (
        transformation(lambda grads, state: (jax.tree.map(lambda g: -0.1 * g * float(g.ndim > 0), grads), state)),
        AssertionError,
    ),
}


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_can_fail(check):
    factory, error = BROKEN[check]
    with pytest.raises(error):
        CHECKS[check](Entry("broken", factory, {"learning_rate": 0.1}))
