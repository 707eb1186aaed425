"""What this device can do at best, measured in the same run: the copy bandwidth and the matrix product's rate.

A ceiling is the best of all samples of this process, because anything that disturbs a measurement only makes it slower:
every call measures for a while again and returns the best rate so far.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

SECONDS = 0.5  # of samples in every call
# Far beyond the last-level cache, and small enough for a laptop; a GPU needs more to hide its launch latency.
COPY_BYTES = {"cpu": 256 * 2**20}
COPY_BYTES_ACCELERATOR = 4 * 2**30
MATMUL_SIZE = {"cpu": 1536}
MATMUL_SIZE_ACCELERATOR = 8192

_shortest_s: dict[tuple[str, jax.Device], float] = {}


def copy_bytes_per_s(device: jax.Device) -> float:
    """Bytes read plus bytes written per second, by negating a large float32 array in place.

    In place (the buffer is donated), because a fresh result on the CPU would measure the kernel's page faults.
    """
    n_bytes = COPY_BYTES.get(device.platform, COPY_BYTES_ACCELERATOR)
    negate = jax.jit(jnp.negative, donate_argnums=0)
    x = jnp.ones(n_bytes // 4, jnp.float32, device=device)

    def in_place() -> jax.Array:
        nonlocal x
        x = negate(x)
        return x

    return 2 * n_bytes / _shortest(("copy", device), in_place)


def matmul_flops_per_s(device: jax.Device, dtype: str = "float32") -> float:
    """Multiplications plus additions per second of a large square product, in JAX's default precision for `dtype`."""
    n = MATMUL_SIZE.get(device.platform, MATMUL_SIZE_ACCELERATOR)
    product = jax.jit(jnp.matmul)
    # Random numbers: GPUs multiply constants faster, because fewer bits flip.
    x = jax.device_put(jax.random.normal(jax.random.key(0), (n, n), dtype), device)
    return 2 * n**3 / _shortest((f"matmul {dtype}", device), lambda: product(x, x))


def _shortest(what: tuple[str, jax.Device], function: Callable[[], jax.Array]) -> float:
    """Shortest time of `function()` so far, in seconds; its first call here, which compiles it, does not count."""
    jax.block_until_ready(function())
    times = [_shortest_s.get(what, float("inf"))]
    end = time.perf_counter() + SECONDS
    while len(times) == 1 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    _shortest_s[what] = min(times)
    return _shortest_s[what]
