"""Schedules against their definitions, and the programs that run them: idle slots are free, sizes do not matter."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods.parallel import (
    StageModel,
    asynchronous_pipeline,
    make_mesh,
    shard_batch,
    split_stages,
    synchronous_pipeline,
)
from jaxlib_methods.parallel.pipelines.schedules import bubble_fraction, schedule_table
from tests.jaxlib_methods.parallel.pipeline_problems import chain, tokens

CASES = [("gpipe", 4, 3, 1), ("1f1b", 4, 6, 1), ("1f1b", 3, 1, 1), ("1f1b", 1, 4, 1), ("circular", 3, 6, 2)]


@pytest.mark.contract
@pytest.mark.parametrize(("schedule", "P", "M", "R"), CASES)
def test_every_stage_has_what_it_works_on(schedule, P, M, R):
    """A queue: activations and cotangents are there one slot after they were made, and used once."""
    table = schedule_table(schedule, P, M, R)
    inbox = {("F", m, 0, 0) for m in range(M)}
    done = []
    for slot in table:
        outbox = set()
        for j, (work, m) in enumerate(slot):
            assert (work == 0) == (m == -1)
            if not work:
                continue
            kind = "F" if work == 1 else "B"
            (task,) = [t for t in inbox if t[0] == kind and t[1] == m and t[3] == j]
            inbox.remove(task)
            r = task[2]
            done.append((kind, int(m), r, j))
            if kind == "F":
                last = j == P - 1 and r == R - 1
                outbox.add(("B", m, r, j) if last else ("F", m, r + (j == P - 1), (j + 1) % P))
            elif (r, j) != (0, 0):
                outbox.add(("B", m, r - (j == 0), (j - 1) % P))
        inbox |= outbox
    assert not inbox and len(done) == len(set(done)) == 2 * P * R * M
    assert (table[..., 0] == 0).mean() == pytest.approx(bubble_fraction(schedule, P, M, R))


def test_slots_of_one_forward_one_backward():
    P, M = 4, 5
    table = schedule_table("1f1b", P, M)
    for j in range(P):
        for m in range(M):
            assert table[2 * m + j, j].tolist() == [1, m]
            assert table[2 * m + 2 * P - 1 - j, j].tolist() == [2, m]
        flight = np.cumsum(np.where(table[:, j, 0] == 1, 1, np.where(table[:, j, 0] == 2, -1, 0)))
        assert flight.max() == P - j


def counted_chain(P):
    """A chain whose blocks say when they are computed."""
    model, params = chain(layers=P)
    calls = []

    def block(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return model.block(params, x)

    return StageModel(model.embed, block, model.head), split_stages(params, P), calls


def test_idle_slots_compute_nothing():
    P, M = 4, 3
    model, stages, calls = counted_chain(P)
    inputs, targets = tokens(M)
    mesh = make_mesh(P)
    pipe = synchronous_pipeline(model, stages, optax.sgd(0.1), mesh, batch=(inputs[0], targets[0]), num_microbatches=M)
    jax.block_until_ready(pipe.step(pipe.init(stages), *shard_batch(mesh, (inputs, targets))))
    jax.effects_barrier()
    assert len(calls) == M * (2 * P - 1)  # F and its recomputation in B; the last stage computes once


def instructions(P, M, kind):
    model, params = chain(layers=P)
    stages, (inputs, targets), mesh = split_stages(params, P), tokens(M), make_mesh(P)
    batch = inputs[0], targets[0]
    if kind == "asynchronous":
        pipe = asynchronous_pipeline(model, stages, optax.sgd(0.1), mesh, batch=batch)
    else:
        pipe = synchronous_pipeline(model, stages, optax.sgd(0.1), mesh, batch=batch, num_microbatches=M, schedule=kind)
    text = pipe.lower(pipe.init(stages), *shard_batch(mesh, (inputs, targets))).as_text()
    return len(re.findall(r"stablehlo\.\w+", text))


@pytest.mark.parametrize("kind", ["asynchronous", "1f1b", "gpipe", "circular"])
def test_programs_grow_neither_with_microbatches_nor_with_stages(kind):
    assert instructions(4, 4, kind) == instructions(4, 32, kind) == instructions(8, 8, kind)


def test_replicas_split_the_examples_and_indivisible_batches_are_refused():
    model, params = chain(layers=2)
    with pytest.raises(ValueError, match="2 replicas must divide the examples of a micro-batch, got the shape"):
        batch = jax.ShapeDtypeStruct((3, 4), jnp.int32)
        asynchronous_pipeline(model, split_stages(params, 2), optax.sgd(0.1), make_mesh(2, 2), batch=(batch, batch))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedule_table("zb", 2, 2), "schedule must be one of 'gpipe', '1f1b', 'circular', got 'zb'"),
        (lambda: schedule_table("gpipe", 0, 2), "num_stages must be at least 1, got 0"),
        (lambda: schedule_table("gpipe", 2, 2, 2), "only the circular schedule has several rounds, got num_rounds=2"),
        (lambda: bubble_fraction("circular", 4, 6, 2), "got 6 for 4 stages; take a multiple of 4"),
    ],
)
def test_schedules_that_do_not_exist(call, message):
    with pytest.raises(ValueError, match=message):
        call()
