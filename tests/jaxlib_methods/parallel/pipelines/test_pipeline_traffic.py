"""What compiled pipelines send, read from their programs and counted by hand; what a stage keeps in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxlib_methods import parallel
from jaxlib_methods.parallel.pipelines import _transfer, communication
from tests.jaxlib_methods.parallel.pipeline_problems import chain, tokens

EXAMPLES, LENGTH, WIDTH, COUNT = 2, 3, 8, 6
MESSAGE = EXAMPLES * LENGTH * WIDTH * 4  # bytes of the activations of a micro-batch


def lowered(pipe, stages, mesh):
    state = pipe.init(stages)
    return state, pipe.lower(state, *parallel.shard_batch(mesh, tokens(COUNT, EXAMPLES, LENGTH)))


@pytest.mark.contract
@pytest.mark.parametrize(("schedule", "slots"), [("gpipe", COUNT + 3), ("1f1b", COUNT + 3), ("async", COUNT)])
def test_a_boundary_carries_one_message_each_way_in_every_slot_that_uses_it(schedule, slots):
    P = 4
    model, params = chain(layers=P)
    stages, mesh = parallel.split_stages(params, P), parallel.make_mesh(P)
    batch = tuple(a[0] for a in tokens(1, EXAMPLES, LENGTH))
    if schedule == "async":
        pipe = parallel.asynchronous_pipeline(model, stages, optax.sgd(0.1), mesh, batch=batch)
    else:
        pipe = parallel.synchronous_pipeline(
            model, stages, optax.sgd(0.1), mesh, batch=batch, num_microbatches=COUNT, schedule=schedule
        )
    state, program = lowered(pipe, stages, mesh)
    expected = {(j, j + step): slots * MESSAGE for step in (1, -1) for j in range(P) if 0 <= j + step < P}
    assert communication.link_bytes(program) == expected
    if schedule == "async":  # on the stage axis nothing else is sent but the losses, at the end
        others = [c for c in communication.collectives(program) if c.kind != "collective-permute"]
        assert all(c.kind == "all-reduce" and c.count == 1 and c.bytes <= 4 * COUNT for c in others)
        nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) // P
        stage = max(nbytes(s) * P for s in stages)
        assert nbytes(state.versions) == P * stage  # the ring: P versions of the largest stage on every device
        assert nbytes(state.traffic.kept) == P * MESSAGE  # inputs in flight
        assert np.shape(state.feed[0])[2:] == (P, EXAMPLES, LENGTH)


def test_replicas_reduce_the_gradient_of_their_stage_once_a_step():
    model, params = chain(layers=2)
    stages, mesh = parallel.split_stages(params, 2), parallel.make_mesh(2, 2)
    batch = tuple(a[0] for a in tokens(1, EXAMPLES, LENGTH))
    pipe = parallel.synchronous_pipeline(
        model, stages, optax.sgd(0.1), mesh, batch=batch, num_microbatches=COUNT, schedule="gpipe"
    )
    state, program = lowered(pipe, stages, mesh)
    reduced = [
        c for c in communication.collectives(program) if c.kind == "all-reduce" and sorted(c.groups)[0] == (0, 1)
    ]
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)) // 4
    assert sum(c.bytes * c.count for c in reduced) == gradient + 4 * COUNT  # and the losses
    assert communication.link_bytes(program)[0, 2] == (COUNT + 1) * MESSAGE // 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float32", "uint8"])
def test_a_short_type_takes_its_own_bytes_on_a_link_and_arrives_to_the_bit(dtype):
    mesh, spec = parallel.make_mesh(2), PartitionSpec("stage")
    x = jnp.arange(-10, 10).astype(jnp.float32).reshape(2, 10).astype(dtype)
    cross = jax.jit(jax.shard_map(lambda x: _transfer._permute(x, [(0, 1)]), mesh=mesh, in_specs=spec, out_specs=spec))
    compiled = cross.lower(x).compile()
    assert communication.link_bytes(compiled) == {(0, 1): 10 * x.dtype.itemsize}
    assert cross(x)[1].tobytes() == np.asarray(x[0]).tobytes()
