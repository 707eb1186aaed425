"""The benchmark of the isometry repair compares like with like."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import signal_propagation


def test_both_loops_repair_alike(key):
    weights = {name: jax.random.normal(key, shape) / 3 for name, shape in {"a": (6, 4), "b": (2, 2, 2, 4)}.items()}
    masks = {name: jnp.abs(weight) > 0.2 for name, weight in weights.items()}
    ours = jax.jit(signal_propagation.compiled_loop(3))(weights, masks)
    theirs = signal_propagation.python_loop(3)(weights, masks)
    for name in weights:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
        assert float(jnp.abs(ours[name] - weights[name]).max()) > 0.01
