"""Hooks at the boundaries and on the data axis: called where and when they should be, and free when they do nothing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods.optimizers import nadam
from jaxlib_methods.parallel import asynchronous_pipeline, make_mesh, shard_batch, split_stages, synchronous_pipeline
from jaxlib_methods.parallel.pipelines.communication import collectives
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, DataHook, chain_hooks
from tests.jaxlib_methods.parallel.pipeline_problems import assert_trees_close, chain, run_slots, tokens

P, COUNT = 3, 6


@pytest.fixture(scope="module")
def problem():
    model, params = chain(layers=P)
    inputs, targets = tokens(COUNT)
    return model, split_stages(params, P), inputs, targets


NO_OP = BoundaryHook(lambda x: (), lambda x, state, info: (x, state), lambda m, state, info: (m, state))


def counting(encode, decode):
    """A codec whose state counts calls that mattered and adds up their micro-batches, as int32 [2]."""
    count = lambda state, info: state + jnp.stack([jnp.ones((), jnp.int32), info.microbatch])
    over = lambda function, tree: jax.tree.map(function, tree)
    return BoundaryHook(
        init=lambda x: jnp.zeros(2, jnp.int32),
        send=lambda x, state, info: (over(encode, x), count(state, info)),
        receive=lambda m, state, info: (over(decode, m), count(state, info)),
    )


def program_of(pipe, problem):
    _, stages, inputs, targets = problem
    state = pipe.init(stages)
    return pipe.lower(state, *shard_batch(pipe.layout.mesh, (inputs, targets))).compile()


@pytest.mark.contract
def test_no_op_hooks_leave_the_compiled_program_as_it_is(problem):
    model, stages, inputs, targets = problem
    programs = []
    for hook, data_hook in ((None, None), (NO_OP, DataHook(lambda p: (), lambda p, state, info: (p, state)))):
        pipe = asynchronous_pipeline(
            model,
            stages,
            nadam(1e-2),
            make_mesh(P),
            batch=(inputs[0], targets[0]),
            forward_hook=hook,
            backward_hook=hook,
            data_hook=data_hook,
        )
        text = program_of(pipe, problem).as_text()
        text = re.sub(r", metadata=\{[^}]*\}|HloModule [^\n]*|, backend_config=\{[^\n]*\}", "", text)
        text = re.sub(r"(%[\w-]+?)(\.clone|\.\d+|_\d+)*\b", r"\1", text)  # numbers of names
        programs.append(sorted(line for line in text.splitlines() if " = " in line))
    assert programs[0] == programs[1]


def test_codecs_are_called_at_both_ends_once_per_message(problem):
    model, stages, inputs, targets = problem
    half = lambda x: x.astype(jnp.float16)
    whole = lambda x: x.astype(jnp.float32)
    hook = counting(half, whole)
    pipe = asynchronous_pipeline(
        model,
        stages,
        nadam(1e-2),
        make_mesh(P),
        batch=(inputs[0], targets[0]),
        forward_hook=hook,
        backward_hook=chain_hooks(NO_OP, hook),
    )
    mesh = pipe.layout.mesh
    state, _ = pipe.step(pipe.init(stages), *shard_batch(mesh, (inputs, targets)))
    state, _ = pipe.drain(state)
    (forward_send, forward_receive), ((_, backward_send), (_, backward_receive)) = jax.tree.map(
        lambda leaf: np.asarray(leaf)[:, 0], state.traffic.hooks
    )
    every, none = [COUNT, sum(range(COUNT))], [0, 0]
    assert forward_send.tolist() == [every] * (P - 1) + [none]
    assert forward_receive.tolist() == [none] + [every] * (P - 1)
    assert backward_send.tolist() == [none] + [every] * (P - 1)
    assert backward_receive.tolist() == [every] * (P - 1) + [none]
    expected, _ = run_slots(
        model,
        stages,
        lambda delay: nadam(1e-2),
        inputs,
        targets,
        cross=[lambda x: whole(half(x))] * 2,
    )
    assert_trees_close(pipe.stages(state), expected, rtol=1e-4, atol=1e-6)
    exact, _ = run_slots(model, stages, lambda delay: nadam(1e-2), inputs, targets)
    assert max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (exact, expected)), strict=True)) > 1e-5


def test_what_is_sent_is_the_message_between_the_pairs_that_exchange(problem):
    model, stages, inputs, targets = problem
    first_column = BoundaryHook(
        init=lambda x: (),
        send=lambda x, state, info: (jax.tree.map(lambda leaf: leaf[..., :1], x), state),
        receive=lambda m, state, info: (jax.tree.map(lambda leaf: jnp.repeat(leaf, 8, axis=-1), m), state),
    )
    sent = []
    for hook in (None, first_column):
        pipe = synchronous_pipeline(
            model,
            stages,
            optax.sgd(0.1),
            make_mesh(P),
            batch=(inputs[0], targets[0]),
            num_microbatches=COUNT,
            schedule="gpipe",
            forward_hook=hook,
            backward_hook=hook,
        )
        permutes = [c for c in collectives(program_of(pipe, problem)) if c.kind == "collective-permute"]
        assert {c.groups for c in permutes} == {((0, 1), (1, 2)), ((1, 0), (2, 1))}
        assert all(c.count == COUNT + P - 1 for c in permutes)
        sent.append(sum(c.bytes for c in permutes))
    assert sent == [2 * 4 * inputs[0].size * 8, 2 * 4 * inputs[0].size]  # float32, width 8


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_synchronous_schedules_call_hooks_and_keep_their_state(problem, schedule):
    model, stages, inputs, targets = problem
    hook = counting(lambda x: x, lambda x: x)
    pipe = synchronous_pipeline(
        model,
        stages,
        optax.sgd(0.1),
        make_mesh(P),
        batch=(inputs[0], targets[0]),
        num_microbatches=COUNT,
        schedule=schedule,
        forward_hook=hook,
        backward_hook=hook,
    )
    state = pipe.init(stages)
    for _ in range(2):
        state, _ = pipe.step(state, *shard_batch(pipe.layout.mesh, (inputs, targets)))
    every, none = [2 * COUNT, 2 * sum(range(COUNT))], [0, 0]
    forward, backward = state.hooks
    assert np.asarray(forward[0])[:, 0].tolist() == [every] * (P - 1) + [none]
    assert np.asarray(backward[0])[:, 0].tolist() == [none] + [every] * (P - 1)
    assert np.asarray(backward[1])[:, 0].tolist() == [every] * (P - 1) + [none]


@pytest.mark.parametrize("kind", ["asynchronous", "synchronous"])
def test_averaging_the_parameters_after_a_gradient_step_is_averaging_gradients(kind):
    model, params = chain(layers=2)
    stages, (inputs, targets) = split_stages(params, 2), tokens(4, examples=4)
    mesh = make_mesh(2, 2)
    mean = DataHook(
        init=lambda params: jnp.zeros((), jnp.int32),
        apply=lambda params, count, info: (jax.tree.map(lambda p: jax.lax.pmean(p, "data"), params), count + 1),
    )
    trained = []
    for options in ({"data_hook": mean, "average_gradients": False}, {}):
        batch = inputs[0], targets[0]
        if kind == "synchronous":
            pipe = synchronous_pipeline(model, stages, optax.sgd(0.5), mesh, batch=batch, num_microbatches=4, **options)
        else:
            pipe = asynchronous_pipeline(model, stages, optax.sgd(0.5), mesh, batch=batch, **options)
        state, _ = pipe.step(pipe.init(stages), *shard_batch(mesh, (inputs, targets)))
        if options:
            done = [[1, 1], [1, 1]] if kind == "synchronous" else [[3, 3], [3, 3]]
            assert np.asarray(state.data_hook).tolist() == done
        packed = pipe.current(state)[0]
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[:, 0], leaf[:, 1]), jax.device_get(packed))
        trained.append(pipe.stages(state))
    assert_trees_close(*trained, rtol=1e-5, atol=1e-7)
