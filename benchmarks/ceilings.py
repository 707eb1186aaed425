"""What this device can do at best, measured in the same run: the copy bandwidth and the matrix product's rate.

A ceiling is the best of several samples, because anything that disturbs a measurement only makes it slower.
"""

import functools
import time

import jax
import jax.numpy as jnp

SAMPLES = 8
# Far beyond the last-level cache, and small enough for a laptop; a GPU needs more to hide its launch latency.
COPY_BYTES = {"cpu": 256 * 2**20}
COPY_BYTES_ACCELERATOR = 4 * 2**30
MATMUL_SIZE = {"cpu": 1536}
MATMUL_SIZE_ACCELERATOR = 8192


@functools.cache
def copy_bytes_per_s(device: jax.Device) -> float:
    """Bytes read plus bytes written per second, by negating a large float32 array in place.

    In place (the buffer is donated), because a fresh result on the CPU would measure the kernel's page faults.
    """
    n_bytes = COPY_BYTES.get(device.platform, COPY_BYTES_ACCELERATOR)
    negate = jax.jit(jnp.negative, donate_argnums=0)
    x = jnp.ones(n_bytes // 4, jnp.float32, device=device)
    x = jax.block_until_ready(negate(x))
    best = float("inf")
    for _ in range(SAMPLES):
        start = time.perf_counter()
        x = jax.block_until_ready(negate(x))
        best = min(best, time.perf_counter() - start)
    return 2 * n_bytes / best


@functools.cache
def matmul_flops_per_s(device: jax.Device, dtype: str = "float32") -> float:
    """Multiplications plus additions per second of a large square product, in JAX's default precision for `dtype`."""
    n = MATMUL_SIZE.get(device.platform, MATMUL_SIZE_ACCELERATOR)
    product = jax.jit(jnp.matmul)
    # Random numbers: GPUs multiply constants faster, because fewer bits flip.
    x = jax.device_put(jax.random.normal(jax.random.key(0), (n, n), dtype), device)
    jax.block_until_ready(product(x, x))
    best = float("inf")
    for _ in range(SAMPLES):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
