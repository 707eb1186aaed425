"""A pipeline whose boundaries are transformed while it trains: with momentum it trains as without."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_methods.models import (
    GPT,
    GPT_CONFIGS,
    gpt_transform_rules,
    split_gpt_params,
    transformable_gpt_params,
    transformable_gpt_stages,
)
from jaxlib_methods.parallel import StageModel, make_mesh, shard_batch, split_stages, synchronous_pipeline
from jaxlib_methods.parallel.unextractable import draw_transform, draw_transforms, morph_snapshot
from tests.jaxlib_methods.parallel.pipeline_problems import tokens

CONFIG = dataclasses.replace(
    GPT_CONFIGS["llama_tiny"], layers=2, width=8, heads=2, mlp_width=16, vocab_size=11, init_std=0.3
)
RULES = gpt_transform_rules(2, embed="^embed/", blocks="^blocks/", head="^head/")


@pytest.fixture(scope="module")
def problem():
    """(pipeline of two stages, its start, two micro-batches per step)."""
    parts = transformable_gpt_stages(CONFIG)
    loss = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(parts.head(p, x), y).mean()
    params = split_gpt_params(CONFIG, nnx.state(GPT(CONFIG, rngs=nnx.Rngs(0)), nnx.Param))
    rotations = [draw_transform(jax.random.key(k), 8).matrix for k in range(5)]
    stages = split_stages(transformable_gpt_params(CONFIG, params, rotations), 2)
    x, y = tokens(2, examples=4, length=5)
    model, mesh = StageModel(parts.embed, parts.block, loss), make_mesh(2)
    pipe = synchronous_pipeline(model, stages, optax.sgd(0.1, momentum=0.9), mesh, (x[0], y[0]), num_microbatches=2)
    return pipe, stages, shard_batch(mesh, (x, y))


def run(problem, spread=None, names=None):
    """Losses of six steps, with transforms after each of the first five; and the last state."""
    pipe, stages, batch = problem
    state, losses = pipe.init(stages), []
    for step in range(6):
        state, out = pipe.step(state, *batch)
        losses.append(np.asarray(out.loss))
        if names and step < 5:
            transforms = draw_transforms(jax.random.key(step), names, 8, spread=spread)
            state = pipe.restore(morph_snapshot(pipe.snapshot(state), transforms, RULES))
    return np.array(losses), pipe.snapshot(state)


def test_orthogonal_transforms_leave_training_as_it_is_and_skewed_ones_do_not(problem):
    names = [("boundary", 0), ("middle", 0), ("boundary", 1), ("middle", 1), ("boundary", 2)]
    plain, _ = run(problem)
    moved, snapshot = run(problem, names=names)
    assert plain[-1].mean() < plain[0].mean() - 0.1
    np.testing.assert_allclose(moved, plain, rtol=2e-5)
    skewed, _ = run(problem, names=names, spread=0.5)
    np.testing.assert_allclose(skewed[:2], plain[:2], rtol=2e-5)  # the transform after the first step changes nothing
    assert np.abs(skewed[-1] - plain[-1]).max() > 1e-3  # the steps that follow are another network's
    assert snapshot.updates == 6
    matrices = snapshot.params["blocks/0/transforms/Q1"]
    np.testing.assert_allclose(matrices.T @ matrices, np.eye(8), atol=1e-5)
