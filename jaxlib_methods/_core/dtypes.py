"""The type that something is computed in: float64 where it comes in float64, float32 for everything narrower."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods.typing import PyTree


def compute_dtype(dtype: jax.typing.DTypeLike) -> Any:
    """float64 for float64, float32 for everything else: what decompositions, long sums and solvers need.

    Example:
      >>> compute_dtype(jnp.bfloat16).__name__
      'float32'
    """
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def common_compute_dtype(tree: PyTree) -> Any:
    """The one type for a whole tree: float64 if a leaf has it, else float32.

    Example:
      >>> common_compute_dtype({"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}).__name__
      'float32'
    """
    return jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(tree)) else jnp.float32


def widen(x: jax.Array) -> jax.Array:
    """x in its `compute_dtype`.

    Example:
      >>> widen(jnp.ones(2, jnp.bfloat16)).dtype.name
      'float32'
    """
    return x.astype(compute_dtype(x.dtype))
