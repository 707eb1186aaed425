"""Averaging as a pipeline's data hook: against synchronous data parallelism, and a loop without a pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import parallel
from tests.jaxlib_methods.parallel.pipeline_problems import (
    assert_trees_close,
    chain,
    to_numpy,
    tokens,
    value_and_grad,
)

KEY = jax.random.key(5)
MODEL, PARAMS = chain()


def replicas(pipe, state):
    """The newest parameters of all stages of every replica, packed: [D][stage, ...]."""
    packed = pipe.current(state)[0]
    return [jax.tree.map(lambda leaf, r=r: np.asarray(leaf)[:, r], packed) for r in range(pipe.layout.num_replicas)]


def pipeline(P, D, optimizer, **options):
    stages = parallel.split_stages(PARAMS, P)
    mesh = parallel.make_mesh(P, D)
    inputs, targets = tokens(12, examples=2 * D)
    pipe = parallel.asynchronous_pipeline(MODEL, stages, optimizer, mesh, batch=(inputs[0], targets[0]), **options)
    state, losses = pipe.step(pipe.init(stages), *parallel.shard_batch(mesh, (inputs, targets)))
    return pipe, state, to_numpy(losses)


@pytest.mark.contract
def test_averaging_everything_after_sgd_is_averaging_the_gradients():
    averaging = parallel.replicas.sparse_averaging(1.0, key=KEY, delay=0, method="avg")
    pipe, state, losses = pipeline(2, 2, optax.sgd(0.3), average_gradients=False, data_hook=averaging)
    _, other, expected = pipeline(2, 2, optax.sgd(0.3))
    np.testing.assert_allclose(losses.loss, expected.loss, rtol=1e-5)
    assert_trees_close(replicas(pipe, state), replicas(pipe, other), atol=1e-6)
    first, second = replicas(pipe, state)
    assert_trees_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    "averaging",
    [
        parallel.replicas.sparse_averaging(0.3, key=KEY, delay=2, ema_weight=0.5),
        parallel.replicas.diloco(3),
        parallel.replicas.streaming_diloco(4, [(r"common/0", 0), (".", 1)]),
    ],
    ids=["sparse", "diloco", "streaming"],
)
def test_one_stage_equals_the_loop_without_a_pipeline(averaging):
    optimizer = optax.sgd(0.3)
    pipe, state, _ = pipeline(1, 2, optimizer, average_gradients=False, data_hook=averaging)
    (stage,) = parallel.split_stages(PARAMS, 1)
    packing = pipe.layout.params
    x = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), stage)
    of_hook = jax.vmap(lambda tree: averaging.init(packing.pack(0, tree)))(x)

    @jax.jit
    def step(x, of_hook, inputs, targets):
        grads = jax.vmap(lambda tree, *batch: value_and_grad(MODEL, (tree,), *batch)[1][0])(x, inputs, targets)
        x = jax.tree.map(lambda w, g: w - 0.3 * g, x, grads)
        packed, of_hook = jax.vmap(averaging.apply, axis_name="data")(
            jax.vmap(lambda t: packing.pack(0, t))(x), of_hook
        )
        return jax.vmap(lambda packed: packing.unpack(0, packed))(packed), of_hook

    inputs, targets = (batch.reshape(12, 2, 2, -1) for batch in tokens(12, examples=4))
    for batch in zip(inputs, targets, strict=True):
        x, of_hook = step(x, of_hook, *batch)
    packed = jax.vmap(lambda tree: packing.pack(0, tree))(x)
    for r, replica in enumerate(replicas(pipe, state)):
        assert_trees_close(
            jax.tree.map(lambda leaf: leaf[0], replica), jax.tree.map(lambda leaf: leaf[r], packed), atol=2e-6
        )


def test_replicas_drift_apart_and_sparse_averaging_holds_them_together():
    spread = lambda pipe, state: sum(
        float(np.square(a - b).sum()) for a, b in zip(*map(jax.tree.leaves, replicas(pipe, state)), strict=True)
    )
    alone = spread(*pipeline(2, 2, optax.sgd(0.3), average_gradients=False)[:2])
    averaging = parallel.replicas.sparse_averaging(0.25, key=KEY, delay=1)
    together = spread(*pipeline(2, 2, optax.sgd(0.3), average_gradients=False, data_hook=averaging)[:2])
    assert together < 0.6 * alone
