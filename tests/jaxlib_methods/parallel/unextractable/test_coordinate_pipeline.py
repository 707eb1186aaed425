"""Subspace coding, transforms and Adam in one pipeline: it trains as without transforms."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_methods import optimizers, trees
from jaxlib_methods.models import (
    GPT,
    GPTConfig,
    coordinate_gpt_mask,
    coordinate_gpt_params,
    coordinate_gpt_rules,
    coordinate_gpt_stages,
    split_gpt_params,
)
from jaxlib_methods.parallel import StageModel, make_mesh, shard_batch, split_stages, synchronous_pipeline
from jaxlib_methods.parallel.codecs import fixed_embedding, random_subspace
from jaxlib_methods.parallel.unextractable import draw_transform, draw_transforms, morph_snapshot
from tests.jaxlib_methods.parallel.pipeline_problems import tokens

SIZES = {"vocab_size": 11, "block_size": 5, "layers": 2, "width": 8, "heads": 2, "mlp_width": 16, "subspace": 3}
CONFIG = GPTConfig(**SIZES, full_rank_blocks=0, init_std=0.3)
RULES = coordinate_gpt_rules(2, embed="^embed/", blocks="^blocks/", head="^head/")
NAMES = [("boundary", 0), ("middle", 0), ("boundary", 1), ("middle", 1), ("boundary", 2)]


@pytest.fixture(scope="module")
def problem():
    """(pipeline of two stages, its start, two micro-batches per step)."""
    subspace = random_subspace(jax.random.key(1), vocab_size=11, width=8, rank=3)
    parts = coordinate_gpt_stages(CONFIG, functools.partial(fixed_embedding, subspace=subspace))
    loss = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(parts.head(p, x), y).mean()
    params = split_gpt_params(CONFIG, nnx.state(GPT(CONFIG, rngs=nnx.Rngs(0)), nnx.Param))
    bases = [draw_transform(jax.random.key(k), 8).matrix[:, :3] for k in range(5)]
    stages = split_stages(coordinate_gpt_params(CONFIG, params, bases), 2)
    decays = lambda params: trees.mask_tree(params, r"^(?!.*transforms/)")
    adam = optimizers.row_shared_adamw(0.03, weight_decay=0.1, mask=decays, shared=coordinate_gpt_mask)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adam)
    x, y = tokens(2, examples=4, length=5)
    model, mesh = StageModel(parts.embed, parts.block, loss), make_mesh(2)
    pipe = synchronous_pipeline(model, stages, tx, mesh, (x[0], y[0]), num_microbatches=2)
    return pipe, stages, shard_batch(mesh, (x, y))


def run(problem, spread=None, names=()):
    """Losses of six steps, with transforms after each of the first five; and the last state."""
    pipe, stages, batch = problem
    state, losses = pipe.init(stages), []
    for step in range(6):
        state, out = pipe.step(state, *batch)
        losses.append(np.asarray(out.loss))
        if names and step < 5:
            transforms = draw_transforms(jax.random.key(step), names, 3, spread=spread)
            state = pipe.restore(morph_snapshot(pipe.snapshot(state), transforms, RULES))
    return np.array(losses), pipe.snapshot(state)


def test_adam_in_coordinates_trains_on_as_if_there_were_no_transforms(problem):
    plain, start = run(problem)
    moved, snapshot = run(problem, names=NAMES)
    assert plain[-1].mean() < plain[0].mean() - 0.1
    np.testing.assert_allclose(moved, plain, rtol=1e-4)
    skewed, _ = run(problem, names=NAMES, spread=0.5)
    np.testing.assert_allclose(skewed[:2], plain[:2], rtol=1e-4)
    assert np.abs(skewed[-1] - plain[-1]).max() > 1e-3
    name = "blocks/0/transforms/D1"
    assert np.abs(snapshot.params[name] - start.params[name]).max() > 0.1
    np.testing.assert_allclose(snapshot.params[name] @ snapshot.params[name].T, np.eye(3), atol=1e-5)
