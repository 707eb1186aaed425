"""Products with packed weights for the tests of every implementation."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.kernels import packed_matmul as pm

LABELS = {2: (-1.0, 1.0), 3: (-1.0, 0.0, 1.0), 4: (-2.0, -1.0, 1.0, 2.0), 7: (-3.0, -2.0, -1.0, 0.5, 1.0, 2.0, 3.0)}


def problem(m, depth, n, d, dtype=jnp.float32):
    """Activations and weights of small integers, whose products are exact in any order of addition."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, d, (depth, n))
    x = rng.integers(-8, 9, (m, depth)).astype(np.float32)
    dense = np.asarray(LABELS[d], np.float64)[codes]
    return jnp.asarray(x, dtype), pm.pack_codes(jnp.asarray(codes), pm.bits_for(d)), x @ dense


def shapes_of(spec, dtype):
    return jax.ShapeDtypeStruct(spec.args["x"].shape, dtype), spec.args["words"]
