"""Names that have moved: the old ones work for one version more and say where the new ones are."""

import importlib
import sys
import warnings
from collections.abc import Mapping
from typing import Any

RENAMED_IN = "0.2.0"


def moved_names(module: str, moved: Mapping[str, str]) -> None:
    """Gives a module a `__getattr__` that finds what has moved, with a `DeprecationWarning`.

    It is set from here and not by the module, whose every misspelt name would else have a type for type checkers.

    Args:
      module: `__name__` of the module that the old names were in.
      moved: old name -> where it is now below `jaxlib_methods`, as "pruning.scores.magnitude". It is the attribute
        `moved` of the function that is set.
    """

    def __getattr__(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = f"jaxlib_methods.{moved[name]}".rpartition(".")
        warnings.warn(
            f"{module}.{name} is {place}.{new} since {RENAMED_IN}; the old name goes in the next version",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(place), new)

    __getattr__.moved = moved
    sys.modules[module].__getattr__ = __getattr__
