"""Verification inside of pipelines: on one device, where cascades are studied, and on a mesh of eight fake devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods.parallel import make_mesh, shard_batch, split_stages, synchronous_pipeline
from jaxlib_methods.parallel.boundaries import cast_codec, codec_hook
from jaxlib_methods.parallel.integrity import (
    Attack,
    VerifiedPipeline,
    VerifierConfig,
    find_verifiers,
    guard_model,
    share_bans,
    verification_hook,
)
from jaxlib_methods.parallel.pipelines.hooks import HookStates, chain_hooks
from tests.jaxlib_methods.parallel.pipeline_problems import assert_trees_equal, chain, tokens

S, R = 6, 5
# Wide fences: no false alarms in short tests.
OPTIONS = VerifierConfig(warmup_steps=30, window=20, num_directions=8, fence_factor=6.0)
MODEL, PARAMS = chain(layers=S)
STAGES = split_stages(PARAMS, S)


@functools.partial(jax.jit, static_argnums=0)
def run(pipeline, state, stages, inputs, targets, start):
    """Steps at fixed parameters: what the verifiers see is i.i.d."""

    def one(state, step):
        x, y, t = step
        key = jax.random.fold_in(KEY, t)
        losses, gradients, state, verdicts = pipeline.value_and_grad(stages, x, y, state, key=key)
        finite = jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradients)])
        return state, (losses, verdicts, jnp.all(finite), sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients)))

    numbers = start + jnp.arange(inputs.shape[0], dtype=jnp.int32)
    return jax.lax.scan(one, state, (inputs, targets, numbers))


KEY = jax.random.key(0)


def simulate(attacks=(), steps=45, **options):
    verifiers = {"forward": OPTIONS, "backward": OPTIONS}
    pipeline = VerifiedPipeline(MODEL, R, attacks=tuple(attacks), **(verifiers | options))
    inputs, targets = (a.reshape(steps, R, 8, 3) for a in tokens(steps, examples=8 * R, length=3))
    state = pipeline.init(STAGES, inputs[0, 0], key=KEY)
    return run(pipeline, state, STAGES, inputs, targets, jnp.int32(0))


def violations(state, direction):
    verifiers = getattr(state, direction)
    return np.asarray(verifiers.violations + 5 * verifiers.bans)


@pytest.mark.contract
def test_the_worker_who_attacks_is_found_and_not_those_behind_him():
    attack = Attack("scale", stage=2, replica=1, direction="both", value=-1.0, start=35)
    state, (losses, verdicts, finite, _) = simulate([attack])
    expected = np.zeros((S - 1, R), int)
    expected[2, 1] = 5
    np.testing.assert_array_equal(violations(state, "forward"), expected)
    np.testing.assert_array_equal(violations(state, "backward"), 0)
    assert state.forward.bans[2, 1] == 1
    # After five messages the worker is banned, and an honest one takes the slot. His gradients were tainted already.
    assert not verdicts.forward[35:40, 2, 1].any() and verdicts.forward.sum() == verdicts.forward.size - 5
    assert verdicts.backward.all()
    assert (losses[35:40, 1] == 0).all() and np.delete(losses, np.s_[35:40], axis=0).min() > 0
    assert losses[35:40, 0].min() > 0 and finite.all()


def test_who_colludes_with_an_attacker_is_found_with_him():
    plan = [Attack("scale", stage=2, replica=r, value=value, start=35) for r, value in ((1, -1.0), (3, 1.0), (4, 1.0))]
    state, _ = simulate(plan, steps=40, collusion=0.6)  # the second sends the first's, the third his own: honest ones
    expected = np.zeros((S - 1, R), int)
    expected[2, [1, 3]] = 5
    np.testing.assert_array_equal(violations(state, "forward"), expected)
    np.testing.assert_array_equal(violations(state, "backward"), 0)


def test_without_the_taint_honest_workers_behind_an_attacker_are_blamed():
    attack = Attack("scale", stage=2, replica=1, direction="forward", value=-1.0, start=40)
    state, _ = simulate([attack], cascade=False, steps=44)
    blamed = violations(state, "forward")
    assert blamed[2, 1] == 4 and (blamed[3:, 1] > 0).any() and not np.delete(blamed, 1, axis=1).any()


def test_false_gradients_are_found_where_they_are_sent_and_what_is_not_finite_is_contained():
    attacks = [
        Attack("constant", stage=3, replica=4, direction="backward", value=float("nan"), start=35),
        Attack("constant", stage=1, replica=2, direction="forward", value=float("inf"), start=37),
    ]
    state, (losses, _, finite, _) = simulate(attacks)
    assert finite.all() and np.isfinite(losses).all()
    backward, forward = violations(state, "backward"), violations(state, "forward")
    assert backward[2, 4] == 5 and backward.sum() == 5  # the boundary between stages 2 and 3
    assert forward[1, 2] == 5 and forward.sum() == 5
    _, (_, _, finite, _) = simulate(attacks, forward=None, backward=None)
    assert finite[:35].all() and not finite[35:].any()


def test_a_dropped_micro_batch_is_no_cover_for_false_gradients():
    """While stage 3's activations are rejected, stage 1 of the same replica sends gradients that nobody tests."""
    attacks = [
        Attack("constant", stage=3, replica=1, direction="forward", value=5.0, start=35, stop=38),
        Attack("constant", stage=1, replica=1, direction="backward", value=1e3, start=35, stop=38),
    ]
    state, (losses, _, _, size) = simulate(attacks, steps=40)
    assert (losses[35:38, 1] == 0).all() and violations(state, "forward")[3, 1] == 3
    assert not violations(state, "backward").any()
    assert size[35:38].max() < 2 * size[:35].max()


# ------------------------------------------------------------------------------ on a mesh


def mesh_run(attacks=(), options=OPTIONS, guard=True, steps=36, codec=None):
    """Two stages of two blocks each, four replicas: (losses, parameters of the stages, verifiers)."""
    model, params = chain(layers=4)
    stages, mesh = split_stages(params, 2), make_mesh(2, 4)
    hooks = {}
    if guard:
        hooks = {
            f"{direction}_hook": verification_hook(options, mesh, direction, key=KEY, attacks=attacks)
            for direction in ("forward", "backward")
        }
        if codec is not None:
            hooks = {name: chain_hooks(hook, codec_hook(codec)) for name, hook in hooks.items()}
    x, y = tokens(2 * steps, examples=16)
    pipe = synchronous_pipeline(
        guard_model(model) if guard else model,
        stages,
        optax.sgd(0.01),
        mesh,
        batch=(x[0], y[0]),
        num_microbatches=2,
        **hooks,
    )
    state, losses = pipe.init(stages), []
    for step in range(steps):
        state, out = pipe.step(state, *shard_batch(mesh, (x[2 * step : 2 * step + 2], y[2 * step : 2 * step + 2])))
        losses.append(np.asarray(out.loss))
    return np.array(losses), pipe.stages(state), find_verifiers(pipe, state)


@pytest.fixture(scope="module")
def unguarded():
    return mesh_run(guard=False)


def test_with_infinite_thresholds_training_is_that_without_verification_to_the_bit(unguarded):
    losses, stages, _ = mesh_run(options=dataclasses.replace(OPTIONS, threshold=math.inf))
    np.testing.assert_array_equal(losses, unguarded[0])
    assert_trees_equal(stages, unguarded[1])


def test_on_a_mesh_attackers_of_both_directions_are_banned_and_training_goes_on_also_behind_a_codec(unguarded):
    attacks = [
        Attack("scale", stage=0, replica=2, direction="forward", value=-1.0, start=50),
        Attack("constant", stage=1, replica=0, direction="backward", value=float("nan"), start=52),
    ]
    losses, stages, found = mesh_run(attacks, codec=cast_codec("bfloat16"))
    bans = {direction: np.asarray(verifier.bans) for direction, verifier in found.items()}  # [P, D, R]
    np.testing.assert_array_equal(bans["forward"][1], np.tile([0, 0, 1, 0], (4, 1)))  # all replicas of stage 1 agree
    np.testing.assert_array_equal(bans["backward"][0], np.tile([1, 0, 0, 0], (4, 1)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stages))
    np.testing.assert_allclose(losses[:25], unguarded[0][:25], rtol=0.01)  # bfloat16
    np.testing.assert_allclose(losses[-2:], unguarded[0][-2:], rtol=0.05)


def test_bans_are_known_on_both_sides_of_a_worker():
    """Stage j verifies activations of stage j - 1 and gradients of stage j + 1; 4 stages of 2 workers."""
    rng, mesh, (model, params) = np.random.default_rng(0), make_mesh(4, 2), chain(layers=4)
    hook = lambda direction: verification_hook(VerifierConfig(window=2), mesh, direction, key=KEY)
    x, y = tokens(1)
    of_all = guard_model(model), (stages := split_stages(params, 4)), optax.sgd(0.1), mesh
    batch = {"batch": (x[0], y[0]), "num_microbatches": 1}
    pipe = synchronous_pipeline(*of_all, **batch, forward_hook=hook("forward"), backward_hook=hook("backward"))
    state = pipe.init(stages)
    seen = rng.integers(3, size=(2, 4, 2))  # by direction, stage of the verifier and replica
    everywhere = lambda bans: jnp.asarray(np.repeat(bans[:, None], 2, axis=1), jnp.int32)

    def banned(end, bans):
        return end._replace(verifier=end.verifier._replace(bans=everywhere(bans)))

    hooks = pipe.hook_states(state)
    known = [ends._replace(receiving=banned(ends.receiving, bans)) for ends, bans in zip(hooks, seen, strict=True)]
    shared = share_bans(pipe, pipe.replace_hook_states(state, HookStates(*known)))
    expected = seen.copy()
    for worker in (1, 2):
        expected[0, worker + 1] = expected[1, worker - 1] = np.maximum(seen[0, worker + 1], seen[1, worker - 1])
    for verifier, bans in zip(find_verifiers(pipe, shared).values(), expected, strict=True):
        np.testing.assert_array_equal(verifier.bans, everywhere(bans))
    one_sided = synchronous_pipeline(*of_all, **batch, forward_hook=hook("forward"))
    with pytest.raises(ValueError, match=r"between verifiers of both directions, the pipeline has \['forward'\]"):
        share_bans(one_sided, one_sided.init(stages))


def test_wrong_hooks_are_refused():
    mesh = make_mesh(2, 4)
    with pytest.raises(ValueError, match="direction must be one of 'forward', 'backward', got 'both'"):
        verification_hook(OPTIONS, mesh, "both", key=KEY)
    with pytest.raises(ValueError, match="on a stage that does not exist: the pipeline has 2"):
        verification_hook(OPTIONS, mesh, "forward", key=KEY, attacks=[Attack("bias", stage=2, replica=0)])
    with pytest.raises(ValueError, match="build the pipeline of guard_model"):
        verification_hook(OPTIONS, mesh, "forward", key=KEY).init(jax.ShapeDtypeStruct((2, 3), jnp.float32))
    with pytest.raises(ValueError, match="on a replica that does not exist: the pipeline has 5"):
        simulate([Attack("bias", stage=2, replica=5)])
