"""Moving averages of gradients."""

import math

import jax
import jax.numpy as jnp

from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods.typing import PyTree


def moments(params: PyTree) -> PyTree:
    """Zeros for averages of gradients or of their squares: like the parameters, but at least float32."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=compute_dtype(p.dtype)), params)


def one_minus_power(decay: jax.typing.ArrayLike, t: jax.Array) -> jax.Array:
    """1 - decay^t; the direct form loses four digits of float32 at the first steps of a slow average."""
    log = math.log(decay) if isinstance(decay, float) and decay > 0 else jnp.log(decay)
    return -jnp.expm1(t * log)
