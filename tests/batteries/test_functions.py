"""What every function on arrays must pass, and losses and kernels with them; the rows are in `tests/registry`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import citation
from tests.registry.functions import ROWS

pytestmark = pytest.mark.contract
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def close(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5, **tolerance), actual, expected)


@check
def jitted(row):
    example = row.example(jnp.float32)
    close(jax.jit(row.function)(*example), row.function(*example))


@check
def mapped(row):
    first, second = row.example(jnp.float32), row.example(jnp.float32)
    second = (second[0][..., ::-1] * 2, *second[1:])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    one_by_one = [jax.jit(row.function)(*example) for example in (first, second)]
    close(jax.jit(jax.vmap(row.function))(*both), jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one))


@check
def gradient(row):
    first, *others = row.example(jnp.float32)
    total = lambda x: sum(jnp.sum(leaf * jnp.cos(leaf)) for leaf in jax.tree.leaves(row.function(x, *others)))
    found = jax.jit(jax.grad(total))(first)
    assert found.shape == first.shape and jnp.isfinite(found).all() and jnp.abs(found).max() > 0


@check
def dtype(row):
    for kind in (jnp.bfloat16, jnp.float32):
        types = {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(row.function, *row.example(kind)))}
        assert types == {jnp.dtype(kind)}


@check
def cited(row):
    assert row.paper is None or row.paper in citation(row.function)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_battery(row, check):
    assert row.opt_outs.keys() <= CHECKS.keys() and all(row.opt_outs.values())
    if check in row.opt_outs:
        pytest.skip(f"{row.name} is not held to {check}: {row.opt_outs[check]}")
    CHECKS[check](row)
