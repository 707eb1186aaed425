"""What every flax nnx module must pass; the rows are in `tests/registry/modules.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlib_methods import citation
from tests.registry.modules import ROWS

pytestmark = [pytest.mark.contract, pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)]


def module_of(row):
    return row.make(nnx.Rngs(0))


def test_split_merge_and_jit_change_nothing(row):
    expected = module_of(row)(*row.inputs)
    graph, state = nnx.split(module_of(row))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    found = jax.jit(lambda state: nnx.merge(graph, state)(*row.inputs))(state)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_and_reach_inputs_and_parameters(row):
    graph, params, rest = nnx.split(module_of(row), nnx.Param, ...)
    x, *others = row.inputs

    def loss(params, x, rest):
        y = nnx.merge(graph, params, rest, copy=True)(x, *others)
        return jnp.sum(y * jnp.cos(y))

    of_params, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x, rest)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((of_params, of_x)))
    assert jnp.abs(of_x).max() > 0
    assert any(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params)) or not jax.tree.leaves(params)


def test_its_paper_is_cited(row):
    assert row.paper is None or row.paper in citation(type(module_of(row)))
