"""The training loop: equal to a plain Python loop, on any mesh, in any chunks, after any interruption."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments._machinery import device_data, log, loop as train
from experiments._machinery.checkpoint import Checkpoints
from experiments._machinery.errors import CheckpointError, DataError, NonFiniteLossError
from experiments.data import images as data


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


DIGITS = data.load("digits")
MEAN, STD = data.global_statistics(DIGITS.train.images)
OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9))
TRACES = []


def logits_fn(params, model_state, images):
    return data.standardise(images, MEAN, STD).reshape(images.shape[0], -1) @ params["kernel"] + params["bias"][None]


def loss_fn(params, model_state, batch, key):
    TRACES.append(None)
    noise = 0.1 * jax.random.normal(key, (10,))
    logits = logits_fn(params, model_state, batch.images) + noise[None]
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))
    return loss, (model_state + jnp.mean(batch.labels.astype(jnp.float32)), {"label": batch.labels.sum()})


def augment(batch, key):
    return batch._replace(images=device_data.random_crop(batch.images, key, padding=1))


def start(seed=0):
    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    return train.init_state(params, OPTIMIZER, key=jax.random.key(seed), model_state=jnp.zeros(()))


def fit(state=None, **changes):
    options = {"batch_size": 32, "steps": 24, "steps_per_call": 8, "augment": augment, "mesh": mesh_of(1)}
    options |= {"progress": False} | changes
    return train.fit(loss_fn, OPTIMIZER, start() if state is None else state, DIGITS.train, **options)


def same_bits(a, b):
    numbers = lambda tree: [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in tree]
    for left, right in zip(numbers(jax.tree.leaves(a)), numbers(jax.tree.leaves(b)), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.fixture(scope="module")
def whole():
    return fit()


def test_equals_a_plain_python_loop(whole):
    state = start()
    order = jax.random.fold_in(state.key, 0x7FFFFFFF)
    rows = np.asarray(device_data.batch_indices(order, jnp.arange(24), 1437, 32))
    params, opt_state, model_state, losses = state.params, state.opt_state, state.model_state, []
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for step in range(24):
        augment_key, loss_key = jax.random.split(jax.random.fold_in(state.key, step))
        batch = data.Split(DIGITS.train.images[rows[step]], DIGITS.train.labels[rows[step]])
        (loss, (model_state, _)), grads = gradient(params, model_state, augment(batch, augment_key), loss_key)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    result, history = whole
    for left, right in zip(
        jax.tree.leaves((params, opt_state, model_state)), jax.tree.leaves(result[1:4]), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    assert int(result.step) == 24 and [record["step"] for record in history] == [8, 16, 24]
    np.testing.assert_allclose([record["loss"] for record in history], np.reshape(losses, (3, 8)).mean(1), rtol=1e-5)


@pytest.mark.parametrize("steps_per_call", [1, 7, 100])
def test_chunk_length_does_not_change_the_result(whole, steps_per_call):
    state, _ = fit(steps_per_call=steps_per_call)
    for left, right in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole[0].params), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)


def test_eight_devices_give_the_parameters_of_one(whole):
    state, history = fit(mesh=mesh_of(8))
    for left, right in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole[0].params), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
        assert left.sharding.is_fully_replicated and len(left.sharding.device_set) == 8
    assert [record["label"] for record in history] == [record["label"] for record in whole[1]]


def test_each_device_works_on_its_share_of_the_batch():
    def flops(devices):
        mesh = mesh_of(devices)
        placed, state = device_data.put(DIGITS.train, mesh), device_data.replicate(start(), mesh)
        chunk = train._compiled_chunk(loss_fn, OPTIMIZER, None, 1024, mesh)
        return chunk.lower(state, placed, jnp.int32(1), 1).compile().cost_analysis()["flops"]

    assert flops(8) < 0.2 * flops(1)


def test_the_callers_state_stays_valid():
    state = start()
    before = jax.tree.map(np.asarray, state.params)
    fit(state, mesh=mesh_of(8))
    fit(state)
    same_bits(state.params, before)


def test_a_second_call_compiles_nothing(whole):
    traces = len(TRACES)
    first, _ = fit(start(seed=1))
    assert len(TRACES) == traces
    assert not np.array_equal(first.params["bias"], whole[0].params["bias"])


def test_a_later_call_with_the_same_workdir_resumes_to_the_bit(whole, tmp_path):
    fit(workdir=tmp_path, steps=16, checkpoint_every=8)
    state, history = fit(workdir=tmp_path, checkpoint_every=8)
    same_bits(state, whole[0])
    without_time = lambda records: [{k: v for k, v in record.items() if k != "wall_s"} for record in records]
    assert without_time(history) == without_time(whole[1])
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == history
    again, _ = fit(workdir=tmp_path, checkpoint_every=8)
    same_bits(again, state)
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [16, 24]


def test_a_checkpoint_moves_between_meshes(whole, tmp_path):
    fit(workdir=tmp_path, steps=16)
    state, _ = fit(workdir=tmp_path, mesh=mesh_of(4))
    assert len(state.params["bias"].sharding.device_set) == 4
    np.testing.assert_allclose(state.params["kernel"], whole[0].params["kernel"], rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_names_its_step_and_is_not_kept(tmp_path):
    def diverging(params, model_state, batch, key):
        loss, (_, metrics) = loss_fn(params, jnp.zeros(()), batch, key)
        return jnp.where(model_state == 13.0, jnp.nan, loss), (model_state + 1.0, metrics)

    with pytest.raises(NonFiniteLossError, match="seed 3: the loss of step 13 is nan"):
        train.fit(
            diverging, OPTIMIZER, start(), DIGITS.train, batch_size=32, steps=24, steps_per_call=8, workdir=tmp_path,
            checkpoint_every=8, mesh=mesh_of(1), label="seed 3", progress=False,
        )  # fmt: skip
    assert Checkpoints(tmp_path).latest() == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2000}, r"batch_size must lie in \[1, 1437\]"),
        ({"batch_size": 12, "mesh": 8}, "batch_size 12 is not a multiple of the 8 devices"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps_per_call": 0}, "steps_per_call must be at least 1"),
    ],
)
def test_bad_sizes_are_refused_by_name(changes, message):
    if "mesh" in changes:
        changes = changes | {"mesh": mesh_of(changes["mesh"])}
    with pytest.raises(DataError, match=message):
        fit(**changes)


@pytest.mark.parametrize(("batch_size", "devices"), [(1000, 8), (7, 1), (100, 4)])
def test_evaluator_is_exact_for_every_batch_size(whole, batch_size, devices):
    evaluate = train.evaluator(
        train.classification(logits_fn), DIGITS.test, batch_size=batch_size, mesh=mesh_of(devices), prefix="t_"
    )
    metrics = evaluate(whole[0])
    logits = np.asarray(logits_fn(jax.tree.map(np.asarray, whole[0].params), (), DIGITS.test.images), np.float64)
    wrong = (logits.argmax(1) != DIGITS.test.labels).sum()
    assert metrics["t_error"] == pytest.approx(100 * wrong / 360, rel=1e-12)
    log_z = np.log(np.exp(logits).sum(1))
    assert metrics["t_loss"] == pytest.approx(np.mean(log_z - logits[np.arange(360), DIGITS.test.labels]), rel=1e-5)


def test_evaluations_and_listeners_see_every_record(tmp_path):
    seen = []
    evaluate = lambda state: {"at": float(state.step)}
    listeners = [seen.append, log.TensorBoard(tmp_path)]
    _, history = fit(evaluate=evaluate, evaluate_every=12, workdir=tmp_path, log=listeners)
    assert [record["step"] for record in history] == [8, 12, 16, 24]
    assert [record.get("at") for record in history] == [None, 12.0, None, 24.0]
    assert seen == history
    assert list((tmp_path / "tensorboard").iterdir())


def test_an_nnx_model_with_batch_norm_and_dropout_trains_and_resumes(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(64, rngs=rngs)
            self.drop = nnx.Dropout(0.2, rngs=rngs)
            self.out = nnx.Linear(64, 10, rngs=rngs)

        def __call__(self, images):
            flat = data.standardise(images, MEAN, STD).reshape(images.shape[0], -1)
            return self.out(self.drop(self.norm(flat)))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def nnx_loss(params, model_state, batch, key):
        model = nnx.merge(graph, params, model_state)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(batch.images), batch.labels))
        return loss, (nnx.state(model, nnx.Not(nnx.Param)), {})

    optimizer = optax.sgd(0.1, momentum=0.9)  # optax.adam itself does not pass strict promotion
    options = {"batch_size": 32, "steps_per_call": 10, "mesh": mesh_of(1), "progress": False}
    state = train.init_state(params, optimizer, key=jax.random.key(0), model_state=rest)
    whole, history = train.fit(nnx_loss, optimizer, state, DIGITS.train, steps=20, **options)
    train.fit(nnx_loss, optimizer, state, DIGITS.train, steps=10, workdir=tmp_path, **options)
    resumed, _ = train.fit(nnx_loss, optimizer, state, DIGITS.train, steps=20, workdir=tmp_path, **options)
    same_bits(resumed, whole)
    assert history[-1]["loss"] < history[0]["loss"]
    nnx.merge(graph, resumed.params, resumed.model_state)


def test_a_checkpoint_holds_the_moment_it_was_taken(tmp_path):
    """It is written while training goes on: into donated buffers, and with a history that grows."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state, history = step({"large": jnp.zeros((1000, 1000)), "small": jnp.zeros(3)}), [{"step": 1}]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, history)
    for _ in range(20):
        state = step(state)
        history.append({"step": 2})
    checkpoints.close()
    restored, earlier = Checkpoints(tmp_path).restore(state)
    assert earlier == [{"step": 1}]
    np.testing.assert_array_equal(restored["large"], 1.0)


@pytest.mark.parametrize("damage", ["bits", "manifest", "history"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path, damage):
    state = train.init_state({"w": jax.random.normal(jax.random.key(0), (64, 64))}, OPTIMIZER, key=jax.random.key(1))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, state, [{"step": 5, "wall_s": 1.0}])
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "5"
    restored, history = Checkpoints(tmp_path).restore(state)
    same_bits(restored, state)
    assert history == [{"step": 5, "wall_s": 1.0}]
    if damage == "bits":  # in the array's own bytes, where orbax does not look
        path = max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    else:
        path = folder / {"manifest": "state/manifest.ocdbt", "history": "about/metadata"}[damage]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{folder} cannot be read .*delete that folder") as caught:
        Checkpoints(tmp_path).restore(state)
    assert "\n" not in str(caught.value)
