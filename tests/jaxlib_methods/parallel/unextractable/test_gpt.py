"""A GPT with transformed boundaries computes what it did; stages of different times do not fit together."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlib_methods.models import GPT, GPT_CONFIGS, GPTConfig, split_gpt_params
from jaxlib_methods.parallel.unextractable import draw_transform, draw_transforms, estimate_bridge, morph
from jaxlib_methods.parallel.unextractable.gpt import (
    gpt_transform_rules,
    transformable_gpt_params,
    transformable_gpt_stages,
)

CONFIG = dataclasses.replace(
    GPT_CONFIGS["llama_tiny"], layers=2, width=8, heads=2, mlp_width=16, vocab_size=50, init_std=0.5, bias=True
)
TOKENS = jnp.arange(12).reshape(2, 6) % 50
RULES = gpt_transform_rules(2)
NAMES = [("boundary", 0), ("middle", 0), ("boundary", 1), ("middle", 1), ("boundary", 2)]


def rotations(width=8, count=5):
    return [draw_transform(width, key=jax.random.key(100 + k)).matrix for k in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def logits(stages, params):
    embed, blocks, head = params
    x = stages.embed(embed, TOKENS)
    for block in blocks:
        x = stages.block(block, x)
    return stages.head(head, x)


@functools.cache
def build(dtype="float64"):
    """(what the plain model says, stages, parameters), with gains and biases as in a trained model."""
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype)
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))
    ramp = lambda p: jnp.linspace(0.5, 2.0, p.size, dtype=p.dtype) if p.ndim == 1 else p
    init = lambda: jax.tree.map(ramp, nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))
    state, plain = jax.jit(init)(), jax.jit(lambda state: nnx.merge(graph, state)(TOKENS))
    params = transformable_gpt_params(config, split_gpt_params(config, state), rotations(config.width))
    return plain(state), transformable_gpt_stages(config), params


def difference(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(a).max())


@pytest.mark.contract
def test_the_function_stays_after_fifty_orthogonal_and_fifty_skewed_transforms(flax_x64):
    plain, stages, params = build()
    assert difference(plain, logits(stages, params)) < 1e-14
    start = params
    for k in range(100):
        spread = None if k < 50 else 0.1
        params = morph(params, draw_transforms(NAMES, 8, key=jax.random.key(k), spread=spread), RULES)
        if k == 49:
            assert difference(plain, logits(stages, params)) < 1e-13
    assert difference(plain, logits(stages, params)) < 1e-12
    moved = [
        not np.allclose(a, b, atol=0.1) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True)
    ]
    # embedding, four matrices, two kernels and two biases a block, and the head's matrix
    assert sum(moved) == 1 + 2 * 8 + 1


def test_one_block_keeps_its_function_between_the_frames_of_its_ends(flax_x64):
    _, stages, (_, blocks, _) = build()
    X, block, rules = jax.random.normal(jax.random.key(1), (2, 6, 8), jnp.float64), blocks[0], gpt_transform_rules(1)
    before = stages.block(block, X)
    frames = {name: np.eye(8) for name in NAMES[:3]}
    rules = [(regex.removeprefix("^1/0/"), sides) for regex, sides in rules if regex.startswith("^1/")]
    for k in range(100):
        T = draw_transforms(NAMES[:3], 8, key=jax.random.key(k), spread=None if k < 50 else 0.1)
        block = morph(block, T, rules)
        frames = {name: frames[name] @ T[name].matrix for name in frames}
    after = stages.block(block, X @ frames["boundary", 0]) @ np.linalg.inv(frames["boundary", 2 - 1])
    assert float(jnp.abs(after - before).max()) < 1e-12


def test_gains_without_the_rotation_change_a_trained_model(flax_x64):
    plain, stages, (embed, blocks, head) = build()
    O = rotations()[0]
    wrong = morph(
        blocks[0],
        {"O": draw_transform(8, key=jax.random.key(100))},
        [("block/attention/(query|key|value)", ("O", None))],
    )
    np.testing.assert_allclose(  # undoes the O^T of U(0) = O^T diag(w) U
        wrong["block"]["attention"]["query"]["kernel"], O.T @ blocks[0]["block"]["attention"]["query"]["kernel"]
    )
    right = morph(blocks[0], {}, [("block/attention/(query|key|value)", (None, None))])
    assert difference(plain, logits(stages, (embed, [right, blocks[1]], head))) < 1e-14
    assert difference(plain, logits(stages, (embed, [wrong, blocks[1]], head))) > 0.01


def test_interior_boundaries_may_be_dropped_and_entries_moved(flax_x64):
    plain, stages, params = build()
    outer = draw_transforms([("boundary", 0), ("boundary", 2)], 8, key=jax.random.key(1))
    new = morph(params, outer, RULES)
    assert difference(plain, logits(stages, new)) < 1e-13
    np.testing.assert_array_equal(
        new[1][0]["block"]["mlp"]["down"]["kernel"], params[1][0]["block"]["mlp"]["down"]["kernel"]
    )
    names = [*NAMES, *(("entry", i, k) for i in range(2) for k in (1, 2))]
    new = morph(params, draw_transforms(names, 8, key=jax.random.key(1)), gpt_transform_rules(2, entries=True))
    assert difference(plain, logits(stages, new)) < 1e-13
    for old, block in zip(params[1], new[1], strict=True):
        same = jax.tree.map(lambda a, b: bool(np.allclose(a, b)), old, block)
        assert sum(jax.tree.leaves(same)) == 4  # the gains, and the biases of up and gate


def test_stages_of_different_times_do_not_fit_and_a_known_transform_repairs_them(flax_x64):
    plain, stages, params = build()
    first, second, third = (draw_transforms(NAMES, 8, key=jax.random.key(k)) for k in range(3))
    at_one = morph(params, first, RULES)
    at_two = morph(at_one, second, RULES)
    at_three = morph(at_two, third, RULES)
    embed, blocks, _ = at_one
    far = (embed, [blocks[0], at_three[1][1]], at_three[2])
    assert difference(plain, logits(stages, far)) > 0.3
    near = (embed, [blocks[0], at_two[1][1]], at_two[2])
    assert difference(plain, logits(stages, near)) > 0.3
    bridge = {("boundary", 1): second["boundary", 1]}
    repaired = (embed, [_exit(blocks[0], bridge), near[1][1]], near[2])
    assert difference(plain, logits(stages, repaired)) < 1e-13
    # the matrix-system attack finds the same bridge from the same inputs
    X = stages.block(blocks[0], stages.embed(embed, TOKENS))
    later = stages.block(at_two[1][0], stages.embed(at_two[0], TOKENS))
    assert np.abs(estimate_bridge(X, later) - second["boundary", 1].matrix).max() < 1e-6


def _exit(block, transforms):
    return morph(block, transforms, [("transforms/Q2", (None, ("boundary", 1))), ("mlp/down", (None, ("boundary", 1)))])


def test_matrices_are_constants_unless_told_otherwise():
    _, stages, params = build("float32")
    loss = lambda stages: lambda params: jnp.sum(logits(stages, params) ** 2)
    size = lambda tree: [float(jnp.abs(g).max()) for g in jax.tree.leaves(tree)]
    gradients = jax.jit(jax.grad(loss(stages)))(params)
    assert max(size(gradients[1][0]["transforms"])) == 0 and max(size(gradients[2]["transforms"])) == 0
    assert min(size(gradients[1][0]["block"]["attention"])) > 0
    trained = jax.jit(jax.grad(loss(transformable_gpt_stages(CONFIG, train_transforms=True))))(params)
    assert min(size(trained[1][0]["transforms"])) > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTConfig(width=8, heads=2), "transforms need norm='rms', got 'layer'"),
        (dataclasses.replace(CONFIG, tied=True), "a tied head would have to be transformed"),
    ],
)
def test_models_that_cannot_be_transformed_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        transformable_gpt_stages(config)


def test_the_number_of_rotations_is_checked():
    params = split_gpt_params(CONFIG, nnx.state(GPT(CONFIG, rngs=nnx.Rngs(0)), nnx.Param))
    with pytest.raises(ValueError, match="two for each block and one, 5, got 2"):
        transformable_gpt_params(CONFIG, params, rotations()[:2])
    assert math.isclose(float(jnp.sum(params[2]["norm"]["scale"][...])), 8)
