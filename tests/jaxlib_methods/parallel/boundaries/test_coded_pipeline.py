"""Codecs as hooks of pipelines on the fake devices: results, and bytes of the compiled program."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_methods import parallel
from jaxlib_methods.models import GPT, gpt_stages, split_gpt_params
from jaxlib_methods.parallel import boundaries
from jaxlib_methods.parallel.pipelines import communication
from tests.jaxlib_methods.parallel.pipeline_problems import (
    CONFIG,
    assert_trees_close,
    gpt,
    text,
    to_numpy,
    value_and_grad,
)

P, M = 4, 4
SUBSPACE_CONFIG = dataclasses.replace(CONFIG, layers=P + 1, subspace=6)
SUBSPACE = boundaries.random_subspace(key=jax.random.key(3), vocab_size=64, width=32, rank=6)


def subspace_gpt():
    """Four constrained blocks, and a fifth that is dense beside the head of the last stage."""
    fns = gpt_stages(SUBSPACE_CONFIG)

    def head(params, X, targets):
        return optax.softmax_cross_entropy_with_integer_labels(fns.head(params, X), targets).mean()

    params = split_gpt_params(SUBSPACE_CONFIG, nnx.state(GPT(SUBSPACE_CONFIG, rngs=nnx.Rngs(0)), nnx.Param))
    return boundaries.subspace_model(fns.embed, fns.block, head, SUBSPACE), params


def pipeline(model, stages, batch, forward, backward, optimizer):
    """Synchronous, with a codec for each direction."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    return parallel.synchronous_pipeline(
        model,
        stages,
        optimizer,
        parallel.make_mesh(P),
        batch=shapes,
        num_microbatches=M,
        forward_hook=boundaries.codec_hook(forward),
        backward_hook=boundaries.codec_hook(backward),
    )


def mean_over_microbatches(model, stages, batch):
    results = [value_and_grad(model, stages, inputs, targets) for inputs, targets in zip(*batch, strict=True)]
    losses, gradients = zip(*results, strict=True)
    return np.array(losses), jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *gradients)


@pytest.fixture(scope="module")
def coded():
    model, params = subspace_gpt()
    stages, batch = parallel.split_stages(params, P), text(M)
    codecs = boundaries.subspace_codec(SUBSPACE), boundaries.subspace_gradient_codec(SUBSPACE)
    pipe = pipeline(model, stages, batch, *codecs, optax.sgd(0.1))
    placed = parallel.shard_batch(parallel.make_mesh(P), batch)
    compiled = jax.jit(pipe.value_and_grad).lower(pipe.init(stages), *placed).compile()
    return model, stages, batch, codecs, pipe, placed, compiled


@pytest.mark.contract
def test_a_subspace_coded_pipeline_gives_the_loss_and_gradients_of_the_model(coded):
    model, stages, batch, _, pipe, placed, compiled = coded
    losses, gradients = compiled(pipe.init(stages), *placed)
    expected_losses, expected = mean_over_microbatches(model, stages, batch)
    finished = np.asarray(losses.microbatch)
    np.testing.assert_allclose(np.asarray(losses.loss)[finished >= 0], expected_losses, rtol=1e-6)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected))
    assert_trees_close(to_numpy(pipe.unpack(gradients)), list(expected), rtol=1e-4, atol=1e-6 * largest)


def test_the_compiled_program_sends_k_values_a_token_and_its_id(coded):
    _, _, batch, (forward, backward), _, _, compiled = coded
    examples, length = batch[0].shape[1:]
    tokens = examples * length
    X = jax.ShapeDtypeStruct((examples, length, 32), "float32")
    per_message = {
        1: boundaries.payload_bytes(forward, {"x": X, "ids": jax.ShapeDtypeStruct((examples, length), "int32")}),
        -1: boundaries.payload_bytes(backward, [X]),
    }
    assert per_message == {1: tokens * (6 * 4 + 1), -1: tokens * 6 * 4}
    sent = communication.link_bytes(compiled)
    assert set(sent) == {(j, j + d) for d in (1, -1) for j in range(P) if 0 <= j + d < P}
    for (source, target), size in sent.items():
        messages, rest = divmod(size, per_message[target - source])
        # A pair exchanges in every slot of its direction, also while the pipe fills and drains.
        assert rest == 0 and M <= messages <= M + P - 1, (source, target, size)


def test_deltas_at_both_ends_converge_to_the_exact_loss():
    """With weights that stand still, what a boundary has rebuilt of each micro-batch comes closer every step."""
    model, params = gpt()
    stages, batch = parallel.split_stages(params, P), text(M)
    pipe = pipeline(model, stages, batch, boundaries.delta_codec(4, M), boundaries.int8_codec(), optax.sgd(0.0))
    state, placed = pipe.init(stages), parallel.shard_batch(parallel.make_mesh(P), batch)
    expected, _ = mean_over_microbatches(model, stages, batch)
    errors = []
    for _ in range(4):
        state, out = pipe.step(state, *placed)
        errors.append(float(jnp.max(jnp.abs(out.loss[out.microbatch >= 0] - expected))))
    assert errors[0] > 1e-4 and errors[3] < 2e-5, errors
    assert all(after < 0.3 * before for before, after in itertools.pairwise(errors)), errors


def test_a_codec_that_does_not_fit_the_model_is_refused():
    model, params = gpt()
    stages, batch = parallel.split_stages(params, P), text(M)
    codecs = boundaries.subspace_codec(SUBSPACE), boundaries.subspace_gradient_codec(SUBSPACE)
    with pytest.raises(TypeError, match="dictionary with 'x' and 'ids'"):
        pipeline(model, stages, batch, *codecs, optax.sgd(0.1)).init(stages)
