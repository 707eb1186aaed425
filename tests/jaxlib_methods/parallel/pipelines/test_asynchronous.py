"""Asynchronous pipelines against the delay simulator and against queues, to the bit where arithmetic is the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_methods.optimizers import delayed_nesterov, nadam, no_stash_nesterov, pipemare
from jaxlib_methods.optimizers.delays import clip_by_group_norm, keep_param_history, pipeline_delays, stale_params
from jaxlib_methods.optimizers.no_stash import discrepancy_corrected
from jaxlib_methods.parallel import StageModel, asynchronous_pipeline, make_mesh, shard_batch, split_stages
from jaxlib_methods.parallel.pipelines.schedules import schedule_table
from jaxlib_methods.parallel.pipelines.stages import run_stage, stage_vjp
from tests.jaxlib_methods.parallel.pipeline_problems import (
    CONFIG,
    assert_trees_close,
    assert_trees_equal,
    chain,
    gpt,
    run_slots,
    text,
    tokens,
    value_and_grad,
)


def train(pipe, stages, inputs, targets):
    """(stages after all updates, losses by micro-batch)."""
    mesh = pipe.layout.mesh
    state, out = pipe.step(pipe.init(stages), *shard_batch(mesh, (inputs, targets)))
    state, last = pipe.drain(state)
    losses = np.concatenate([out.loss, last.loss])
    finished = np.concatenate([out.microbatch, last.microbatch])
    assert finished[finished >= 0].tolist() == list(range(len(inputs)))
    assert (np.asarray(state.updates) == len(inputs)).all()
    return pipe.stages(state), losses[finished >= 0]


# --------------------------------------------------------------------------------------------- the delay simulator


def simulate(model, stages, inputs, targets, max_norm, learning_rate, place):
    """Stale weights of every stage, the exact gradient there, and the update of the newest weights, on one device."""
    P = len(stages)
    by_stage = [(f"^{j}/", j) for j in range(P)]
    optimizer = optax.chain(
        keep_param_history([(f"^{j}/", delay) for j, delay in enumerate(pipeline_delays(P))]),
        clip_by_group_norm(max_norm, by_stage),
        delayed_nesterov(learning_rate),
    )
    forward = jax.jit(lambda params, x: run_stage(model, params, x))
    backward = jax.jit(lambda params, x, y, cotangent: stage_vjp(model, params, x, y, cotangent))

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = place(tuple(stages))
    state, losses = place(optimizer.init(params)), []
    for x, y in zip(inputs, targets, strict=True):
        stale, x, y = stale_params(state, params), [place(x)], place(y)
        for j in range(P - 1):
            x.append(forward(stale[j], x[-1]))
        grads, cotangent = [None] * P, None
        for j in reversed(range(P)):
            loss, grads[j], cotangent = backward(stale[j], x[j], y if j == P - 1 else None, cotangent)
            losses += [loss] if j == P - 1 else []
        params, state = update(tuple(grads), state, params)
    return params, np.array(losses)


def test_fifty_updates_of_a_gpt_are_those_of_the_simulator():
    """To the bit in float32 where XLA rounds both programs alike, which it does from JAX 0.12 on.

    Before, it rounds some products differently inside of branches, and fifty updates amplify that 1e4 times. In float64
    that leaves 1e-12 of the losses, where a wrong delay, or one update more or less, changes them by 1e-2.
    """
    alike = jax.__version_info__ >= (0, 12)
    dtype = "float32" if alike else "float64"
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype)
    (inputs, targets), mesh = text(50), make_mesh(4)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), delayed_nesterov(3e-3))
    # XLA divides by a softmax's sum in a program of several partitions and multiplies by its inverse in one of a single
    # partition; every device of the mesh runs the whole simulator, so that both are the former.
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    with (
        jax.enable_x64(not alike),
        jax.numpy_dtype_promotion("strict" if alike else "standard"),
    ):  # flax's float64 norms
        model, params = gpt(config)
        stages = split_stages(params, 4)
        pipe = asynchronous_pipeline(model, stages, optimizer, mesh, batch=(inputs[0], targets[0]))
        trained, losses = train(pipe, stages, inputs, targets)
        expected, expected_losses = simulate(model, stages, inputs, targets, 0.5, 3e-3, place)
    assert losses.dtype == dtype
    if alike:
        np.testing.assert_array_equal(losses, expected_losses)
        assert_trees_equal(trained, list(expected))
    else:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-8)
    assert losses[-10:].mean() < losses[:10].mean() - 0.3


def test_the_chain_is_the_simulator_on_one_device_and_the_queues_to_the_bit():
    model, params = chain()
    stages, (inputs, targets) = split_stages(params, 4), tokens(12)
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), delayed_nesterov(1e-2))
    pipe = asynchronous_pipeline(model, stages, optimizer, make_mesh(4), batch=(inputs[0], targets[0]))
    trained, losses = train(pipe, stages, inputs, targets)
    expected, expected_losses = simulate(model, stages, inputs, targets, 0.1, 1e-2, lambda tree: tree)
    np.testing.assert_array_equal(losses, expected_losses)
    assert_trees_equal(trained, list(expected))
    queues, _ = run_slots(model, stages, lambda delay: optimizer, inputs, targets)
    assert_trees_equal(trained, queues)


@pytest.mark.contract
def test_one_stage_is_sequential_training():
    model, params = chain()
    stages, (inputs, targets) = split_stages(params, 1), tokens(6)
    optimizer = nadam(1e-2, weight_decay=0.01)
    pipe = asynchronous_pipeline(model, stages, optimizer, make_mesh(1), batch=(inputs[0], targets[0]))
    trained, losses = train(pipe, stages, inputs, targets)
    tree, state, expected = stages, optimizer.init(stages), []
    update = jax.jit(optimizer.update)
    for x, y in zip(inputs, targets, strict=True):
        loss, grads = value_and_grad(model, tree, x, y)
        updates, state = update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
        expected.append(loss)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert_trees_close(trained, list(tree), rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------- versions, read out of the pipeline


def version_model(P, count):
    """Parameters count their updates; losses tell the versions of F, the optimizer's state those of B.

    Stage j adds v_j^2 to coordinate j of x, and the loss is the number with the digits x_j in base 64.
    """
    columns = jnp.eye(P)
    model = StageModel(
        embed=lambda params, ids: jnp.zeros((1, P)) * params,
        block=lambda params, x: x + (params["v"] ** 2 * params["column"])[None],
        head=lambda params, x, y: jnp.sum(x * (64.0 ** jnp.arange(float(P)))[None]) + 0 * params,
    )
    blocks = [{"v": jnp.zeros(()), "column": columns[j]} for j in range(P)]

    def init(params):
        return {"count": jnp.zeros((), jnp.int32), "seen": jnp.full(count, -1.0)}

    def update(updates, state, params):
        of_block, column = updates["blocks"][0]["v"], params["blocks"][0]["column"]
        version = of_block / 2 / jnp.sum(column * 64.0 ** jnp.arange(float(P)))  # d/dv of v^2 64^j
        seen = state["seen"].at[state["count"]].set(version)
        plus_one = jax.tree.map(jnp.zeros_like, updates)
        plus_one["blocks"][0]["v"] += 1.0
        return plus_one, {"count": state["count"] + 1, "seen": seen}

    stages = split_stages((jnp.zeros(()), blocks, jnp.zeros(())), P)
    return model, stages, optax.GradientTransformation(init, update)


@pytest.mark.parametrize("stash", [True, False])
def test_versions_delays_and_ramp(stash):
    P, count = 4, 8
    model, stages, optimizer = version_model(P, count)
    inputs = np.zeros((count, 1, 1), np.int32)
    mesh = make_mesh(P)
    pipe = asynchronous_pipeline(model, stages, optimizer, mesh, batch=(inputs[0], inputs[0]), stash=stash)
    state, out = pipe.step(pipe.init(stages), *shard_batch(mesh, (inputs, inputs)))
    newest = [int(tree["blocks"][0]["v"]) for tree in pipe.stages(state)]
    table = schedule_table("1f1b", P, count)[: 2 * count]  # the slots so far
    assert newest == np.asarray(state.updates)[:, 0].tolist() == (table[..., 0] == 2).sum(axis=0).tolist()
    state, last = pipe.drain(state)
    losses = np.concatenate([out.loss, last.loss])[np.concatenate([out.microbatch, last.microbatch]) >= 0]
    forward = np.array([[int(loss) // 64**j % 64 for j in range(P)] for loss in losses])
    expected = np.maximum(np.arange(count)[:, None] - np.array(pipeline_delays(P)), 0)
    np.testing.assert_array_equal(np.sqrt(forward), expected)
    lag = np.arange(count)[:, None] - expected
    assert lag[:5, 0].tolist() == [0, 1, 2, 3, 3] and lag[-1].tolist() == [3, 2, 1, 0]
    assert [(expected[:, j] == 0).sum() for j in range(P)] == [P - j for j in range(P)]
    backward = [tree["seen"] for tree in pipe.layout.rows(pipe.layout.opt_state, state.opt_state)]
    for j in range(P):
        np.testing.assert_array_equal(backward[j], expected[:, j] if stash else np.arange(count))


# ---------------------------------------------------------------------------------------------------- without stash


@pytest.mark.parametrize("method", ["no_stash_nesterov", "pipemare"])
def test_without_stash_stages_differ_in_their_rules(method):
    P, count = 3, 9
    model, params = chain(layers=P)
    stages, (inputs, targets) = split_stages(params, P), tokens(count)
    rules = {
        "no_stash_nesterov": (lambda tau: no_stash_nesterov(1e-2, tau, P, anneal_steps=20), None),
        "pipemare": (lambda tau: pipemare(nadam(1e-2), tau, anneal_steps=20), discrepancy_corrected),
    }
    rule, predict = rules[method]
    pipe = asynchronous_pipeline(
        model, stages, rule, make_mesh(P), batch=(inputs[0], targets[0]), stash=False, predict_backward=predict
    )
    trained, losses = train(pipe, stages, inputs, targets)
    expected, expected_losses = run_slots(model, stages, rule, inputs, targets, stash=False, predict_backward=predict)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_trees_close(trained, expected, rtol=1e-4, atol=1e-6)
    stashed, _ = run_slots(model, stages, rule, inputs, targets)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (trained, stashed)), strict=True)) > 1e-4


def test_two_microbatches_per_update_are_an_optimizer_around_the_optimizer():
    P, count = 2, 6
    model, params = chain(layers=P)
    stages, (inputs, targets) = split_stages(params, P), tokens(count)
    every = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)), 2)
    optimizer = every.gradient_transformation()
    pipe = asynchronous_pipeline(model, stages, optimizer, make_mesh(P), batch=(inputs[0], targets[0]))
    with jax.numpy_dtype_promotion("standard"):  # optax's accumulation divides a float by an integer
        trained, losses = train(pipe, stages, inputs, targets)
        expected, expected_losses = run_slots(model, stages, lambda delay: optimizer, inputs, targets)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    assert_trees_close(trained, expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------- the data axis


def test_replicas_average_their_gradients():
    model, params = chain(layers=2)
    stages, (inputs, targets) = split_stages(params, 2), tokens(5, examples=4)
    one, two = (
        train(
            asynchronous_pipeline(model, stages, nadam(1e-2), make_mesh(2, D), batch=(inputs[0], targets[0])),
            stages,
            inputs,
            targets,
        )
        for D in (1, 2)
    )
    np.testing.assert_allclose(one[1], two[1], rtol=1e-5)
    assert_trees_close(one[0], two[0], rtol=1e-4, atol=1e-6)
