"""The pipeline experiment: its microbatches, its optimizers by delay, and two processes of which one is killed."""

import json
import pathlib
import shutil
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._machinery import cases, runner
from experiments._machinery.errors import ExperimentError
from experiments.methods import pipeline
from experiments.tasks import pipelines
from jaxlib_methods import optimizers
from tests.experiments import processes

EXPERIMENT = pathlib.Path(pipeline.__file__)


def test_microbatches_depend_on_seed_and_number_alone():
    tokens = np.arange(1000) % 251
    task = types.SimpleNamespace(
        text=types.SimpleNamespace(train=tokens),
        config=types.SimpleNamespace(block_size=16),
        options=pipeline.Config(**pipeline.SMOKE),
    )
    inputs, targets = pipelines.microbatches(task, 3, 4, 9)
    assert inputs.shape == targets.shape == (5, 4, 16) and inputs.dtype == np.int32
    np.testing.assert_array_equal((inputs + 1) % 251, targets)
    np.testing.assert_array_equal(inputs[2:4], pipelines.microbatches(task, 3, 6, 8)[0])
    assert not np.array_equal(inputs, pipelines.microbatches(task, 4, 4, 9)[0])


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_links_of_a_traced_delay_equal_those_of_a_fixed_one(delay):
    params = {"w": jnp.linspace(-1.0, 1.0, 5)}
    traced = jnp.int32(delay)
    ours = optax.chain(
        optimizers.no_stash.scale_by_delay(traced, 4), optimizers.no_stash.discrepancy_correction(traced)
    )
    theirs = optax.chain(
        optimizers.no_stash.scale_by_delay(delay, 4), optimizers.no_stash.discrepancy_correction(delay)
    )
    states = [ours.init(params), theirs.init(params)]
    for t in range(6):
        grads = {"w": jnp.cos(params["w"] + t)}
        updates = []
        for i, optimizer in enumerate((ours, theirs)):
            update, states[i] = optimizer.update(grads, states[i], params)
            updates.append(update["w"])
        np.testing.assert_allclose(*updates, rtol=1e-5, atol=1e-7)
        params = optax.apply_updates(params, {"w": updates[0]})
        corrected = [optimizers.no_stash.discrepancy_corrected(state, params)["w"] for state in states]
        np.testing.assert_allclose(*corrected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (4, 3)}, "stages must divide the 8 blocks, got 3"),
        ({"replicas": 3}, "replicas must divide the batch size 4, got 3"),
        ({"steps": 401}, "steps must be a multiple of gpipe's 4, got 401"),
        ({"methods": ()}, "methods is empty"),
        ({"learning_rates": (0.0,)}, "learning_rates must be positive"),
        ({"clip": -1.0}, "clip must be positive, got -1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pipeline.Config(**options)


def test_too_few_devices_end_the_run_with_a_clear_message(tmp_path):
    config = pipeline.Config(**pipeline.SMOKE | {"replicas": 8, "batch_size": 8})
    with pytest.raises(ExperimentError, match="2 stages times 8 replicas need 16 devices, there are 8"):
        runner.run(pipeline, config, tmp_path, smoke=True)


OPTIONS = ("--smoke", "--methods", "nesterov", "--steps", "400", "--evaluate-every", "40", "--checkpoint-every", "40")


def losses(workdir):
    """Every line of the log as (step, training loss), and the validation loss at the end."""
    case = cases.folder(workdir, "nesterov P=2", 0, 0.01)
    lines = [json.loads(line) for line in (case / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(40, 401, 40))
    (record,) = json.loads((workdir / "result.json").read_text())["records"]
    return [line["loss"] for line in lines] + [record["metrics"]["validation_loss"]]


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_its_checkpoint_continues_on_two_processes_and_on_one(tmp_path):
    """One stage in each of two processes, over gloo; then both stages in a single one."""
    workdir = tmp_path / "run"
    saved = lambda: list(workdir.glob("cases/*/checkpoints/[0-9]*"))
    survivor, victim = processes.start_cluster(EXPERIMENT.stem, workdir, *OPTIONS)
    processes.wait_for(saved, survivor)
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    assert survivor.wait(timeout=60) == 1
    assert time.monotonic() - killed < 60
    last = (tmp_path / "run0.txt").read_text().splitlines()[-1]
    assert last.startswith("error: another process of the run is gone (")
    assert "start all processes again with the same commands: the run goes on from its last checkpoint" in last
    assert not (workdir / "result.json").exists()

    alone = tmp_path / "alone"
    shutil.copytree(workdir, alone)
    processes.finish(*processes.start_cluster(EXPERIMENT.stem, workdir, *OPTIONS))
    processes.finish(processes.start(EXPERIMENT.stem, alone, *OPTIONS, devices=2))
    undisturbed = tmp_path / "undisturbed"
    config = pipeline.Config(
        **pipeline.SMOKE | {"methods": ("nesterov",), "steps": 400, "evaluate_every": 40, "checkpoint_every": 40}
    )
    with jax.numpy_dtype_promotion("standard"):
        runner.run(pipeline, config, undisturbed, smoke=True)
    expected = losses(undisturbed)
    np.testing.assert_allclose(losses(workdir), expected, rtol=2e-5)
    np.testing.assert_allclose(losses(alone), expected, rtol=2e-5)
    assert "2 processes" in json.loads((workdir / "result.json").read_text())["device"]
