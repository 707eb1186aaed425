"""The command line in processes of its own, which tests start, wait for and kill."""

import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def start(experiment, workdir, *options, devices=1):
    """`experiments run` with so many fake devices; its output is `workdir`.txt, or that of its process in a cluster."""
    number = options[options.index("--process-id") + 1] if "--process-id" in options else ""
    command = [sys.executable, "-m", "experiments", "run", str(experiment), "--workdir", str(workdir), *options]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    output = open(workdir.parent / f"{workdir.name}{number}.txt", "ab")  # noqa: SIM115
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def start_cluster(experiment, workdir, *options, devices=1, count=2):
    """Processes that find each other on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    cluster = ("--distributed", "--coordinator-address", f"localhost:{port}", "--num-processes", str(count))
    return [
        start(experiment, workdir, *options, *cluster, "--process-id", str(i), devices=devices) for i in range(count)
    ]


def finish(*processes, timeout=180):
    codes = [process.wait(timeout=timeout) for process in processes]
    assert codes == [0] * len(codes)


def wait_for(condition, process, seconds=180):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s")
