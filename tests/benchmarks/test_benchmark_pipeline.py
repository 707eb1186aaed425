"""The benchmark of pipelines compares the same work, and its slow link takes the time that it should."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks._machinery import slow_link
from benchmarks.cases import pipeline
from jaxlib_methods.parallel.pipelines import links


@pytest.fixture
def small(monkeypatch):
    """Two thin blocks; what is kept of the model is forgotten before and after."""
    for name, value in {"LAYERS": 2, "WIDTH": 8, "BLOCK": 8, "BATCH": 2}.items():
        monkeypatch.setattr(pipeline, name, value)
    pipeline._model.cache_clear()
    yield
    pipeline._model.cache_clear()


def test_pipeline_and_one_device_end_with_the_same_parameters(small):
    with jax.numpy_dtype_promotion("standard"):
        pipe, (state, *batches) = pipeline.make_pipeline("gpipe", 2, 2)
        ours, _ = pipe.step(state, *batches)
        step, *arguments = pipeline.without_pipeline(2, 2, every=False)
        theirs, _ = step(*arguments)
        for a, b in zip(pipe.stages(ours), theirs, strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, dict(b))


ECHO = """
import socket, sys
if sys.argv[1] == "0":
    server = socket.create_server(("10.77.0.1", 5000))
    connection, _ = server.accept()
    while data := connection.recv(1 << 20):
        connection.sendall(data)
"""
CLIENT = """
import socket, time
for attempt in range(100):
    try:
        connection = socket.create_connection(("10.77.0.1", 5000))
        break
    except OSError:
        time.sleep(0.1)
def once(size):
    began, left = time.perf_counter(), size
    connection.sendall(bytes(size))
    while left:
        left -= len(connection.recv(1 << 20))
    return time.perf_counter() - began
once(1)
print(min(once(1) for _ in range(5)), min(once(50_000) for _ in range(5)))
"""


@pytest.mark.skipif(slow_link.unavailable() is not None, reason="no network namespaces here")
def test_the_slow_link_takes_its_latency_and_its_bandwidth():
    link = links.Link(8e6, 0.03)
    with slow_link.slow_link(link) as prefix:
        server = subprocess.Popen([*prefix(0), sys.executable, "-c", ECHO, "0"])
        done = subprocess.run([*prefix(1), sys.executable, "-c", CLIENT], capture_output=True, text=True, timeout=60)
        server.kill()
        server.wait()
    byte, message = map(float, done.stdout.split())
    assert 0.06 <= byte < 0.08  # there and back
    assert message == pytest.approx(0.06 + 2 * link.seconds(50_000), rel=0.15)
    assert f"link{os.getpid()}" not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
