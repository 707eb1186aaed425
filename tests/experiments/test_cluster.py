"""Processes that cannot start together end with a clear message in bounded time."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXPERIMENT = pathlib.Path(__file__).parent / "logistic_on_digits.py"


def run(workdir, *options):
    command = [sys.executable, "-m", "experiments", "run", str(EXPERIMENT), "--workdir", str(workdir), *options]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stderr.splitlines(), time.monotonic() - began


@pytest.mark.slow
def test_a_coordinator_that_never_answers_is_named_in_bounded_time(tmp_path):
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("localhost", 0))
        silent.listen()
        address = f"localhost:{silent.getsockname()[1]}"
        cluster = ("--coordinator-address", address, "--num-processes", "2", "--process-id", "1")
        code, lines, seconds = run(tmp_path / "run", "--distributed", *cluster, "--start-timeout", "2")
    assert code != 0 and seconds < 60
    assert lines[-1].startswith("error: this process ended because another one of the run died, could not be reached")
    assert "--coordinator-address" in lines[-1] and "the run goes on from its last checkpoint" in lines[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_a_cluster_the_missing_options_are_named(tmp_path):
    code, lines, _ = run(tmp_path / "run", "--distributed")
    assert code == 1
    assert lines[-1].startswith("error: --distributed could not start") and "--coordinator-address" in lines[-1]
