"""Types of the library's arguments: what stands for a tree, a key or a loss, and one `Literal` for each string option.

Example:
  >>> import typing
  >>> typing.get_args(Implementation)
  ('xla', 'pallas_gpu', 'pallas_tpu')
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax

__all__ = [
    "ApplyFn",
    "AxisName",
    "Implementation",
    "Key",
    "LossFn",
    "PairwiseKind",
    "PyTree",
]

PyTree: TypeAlias = Any  # any nesting of containers that JAX knows, with arrays as leaves
Key: TypeAlias = jax.Array  # a typed key of `jax.random.key`
AxisName: TypeAlias = str | tuple[str, ...]  # of a mesh
ApplyFn: TypeAlias = Callable[[PyTree, Any], Any]  # (params, inputs) -> outputs
LossFn: TypeAlias = Callable[[PyTree, Any], jax.Array]  # (params, batch) -> a scalar

# String options, by name.
Implementation: TypeAlias = Literal["xla", "pallas_gpu", "pallas_tpu"]
PairwiseKind: TypeAlias = Literal["potts", "truncated_linear", "toeplitz", "table"]
