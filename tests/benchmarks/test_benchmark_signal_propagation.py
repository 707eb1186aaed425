"""The benchmarks of signal propagation and of the study compare like with like."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import parallelism_sparsity, signal_propagation


def test_both_loops_repair_alike(key):
    weights = {name: jax.random.normal(key, shape) / 3 for name, shape in {"a": (6, 4), "b": (2, 2, 2, 4)}.items()}
    masks = {name: jnp.abs(weight) > 0.2 for name, weight in weights.items()}
    ours = jax.jit(signal_propagation.compiled_loop(3))(weights, masks)
    theirs = signal_propagation.python_loop(3)(weights, masks)
    for name in weights:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
        assert float(jnp.abs(ours[name] - weights[name]).max()) > 0.01


def test_vmapped_and_sequential_trials_end_with_the_same_weights():
    case = parallelism_sparsity.make_case("case", "lenet300", (8, 8, 1), 8, count=2, steps=3)
    vmapped, sequential = case.implementations["vmapped"], case.implementations["sequential"]
    (start,) = vmapped.args
    together, alone = vmapped.function(start), sequential.canonical(sequential.function())
    for a, b, first in zip(*map(jax.tree.leaves, (together, alone, start.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert first.ndim == 2 or float(jnp.abs(a - first).max()) > 0
