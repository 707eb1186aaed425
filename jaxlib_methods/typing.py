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
    "GPTMLP",
    "ActivationRoot",
    "ApplyFn",
    "AttackDirection",
    "AttackKind",
    "AttackNorm",
    "AttentionImplementation",
    "AveragingMethod",
    "AxisName",
    "ChannelTies",
    "ClassAverage",
    "ConvolutionPadding",
    "Direction",
    "GPTNorm",
    "GPTPosition",
    "GateGradients",
    "Implementation",
    "Incompatibility",
    "InitializerKind",
    "IsometryObjective",
    "Key",
    "KrylovMethod",
    "LossFn",
    "LowRankMethod",
    "MessageDistance",
    "MessagePassingMethod",
    "MorphPrecision",
    "NesterovDiscount",
    "NeuronReduction",
    "OrthogonalRetraction",
    "PairwiseKind",
    "ParameterSubsets",
    "PipelineSchedule",
    "PolarMethod",
    "ProjectionJacobian",
    "PruningPolicy",
    "PruningSchedule",
    "PruningScope",
    "PyTree",
    "QuadraticTruncation",
    "ReductionSolver",
    "ResNetStem",
    "Rounding",
    "SGMVariant",
    "SecondMoments",
    "ShapeScaling",
    "SynchronousSchedule",
    "TransformFold",
    "UnseenClasses",
    "VGGVariant",
    "WeightProjection",
]

PyTree: TypeAlias = Any  # any nesting of containers that JAX knows, with arrays as leaves
Key: TypeAlias = jax.Array  # a typed key of `jax.random.key`
AxisName: TypeAlias = str | tuple[str, ...]  # of a mesh
ApplyFn: TypeAlias = Callable[[PyTree, Any], Any]  # (params, inputs) -> outputs
LossFn: TypeAlias = Callable[[PyTree, Any], jax.Array]  # (params, batch) -> a scalar

# String options, by name.
ActivationRoot: TypeAlias = Literal["minus", "plus"]
AttackDirection: TypeAlias = Literal["forward", "backward", "both"]
AttackKind: TypeAlias = Literal[
    "constant", "random", "scale", "random_sign", "delay", "bias", "invisible_noise", "adaptive"
]
AttackNorm: TypeAlias = Literal["linf", "l2", "l2_per_channel"]
AttentionImplementation: TypeAlias = Literal["xla", "cudnn"]
AveragingMethod: TypeAlias = Literal["avg", "weight_update", "ema"]
ChannelTies: TypeAlias = Literal["max", "min", "union"]
ClassAverage: TypeAlias = Literal["ema", "cumulative"]
ConvolutionPadding: TypeAlias = Literal["SAME", "VALID"]
Direction: TypeAlias = Literal["forward", "backward"]
GPTMLP: TypeAlias = Literal["relu", "gelu", "swiglu"]
GPTNorm: TypeAlias = Literal["layer", "rms"]
GPTPosition: TypeAlias = Literal["learned", "rotary"]
GateGradients: TypeAlias = Literal["mpmg", "mnmg"]
Implementation: TypeAlias = Literal["xla", "pallas_gpu", "pallas_tpu"]
Incompatibility: TypeAlias = Literal["none", "partial", "full"]
InitializerKind: TypeAlias = Literal[
    "orthogonal", "conv_orthogonal", "delta_orthogonal", "lecun_normal", "glorot_normal", "he_normal"
]
IsometryObjective: TypeAlias = Literal["frobenius", "squared"]
KrylovMethod: TypeAlias = Literal["cholesky", "householder"]
LowRankMethod: TypeAlias = Literal["svd", "asvd", "svd_llm"]
MessageDistance: TypeAlias = Literal["absolute", "euclidean", "sign", "wasserstein"]
MessagePassingMethod: TypeAlias = Literal["trwp", "isgmr", "mean_field"]
MorphPrecision: TypeAlias = Literal["float64", "parameter"]
NesterovDiscount: TypeAlias = Literal["both", "momentum", "none"]
NeuronReduction: TypeAlias = Literal["sum", "mean", "max"]
OrthogonalRetraction: TypeAlias = Literal["qr", "bjorck"]
PairwiseKind: TypeAlias = Literal["potts", "truncated_linear", "toeplitz", "table"]
ParameterSubsets: TypeAlias = Literal["partition", "strided", "bernoulli"]
PipelineSchedule: TypeAlias = Literal["gpipe", "1f1b", "circular", "async"]
PolarMethod: TypeAlias = Literal["svd", "qdwh", "newton_schulz", "gram"]
ProjectionJacobian: TypeAlias = Literal["exact", "single", "double", "clipped", "straight_through"]
PruningPolicy: TypeAlias = Literal["snip", "weights"]
PruningSchedule: TypeAlias = Literal["exponential", "linear"]
PruningScope: TypeAlias = Literal["global", "per_layer"]
QuadraticTruncation: TypeAlias = Literal["distance", "cost"]
ReductionSolver: TypeAlias = Literal["cg", "woodbury", "projection"]
ResNetStem: TypeAlias = Literal["cifar", "strided", "imagenet"]
Rounding: TypeAlias = Literal["argmin", "sequential"]
SGMVariant: TypeAlias = Literal["messages", "path_costs"]
SecondMoments: TypeAlias = Literal["error", "keep", "reset"]
ShapeScaling: TypeAlias = Literal["width", "spectral", "rms"]
SynchronousSchedule: TypeAlias = Literal["gpipe", "1f1b", "circular"]
TransformFold: TypeAlias = Literal["in place", "each", "master"]
UnseenClasses: TypeAlias = Literal["global_mean", "zero"]
VGGVariant: TypeAlias = Literal["c", "d", "like"]
WeightProjection: TypeAlias = Literal["softmax", "sparsemax", "argmax", "tanh", "round"]
