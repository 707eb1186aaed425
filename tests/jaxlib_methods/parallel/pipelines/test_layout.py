"""State between host and mesh: packing, checkpoints on the same mesh and on others, and what is refused at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh

from jaxlib_methods.optimizers import delayed_nesterov, nadam
from jaxlib_methods.parallel import (
    StageModel,
    asynchronous_pipeline,
    join_stages,
    make_mesh,
    shard_batch,
    split_microbatches,
    split_stages,
    synchronous_pipeline,
)
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook
from jaxlib_methods.parallel.pipelines.layout import Snapshot
from jaxlib_methods.parallel.pipelines.packing import Packing
from tests.jaxlib_methods.parallel.pipeline_problems import assert_trees_close, assert_trees_equal, chain, tokens


@pytest.mark.contract
def test_packed_trees_come_back_and_no_device_holds_both_ends(key):
    shared = {"w": jnp.ones((2, 3)), "n": jnp.zeros((), jnp.int32)}
    trees = [
        {**shared, "embed": jnp.arange(8.0).reshape(4, 2), "key": key},
        shared,
        {**shared, "head": {"b": jnp.arange(3, dtype=jnp.bfloat16), "k": jnp.arange(5.0)}},
    ]
    packing = Packing(trees)
    shapes = packing.shapes
    assert sorted(leaf.shape for leaf in shapes.common) == [(), (2, 3)]
    assert {name: leaf.shape for name, leaf in shapes.rest.items()} == {
        "bfloat16": (3,),
        "float32": (8,),
        "uint32": (2,),
    }
    for kind, tree in enumerate(trees):
        packed = packing.pack(kind, tree)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), packed) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
        back = packing.unpack(kind, packed)
        assert back.keys() == tree.keys()
        if "key" in tree:
            assert (jax.random.bits(back.pop("key")) == jax.random.bits(tree.pop("key"))).all()
        assert_trees_equal(back, tree)
    with pytest.raises(ValueError, match=r"\['w'\] of a stage must be float32\[2, 3\], got float32\[3, 2\]"):
        packing.pack(1, {**shared, "w": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match="must have the structure"):
        packing.pack(1, {"w": jnp.ones((2, 3))})


def test_a_saved_state_continues_to_the_bit(tmp_path):
    model, params = chain()
    stages, (inputs, targets), mesh = split_stages(params, 4), tokens(8), make_mesh(4)
    pipe = asynchronous_pipeline(model, stages, delayed_nesterov(1e-2), mesh, batch=(inputs[0], targets[0]))
    parts = [shard_batch(mesh, (inputs[i : i + 4], targets[i : i + 4])) for i in (0, 4)]
    state, first = pipe.step(pipe.init(stages), *parts[0])  # three micro-batches are in flight
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored = checkpointer.restore(tmp_path / "state", like)
    with pytest.raises(ValueError, match="micro-batches are in flight; drain the pipeline first"):
        pipe.snapshot(state)
    results = []
    for start in (state, restored):
        after, out = pipe.step(start, *parts[1])
        after, last = pipe.drain(after)
        results.append((pipe.stages(after), np.asarray(out.loss), np.asarray(last.loss)))
    assert_trees_equal(*results)
    whole, out = pipe.step(pipe.init(stages), *shard_batch(mesh, (inputs, targets)))
    np.testing.assert_array_equal(out.loss, np.concatenate([first.loss, results[0][1]]))
    assert_trees_equal(pipe.stages(pipe.drain(whole)[0]), results[0][0])


def test_training_continues_on_other_numbers_of_stages_and_replicas(tmp_path):
    """Two updates on 4 stages, a snapshot through orbax, two updates on 2 stages of 2 rounds and 2 replicas."""
    model, params = chain(layers=4)
    M, optimizer = 2, optax.chain(optax.trace(0.9), nadam(1e-2))
    batches = [tokens(M, examples=4, seed=seed) for seed in range(4)]
    shape = tuple(jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in batches[0])

    def pipeline(P, D=1, R=1):
        schedule = "circular" if R > 1 else "1f1b"
        stages = split_stages(params, P, R)
        mesh = make_mesh(P, D)
        return stages, synchronous_pipeline(
            model, stages, optimizer, mesh, batch=shape, num_microbatches=M, schedule=schedule, num_rounds=R
        )

    def train(pipe, state, batches):
        for batch in batches:
            state, _ = pipe.step(state, *shard_batch(pipe.layout.mesh, batch))
        return state

    stages, four = pipeline(4)
    _, two = pipeline(2, D=2, R=2)
    half = train(four, four.init(stages), batches[:2])
    snapshot = four.snapshot(half)
    assert snapshot.updates == 2 and "blocks/3/kernel" in snapshot.params and "0/trace" in snapshot.moments
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "snapshot", snapshot)
        checkpointer.wait_until_finished()
        read = checkpointer.restore(tmp_path / "snapshot", snapshot)
    assert_trees_equal(read, snapshot)
    end = train(two, two.restore(Snapshot(*read)), batches[2:])
    straight = train(four, half, batches[2:])
    assert (np.asarray(end.updates) == 4).all()
    together, apart = join_stages(two.stages(end), num_rounds=2), join_stages(four.stages(straight))
    assert_trees_close(together, apart, rtol=1e-4, atol=1e-6)
    again = two.snapshot(end)
    assert_trees_close(again.moments, four.snapshot(straight).moments, rtol=1e-3, atol=1e-6)


def test_snapshots_of_other_models_and_optimizers_are_refused():
    model, params = chain(layers=2)
    batch = tuple(leaf[0] for leaf in tokens(1))
    make = lambda params, optimizer: asynchronous_pipeline(
        model, split_stages(params, 1), optimizer, make_mesh(1), batch=batch
    )
    pipe = make(params, nadam(0.1))
    snapshot = pipe.snapshot(pipe.init(split_stages(params, 1)))
    with pytest.raises(ValueError, match="the snapshot lacks a parameter, 'blocks/2/bias'"):
        make(chain(layers=3)[1], nadam(0.1)).restore(snapshot)
    with pytest.raises(ValueError, match="the snapshot has 2 blocks and this pipeline 1"):
        make(chain(layers=1)[1], nadam(0.1)).restore(snapshot)
    with pytest.raises(ValueError, match="the snapshot lacks a moment of the optimizer, '0/trace'"):
        make(params, optax.sgd(0.1, momentum=0.9)).restore(snapshot)
    with pytest.raises(ValueError, match=r"embed has the shape \(11, 8\), this pipeline's \(12, 8\)"):
        make(chain(layers=2, vocab=12)[1], nadam(0.1)).restore(snapshot)


MODEL, PARAMS = chain(layers=2)
BATCH = tuple(leaf[0] for leaf in tokens(1))
STAGES = split_stages(PARAMS, 2)


NO_OP = BoundaryHook(lambda x: (), lambda x, state, info: (x, state), lambda m, state, info: (m, state))


def pipe_of(**changes):
    options = {"model": MODEL, "stages": STAGES, "optimizer": optax.sgd(0.1), "mesh": make_mesh(2), "batch": BATCH}
    return asynchronous_pipeline(**options | changes)


def synchronous(**changes):
    return synchronous_pipeline(MODEL, STAGES, optax.sgd(0.1), make_mesh(2), batch=BATCH, num_microbatches=2, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_stages(PARAMS, 3), r"3 stages of 1 round\(s\) must divide the 2 blocks of the model"),
        (lambda: split_stages((1, [1, {"w": 1}], 1), 1), "that of block 1 differs from that of block 0"),
        (lambda: make_mesh(4, 4), "4 stages times 4 replicas need 16 devices, there are 8"),
        (lambda: make_mesh(2, devices=jax.devices()[:1]), "2 stages times 1 replicas need 2 devices, there are 1"),
        (lambda: make_mesh(0), "num_stages must be at least 1, got 0"),
        (
            lambda: pipe_of(mesh=Mesh(np.array(jax.devices()[:2]), ("stage",))),
            r"the mesh must have the axes \('stage', 'data'\), got \('stage',\)",
        ),
        (
            lambda: pipe_of(mesh=make_mesh(4)),
            r"the mesh has 4 stages and the parameters 2; .*split_stages\(params, 4\)",
        ),
        (lambda: pipe_of(predict_backward=lambda state, params: params), "predict_backward replaces the stash"),
        (
            lambda: pipe_of(model=StageModel(MODEL.embed, lambda p, x: x[:, :1], MODEL.head)),
            "blocks must keep the shapes of their input",
        ),
        (
            lambda: pipe_of(model=StageModel(MODEL.embed, MODEL.block, lambda p, x, y: x)),
            "head must return a scalar loss",
        ),
        (lambda: pipe_of().init(STAGES[:1]), "the pipeline has 2 stages, got the trees of 1"),
        (lambda: pipe_of().init(STAGES[::-1]), "the tree of a stage must have the structure"),
        (lambda: synchronous(schedule="1f1b", remat=False), "1f1b recomputes"),
        (lambda: synchronous(schedule="circular", forward_hook=NO_OP), "hooks at boundaries run in the schedules"),
        (
            lambda: split_microbatches(np.zeros((5, 2)), 2),
            "num_microbatches must divide the batch, got 2 for 5 examples",
        ),
        (lambda: shard_batch(make_mesh(2, 2), np.zeros((4, 3))), r"that 2 replicas divide, got the shape \(4, 3\)"),
        (
            lambda: shard_batch(make_mesh(2), np.full((1, 2, 3), 11), vocab_size=11),
            r"token ids must lie in \[0, 11\), got 11",
        ),
        (
            lambda: shard_batch(make_mesh(2), np.full((1, 2, 3), -1), vocab_size=11),
            r"token ids must lie in \[0, 11\), got -1",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_of_another_number_of_microbatches_is_refused():
    pipe = synchronous()
    with pytest.raises(ValueError, match="this pipeline takes 2 micro-batches per update, got 3"):
        pipe.step(pipe.init(STAGES), *shard_batch(make_mesh(2), tokens(3)))
