"""GPipe, 1F1B and circular pipelines against JAX's gradient of the model without a pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods.parallel import StageModel, make_mesh, shard_batch, split_stages, synchronous_pipeline
from tests.jaxlib_methods.parallel.pipeline_problems import assert_trees_close, chain, tokens, value_and_grad

CASES = [
    # schedule, P, D, M, R, remat
    ("gpipe", 4, 1, 3, 1, True),
    ("gpipe", 2, 2, 4, 1, False),
    ("1f1b", 4, 2, 6, 1, True),
    ("1f1b", 3, 1, 2, 1, True),
    ("1f1b", 1, 1, 2, 1, True),
    ("circular", 2, 1, 4, 2, True),
    ("circular", 2, 2, 4, 3, False),
    ("circular", 1, 1, 3, 2, True),
]


def reference(model, stages, inputs, targets, repeats):
    """Mean loss and gradient over the micro-batches, without a pipeline."""
    losses, grads = [], []
    for x, y in zip(inputs, targets, strict=True):
        loss, grad = value_and_grad(model, stages, x, y, repeats)
        losses.append(loss)
        grads.append(grad)
    return np.array(losses), jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *grads)


@pytest.mark.contract
@pytest.mark.parametrize(("schedule", "P", "D", "M", "R", "remat"), CASES)
def test_loss_and_gradients_are_those_without_a_pipeline(schedule, P, D, M, R, remat):
    model, params = chain(layers=P * R)
    stages = split_stages(params, P, R)
    inputs, targets = tokens(M)
    mesh = make_mesh(P, D)
    pipe = synchronous_pipeline(
        model,
        stages,
        optax.sgd(0.1),
        mesh,
        batch=(inputs[0], targets[0]),
        num_microbatches=M,
        schedule=schedule,
        num_rounds=R,
        remat=remat,
    )
    losses, grads = pipe.value_and_grad(pipe.init(stages), *shard_batch(mesh, (inputs, targets), vocab_size=11))
    expected_losses, expected = reference(model, stages, inputs, targets, R)
    np.testing.assert_allclose(losses.loss, expected_losses, rtol=1e-6)
    assert_trees_close(pipe.unpack(grads), list(expected), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["1f1b", "circular"])
def test_activations_may_be_trees_with_integers(schedule):
    """Token ids travel with the activations, and every block looks its own table up."""
    P = 2
    plain, (table, _, head) = chain()
    model = StageModel(
        embed=lambda params, ids: {"x": params[ids], "ids": ids},
        block=lambda params, tree: tree | {"x": jnp.tanh(tree["x"] + params[tree["ids"]])},
        head=lambda params, tree, y: plain.head(params, tree["x"], y),
    )
    stages = split_stages((table, [table * 2, table * 3], head), P)
    (inputs, targets), mesh = tokens(3), make_mesh(P)
    pipe = synchronous_pipeline(
        model, stages, optax.sgd(0.1), mesh, batch=(inputs[0], targets[0]), num_microbatches=3, schedule=schedule
    )
    losses, grads = pipe.value_and_grad(pipe.init(stages), *shard_batch(mesh, (inputs, targets)))
    expected_losses, expected = reference(model, stages, inputs, targets, 1)
    np.testing.assert_allclose(losses.loss, expected_losses, rtol=1e-6)
    assert_trees_close(pipe.unpack(grads), list(expected), rtol=2e-5, atol=1e-7)


def test_what_is_kept_is_not_computed_again():
    """Matrix products of the program: with recomputation, those of the forward pass stand in it twice."""
    model, params = chain(layers=2)
    stages, (inputs, targets), mesh, products = split_stages(params, 2), tokens(2), make_mesh(2), {}
    for remat in (True, False):
        pipe = synchronous_pipeline(
            model,
            stages,
            optax.sgd(0.1),
            mesh,
            batch=(inputs[0], targets[0]),
            num_microbatches=2,
            schedule="circular",
            remat=remat,
        )
        lowered = jax.jit(pipe.value_and_grad).lower(pipe.init(stages), *shard_batch(mesh, (inputs, targets)))
        products[remat] = lowered.as_text().count("stablehlo.dot_general")
    forward = 1 + 1 + 2  # a block between, a block after the embedding, a block before the head and the head
    assert products == {True: (1 + 1 + 2) * forward, False: (1 + 2) * forward}
