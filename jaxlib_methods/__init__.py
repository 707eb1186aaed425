"""Research methods for compressing, calibrating and distributing networks, and for structured prediction, in JAX.

Families are attributes, loaded when they are first asked for:

    import jaxlib_methods as jm
    masks = jm.pruning.prune_masks(scores, sparsity=0.9)
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlib_methods._version import __version__ as __version__

if TYPE_CHECKING:
    from jaxlib_methods import (
        classifiers as classifiers,
        kernels as kernels,
        low_rank as low_rank,
        message_passing as message_passing,
        models as models,
        normalization as normalization,
        optimizers as optimizers,
        parallel as parallel,
        pruning as pruning,
        quantization as quantization,
        robustness as robustness,
        training_dynamics as training_dynamics,
        trees as trees,
        typing as typing,
    )
    from jaxlib_methods._citation import citation as citation

__all__ = [
    "__version__",
    "citation",
    "classifiers",
    "kernels",
    "low_rank",
    "message_passing",
    "models",
    "normalization",
    "optimizers",
    "parallel",
    "pruning",
    "quantization",
    "robustness",
    "training_dynamics",
    "trees",
    "typing",
]


if not TYPE_CHECKING:  # for a type checker every misspelt name would be one of these

    def __getattr__(name: str) -> Any:
        if name == "citation":
            return importlib.import_module("jaxlib_methods._citation").citation
        if name in __all__:
            return importlib.import_module(f"jaxlib_methods.{name}")
        raise AttributeError(f"module 'jaxlib_methods' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
