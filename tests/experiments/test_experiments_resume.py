"""Processes that are really killed: the same command again ends with the parameters of an undisturbed run."""

import json
import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest

from tests.experiments import processes
from tests.experiments.processes import finish, wait_for

EXPERIMENT = pathlib.Path(__file__).parent / "logistic_on_digits.py"


def start(workdir, *options, devices=1):
    return processes.start(EXPERIMENT, workdir, *options, devices=devices)


def parameters(workdir, seed=0):
    metrics = json.loads((workdir / f"cases/logistic-seed{seed}" / "metrics.json").read_text())
    return {name: np.frombuffer(bytes.fromhex(bits), np.float32) for name, bits in metrics["details"]["bits"].items()}


def logged(workdir):
    """The steps of the lines of seed 0's log."""
    lines = (workdir / "cases" / "logistic-seed0" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def newest(workdir):
    """Step of the newest whole checkpoint, over the seeds of the run; -1 before the first."""
    steps = [int(path.name) for path in workdir.glob("cases/*/checkpoints/*") if path.name.isdigit()]
    return max(steps, default=-1)


OPTIONS = ("--steps", "400", "--seeds", "1", "--checkpoint-every", "10")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(workdir, *OPTIONS))
    return parameters(workdir)


@pytest.mark.slow
def test_kill_9_at_any_moment_and_the_same_command_again_gives_the_same_bits(undisturbed, tmp_path):
    workdir, reached = tmp_path / "run", []
    draw = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    for _ in range(3):
        before = newest(workdir)
        process = start(workdir, *OPTIONS)
        # From the first new checkpoint on, anywhere: inside a chunk, a save, a rename, a deletion.
        wait_for(lambda: newest(workdir) > before, process)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        reached.append(newest(workdir))
    assert 0 < reached[0] < reached[-1] < 400 and reached == sorted(reached)
    finish(start(workdir, *OPTIONS))
    for name, value in parameters(workdir).items():
        np.testing.assert_array_equal(value, undisturbed[name])
    steps = [
        json.loads(line)["step"] for line in (workdir / "cases/logistic-seed0" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(10, 401, 10))
    attempts = json.loads((workdir / "attempts.json").read_text())
    busy = sum(end - begin for begin, end in attempts[:-1])
    assert len(attempts) == 4 and json.loads((workdir / "result.json").read_text())["wall_s"] > busy > 0


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_the_command_with_the_remedy_and_the_remedy_works(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, *OPTIONS)
    wait_for(lambda: newest(workdir) > 20, process)
    process.kill()
    process.wait()
    folder = workdir / "cases/logistic-seed0" / "checkpoints" / str(newest(workdir))
    (folder / "state" / "manifest.ocdbt").write_bytes(b"damaged")
    process = start(workdir, *OPTIONS)
    assert process.wait(timeout=60) == 1
    lines = (tmp_path / "run.txt").read_text().splitlines()
    message = [line for line in lines if line.startswith("error: ")]
    assert len(message) == 1 and f"{folder} cannot be read" in message[0] and "delete that folder" in message[0]
    subprocess.run(["rm", "-r", folder], check=True)
    finish(start(workdir, *OPTIONS))
    for name, value in parameters(workdir).items():
        np.testing.assert_array_equal(value, undisturbed[name])


@pytest.mark.slow
def test_two_processes_of_two_devices_are_killed_resume_and_equal_one_process(undisturbed, tmp_path):
    workdir = tmp_path / "run"

    both = lambda: processes.start_cluster(EXPERIMENT, workdir, *OPTIONS, devices=2)
    started = both()
    wait_for(lambda: newest(workdir) > 100, started[0])
    for process in started:
        process.kill()
        process.wait()
    assert newest(workdir) < 400
    finish(*both())
    for name, value in parameters(workdir).items():
        np.testing.assert_allclose(value, undisturbed[name], rtol=1e-5, atol=2e-6)
    result = json.loads((workdir / "result.json").read_text())
    assert result["device"].startswith("4 x cpu") and "2 processes" in result["device"]
    # One process writes: every line of the log stands there once.
    steps = [
        json.loads(line)["step"] for line in (workdir / "cases/logistic-seed0" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(10, 401, 10))
