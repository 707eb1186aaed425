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
    "AttackNorm",
    "AxisName",
    "ChannelTies",
    "GateGradients",
    "Implementation",
    "InitializerKind",
    "IsometryObjective",
    "Key",
    "LossFn",
    "LowRankMethod",
    "NeuronReduction",
    "PairwiseKind",
    "ProjectionJacobian",
    "PruningPolicy",
    "PruningSchedule",
    "PruningScope",
    "PyTree",
    "WeightProjection",
]

PyTree: TypeAlias = Any  # any nesting of containers that JAX knows, with arrays as leaves
Key: TypeAlias = jax.Array  # a typed key of `jax.random.key`
AxisName: TypeAlias = str | tuple[str, ...]  # of a mesh
ApplyFn: TypeAlias = Callable[[PyTree, Any], Any]  # (params, inputs) -> outputs
LossFn: TypeAlias = Callable[[PyTree, Any], jax.Array]  # (params, batch) -> a scalar

# String options, by name.
AttackNorm: TypeAlias = Literal["linf", "l2", "l2_per_channel"]
ChannelTies: TypeAlias = Literal["max", "min", "union"]
GateGradients: TypeAlias = Literal["mpmg", "mnmg"]
Implementation: TypeAlias = Literal["xla", "pallas_gpu", "pallas_tpu"]
InitializerKind: TypeAlias = Literal[
    "orthogonal", "conv_orthogonal", "delta_orthogonal", "lecun_normal", "glorot_normal", "he_normal"
]
IsometryObjective: TypeAlias = Literal["frobenius", "squared"]
LowRankMethod: TypeAlias = Literal["svd", "asvd", "svd_llm"]
NeuronReduction: TypeAlias = Literal["sum", "mean", "max"]
PairwiseKind: TypeAlias = Literal["potts", "truncated_linear", "toeplitz", "table"]
ProjectionJacobian: TypeAlias = Literal["exact", "single", "double", "clipped", "straight_through"]
PruningPolicy: TypeAlias = Literal["snip", "weights"]
PruningSchedule: TypeAlias = Literal["exponential", "linear"]
PruningScope: TypeAlias = Literal["global", "per_layer"]
WeightProjection: TypeAlias = Literal["softmax", "sparsemax", "argmax", "tanh", "round"]
