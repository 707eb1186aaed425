"""The benchmark of the delays measures what it says: the same parameters, one trace, and memory as announced."""

import jax
import pytest

from benchmarks.cases import delays
from jaxlib_methods import optimizers


@pytest.mark.parametrize("kind", ["bare", "stale weights", "late gradients"])
def test_steps_compile_once_and_hold_the_announced_memory(kind):
    size = 8 * 64
    step, params, state = delays.make_step(kind, size)
    nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    tau = [(f"stage{j}", delay) for j, delay in enumerate(optimizers.delays.pipeline_delays(delays.P))]
    announced = {
        "bare": 0,
        "stale weights": optimizers.delays.delay_memory(params, tau),
        "late gradients": optimizers.delays.delay_memory(params, tau, late_gradients=True),
    }[kind]
    assert nbytes(params) == 4 * size
    assert announced <= nbytes(state) - 2 * nbytes(params) < announced + 64  # moments, history, counters
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
