"""Averaging, coordinates, verification and transforms on one asynchronous pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_methods import models, optimizers
from jaxlib_methods.parallel import (
    StageModel,
    asynchronous_pipeline,
    make_mesh,
    sequential_loss,
    shard_batch,
    split_stages,
    unextractable,
)
from jaxlib_methods.parallel.boundaries import fixed_embedding, random_subspace
from jaxlib_methods.parallel.integrity import Attack, VerifierConfig, find_verifiers, guard_model, verification_hook
from jaxlib_methods.parallel.replicas import diloco, sparse_averaging
from jaxlib_methods.parallel.unextractable import draw_transform, draw_transforms, morph_pipeline
from tests.jaxlib_methods.parallel.pipeline_problems import assert_trees_close, tokens

P, R, RANK = 2, 2, 4
GPT = dataclasses.replace(
    models.GPT_CONFIGS["llama_tiny"],
    layers=2, width=8, heads=2, mlp_width=16, vocab_size=11, init_std=0.3, subspace=RANK, full_rank_blocks=0,
)  # fmt: skip
RULES = unextractable.gpt_coordinates.coordinate_gpt_rules(2, patterns=unextractable.gpt.STAGE_PATTERNS)
NAMES = [("boundary", 0), ("middle", 0), ("boundary", 1), ("middle", 1), ("boundary", 2)]
BETWEEN = [("boundary", 1)]
KEY = jax.random.key(4)
COUNT = 8  # micro-batches between two transforms


@pytest.fixture(scope="module")
def problem():
    """(model, stages) of a network in coordinates with private bases."""
    subspace = random_subspace(key=KEY, vocab_size=GPT.vocab_size, width=GPT.width, rank=RANK)
    parts = unextractable.gpt_coordinates.coordinate_gpt_stages(GPT, lambda ids: fixed_embedding(ids, subspace))
    loss = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(parts.head(p, x), y).mean()
    params = models.split_gpt_params(GPT, nnx.state(models.GPT(GPT, rngs=nnx.Rngs(0)), nnx.Param))
    bases = [draw_transform(GPT.width, key=jax.random.key(k)).matrix[:, :RANK] for k in range(5)]
    return StageModel(parts.embed, parts.block, loss), split_stages(
        unextractable.gpt_coordinates.coordinate_gpt_params(GPT, params, bases), P
    )


def pipeline(problem, data_hook):
    """Averages all weights, three updates late: of a part of them, the choice would depend on the coordinates."""
    model, stages = problem
    mesh, x = make_mesh(P, R), np.zeros((4, 5), np.int32)
    attack = Attack("scale", stage=0, replica=1, direction="forward", value=-3.0, start=3 * COUNT + 2)
    hooks = {
        f"{direction}_hook": verification_hook(
            VerifierConfig(warmup_steps=2 * COUNT, fence_factor=5.0, distances=("euclidean", "wasserstein")),
            mesh,
            direction,
            key=KEY,
            attacks=[attack],
        )
        for direction in ("forward", "backward")
    }
    rule = optimizers.row_shared_adamw(1e-2, weight_decay=0.0, shared=unextractable.gpt_coordinates.coordinate_gpt_mask)
    of_all = guard_model(model), stages, rule, mesh
    return asynchronous_pipeline(*of_all, batch=(x, x), average_gradients=False, data_hook=data_hook, **hooks)


@pytest.fixture(scope="module")
def pipe(problem):
    return pipeline(problem, sparse_averaging(1.0, key=KEY, delay=3, method="ema"))


def batches(pipe, part):
    x, y = tokens(COUNT, examples=4, length=5, seed=part)
    return shard_batch(pipe.layout.mesh, (x, (x + y % 2) % 11))


def train(pipe, stages, transform=True, parts=3):
    """Losses of so many times eight micro-batches, with the pipe drained and its replicas replaced between."""
    state, losses = pipe.init(stages), []
    for part in range(parts):
        state, out = pipe.step(state, *batches(pipe, part))
        state, rest = pipe.drain(state)
        losses += [float(loss) for done in (out, rest) for loss, m in zip(*done, strict=True) if m >= 0]
        if part == parts - 1:
            break
        transforms = draw_transforms(NAMES, RANK, key=jax.random.key(part))
        if transform:
            state = morph_pipeline(pipe, state, transforms, RULES, boundaries=BETWEEN)
        else:
            state = pipe.replace(state, [pipe.snapshot(state, replica) for replica in range(R)])
    return np.array(losses), state


def verifiers(pipe, state, field="reference"):
    """A field of the verifiers by direction, [P, R, ...]."""
    return {name: np.asarray(getattr(v, field)) for name, v in find_verifiers(pipe, state).items()}


@pytest.mark.contract
def test_with_all_plug_ins_training_is_the_same_whatever_the_coordinates(pipe, problem):
    plain, state = train(pipe, problem[1], transform=False)
    moved, other = train(pipe, problem[1])
    assert len(plain) == 3 * COUNT and plain[-COUNT:].mean() < plain[:COUNT].mean() - 0.05
    np.testing.assert_allclose(moved, plain, rtol=1e-4)
    for one in (state, other):
        assert not any(map(np.any, verifiers(pipe, one, "bans").values()))
        assert np.asarray(one.updates).tolist() == P * [R * [3 * COUNT]]
        assert np.asarray(one.data_hook.steps).tolist() == P * [R * [3 * COUNT]]
    assert_trees_close(verifiers(pipe, other, "window"), verifiers(pipe, state, "window"), rtol=2e-3, atol=1e-5)
    same, turned = (np.asarray(pipe.stages(one)[0]["blocks"][0]["transforms"]["Q2"]) for one in (state, other))
    np.testing.assert_array_equal(same, np.eye(RANK))
    assert np.abs(turned - same).max() > 0.3


def test_replicas_keep_their_own_functions_and_references_follow(pipe, problem):
    model, stages = problem
    _, state = train(pipe, stages, parts=1)
    x, y = (jnp.asarray(np.asarray(array)[0]) for array in batches(pipe, 9))
    loss = jax.jit(lambda stages: sequential_loss(model, stages, x, y))
    losses = lambda state: [float(loss(pipe.stages(state, replica))) for replica in range(R)]
    before, references = losses(state), verifiers(pipe, state)
    transforms = draw_transforms(NAMES, RANK, key=jax.random.key(0), spread=0.3)
    state = morph_pipeline(pipe, state, transforms, RULES, boundaries=BETWEEN, second_moments="keep")
    np.testing.assert_allclose(losses(state), before, rtol=2e-5)
    assert abs(before[0] - before[1]) > 1e-4
    T = transforms["boundary", 1]
    moved = verifiers(pipe, state)
    expected = references["forward"][1, 0] @ T.matrix, references["backward"][0, 0] @ T.inverse.T
    np.testing.assert_allclose(moved["forward"][1, 0], expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved["backward"][0, 1], expected[1], rtol=1e-4, atol=1e-7)
    assert np.abs(references["forward"][1]).max() > 0.1


def test_an_attacker_is_banned_across_a_change_of_coordinates(pipe, problem):
    losses, state = train(pipe, problem[1], parts=5)
    bans = verifiers(pipe, state, "bans")
    np.testing.assert_array_equal(bans["forward"][1], [[0, 1], [0, 1]])
    assert not bans["backward"].any() and np.isfinite(losses).all()


def test_what_cannot_be_replaced_is_named(pipe, problem):
    state = pipe.init(problem[1])
    snapshots = [pipe.snapshot(state, replica) for replica in range(R)]
    with pytest.raises(ValueError, match="snapshots must be one for each of the 2 replicas, got 1"):
        pipe.replace(state, snapshots[:1])
    with pytest.raises(ValueError, match="boundaries must name the transforms at 1 boundaries of stages, got 0"):
        morph_pipeline(pipe, state, {}, RULES, boundaries=[])
    flowing, _ = pipe.step(pipe.init(problem[1]), *batches(pipe, 0))
    with pytest.raises(ValueError, match="micro-batches are in flight"):
        pipe.replace(flowing, snapshots)
    other = pipeline(problem, diloco(5))
    with pytest.raises(ValueError, match="cannot restart"):
        other.replace(other.init(problem[1]), snapshots)
