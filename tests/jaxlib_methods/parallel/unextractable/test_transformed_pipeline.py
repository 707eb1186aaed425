"""A pipeline whose boundaries are transformed while it trains: by momentum, or by Adam in coordinates, as without."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_methods import optimizers, trees
from jaxlib_methods.models import GPT, GPT_CONFIGS, GPTConfig, split_gpt_params
from jaxlib_methods.parallel import StageModel, make_mesh, shard_batch, split_stages, synchronous_pipeline
from jaxlib_methods.parallel.boundaries import fixed_embedding, random_subspace
from jaxlib_methods.parallel.unextractable import draw_transform, draw_transforms, morph_snapshot
from jaxlib_methods.parallel.unextractable.gpt import (
    STAGE_PATTERNS,
    gpt_transform_rules,
    transformable_gpt_params,
    transformable_gpt_stages,
)
from jaxlib_methods.parallel.unextractable.gpt_coordinates import (
    coordinate_gpt_mask,
    coordinate_gpt_params,
    coordinate_gpt_rules,
    coordinate_gpt_stages,
)
from tests.jaxlib_methods.parallel.pipeline_problems import tokens

CONFIG = dataclasses.replace(
    GPT_CONFIGS["llama_tiny"], layers=2, width=8, heads=2, mlp_width=16, vocab_size=11, init_std=0.3
)
SIZES = {"vocab_size": 11, "block_size": 5, "layers": 2, "width": 8, "heads": 2, "mlp_width": 16, "subspace": 3}
IN_COORDINATES = GPTConfig(**SIZES, full_rank_blocks=0, init_std=0.3)
NAMES = [("boundary", 0), ("middle", 0), ("boundary", 1), ("middle", 1), ("boundary", 2)]


def pipeline(parts, params, optimizer):
    """(pipeline of two stages, its start, two micro-batches per step)."""
    loss = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(parts.head(p, x), y).mean()
    stages, mesh = split_stages(params, 2), make_mesh(2)
    x, y = tokens(2, examples=4, length=5)
    model = StageModel(parts.embed, parts.block, loss)
    pipe = synchronous_pipeline(model, stages, optimizer, mesh, batch=(x[0], y[0]), num_microbatches=2)
    return pipe, stages, shard_batch(mesh, (x, y))


def drawn(config):
    return split_gpt_params(config, nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))


@pytest.fixture(scope="module")
def momentum():
    rotations = [draw_transform(8, key=jax.random.key(k)).matrix for k in range(5)]
    params = transformable_gpt_params(CONFIG, drawn(CONFIG), rotations)
    return pipeline(transformable_gpt_stages(CONFIG), params, optax.sgd(0.1, momentum=0.9))


@pytest.fixture(scope="module")
def adam():
    config, subspace = IN_COORDINATES, random_subspace(key=jax.random.key(1), vocab_size=11, width=8, rank=3)
    bases = [draw_transform(8, key=jax.random.key(k)).matrix[:, :3] for k in range(5)]
    decays = lambda params: trees.mask_tree(params, r"^(?!.*transforms/)")
    rule = optimizers.row_shared_adamw(0.03, weight_decay=0.1, mask=decays, shared=coordinate_gpt_mask)
    parts = coordinate_gpt_stages(config, functools.partial(fixed_embedding, subspace=subspace))
    params = coordinate_gpt_params(config, drawn(config), bases)
    return pipeline(parts, params, optax.chain(optax.clip_by_global_norm(1.0), rule))


def run(problem, draw=None, rules=()):
    """Losses of six steps, with transforms drawn after each of the first five; and the last state."""
    pipe, stages, batch = problem
    state, losses = pipe.init(stages), []
    for step in range(6):
        state, out = pipe.step(state, *batch)
        losses.append(np.asarray(out.loss))
        if draw and step < 5:
            state = pipe.restore(morph_snapshot(pipe.snapshot(state), draw(jax.random.key(step)), rules))
    return np.array(losses), pipe.snapshot(state)


def check_that_only_skewed_transforms_change_training(problem, width, rules, rtol):
    """Returns the last state without transforms, and with orthogonal ones."""
    draw = lambda key, spread=None: draw_transforms(NAMES, width, key=key, spread=spread)
    plain, start = run(problem)
    moved, snapshot = run(problem, draw, rules)
    assert plain[-1].mean() < plain[0].mean() - 0.1
    np.testing.assert_allclose(moved, plain, rtol=rtol)
    skewed, _ = run(problem, functools.partial(draw, spread=0.5), rules)
    np.testing.assert_allclose(skewed[:2], plain[:2], rtol=rtol)  # the transform after the first step changes nothing
    assert np.abs(skewed[-1] - plain[-1]).max() > 1e-3  # the steps that follow are another network's
    assert snapshot.updates == 6
    return start, snapshot


@pytest.mark.contract
def test_with_momentum_orthogonal_transforms_leave_training_as_it_is_and_skewed_ones_do_not(momentum):
    rules = gpt_transform_rules(2, patterns=STAGE_PATTERNS)
    _, snapshot = check_that_only_skewed_transforms_change_training(momentum, 8, rules, rtol=2e-5)
    matrices = snapshot.params["blocks/0/transforms/Q1"]
    np.testing.assert_allclose(matrices.T @ matrices, np.eye(8), atol=1e-5)


def test_adam_in_coordinates_trains_on_as_if_there_were_no_transforms(adam):
    rules = coordinate_gpt_rules(2, patterns=STAGE_PATTERNS)
    start, snapshot = check_that_only_skewed_transforms_change_training(adam, 3, rules, rtol=1e-4)
    name = "blocks/0/transforms/D1"
    assert np.abs(snapshot.params[name] - start.params[name]).max() > 0.1
    np.testing.assert_allclose(snapshot.params[name] @ snapshot.params[name].T, np.eye(3), atol=1e-5)
