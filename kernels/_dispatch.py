"""Which implementation of a kernel runs: the one that is named, or the best one that supports the arguments.

An implementation is a module of the kernel's package with the kernel's functions. A function raises
`NotImplementedError` with the reason where it does not support its arguments or the device.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlib_methods._core import checks
from jaxlib_methods.typing import Implementation

_MODULES = {"xla": "reference", "pallas_gpu": "pallas_gpu", "pallas_tpu": "pallas_tpu"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The implementations of one kernel.

    Attributes:
      name: of its package in `jaxlib_methods.kernels`.
      implementations: those that there are.
      preference: platform -> what None tries there, in this order; "xla", which runs everywhere, where a platform is
        not listed. A kernel that has been measured to be the fastest on its device goes first, and nothing else
        changes.
    """

    name: str
    implementations: tuple[Implementation, ...]
    preference: Mapping[str, tuple[Implementation, ...]] = dataclasses.field(default_factory=dict)

    def run(self, function: str, implementation: Implementation | None, *args: Any) -> Any:
        """Calls `function(*args)` of an implementation. A name never falls back.

        Raises:
          ValueError: a name that is none.
          NotImplementedError: the named implementation does not exist or does not support the arguments.
          ExceptionGroup: none is named and none works; it holds every reason.
        """
        checks.one_of(Implementation | None, implementation=implementation)
        if implementation is not None:
            return self._find(function, implementation)(*args)
        reasons = []
        for name in self.preference.get(jax.default_backend(), ("xla",)):
            try:
                return self._find(function, name)(*args)
            except NotImplementedError as reason:
                reasons.append(NotImplementedError(f"{name}: {reason}"))
        raise ExceptionGroup(f"no implementation of {function} supports these arguments", reasons)

    def _find(self, function: str, name: Implementation) -> Callable[..., Any]:
        """Modules are imported on first use: a JAX without a Pallas backend still runs the others."""
        if name not in self.implementations:
            raise NotImplementedError(
                f"{self.name} has no {name!r}; it has {', '.join(map(repr, self.implementations))}"
            )
        try:
            module = importlib.import_module(f"jaxlib_methods.kernels.{self.name}.{_MODULES[name]}")
        except ImportError as error:
            raise NotImplementedError(f"{name!r} cannot be imported here: {error}") from error
        return getattr(module, function)


def require(reason: str | None) -> None:
    """Raises NotImplementedError if there is a reason why an implementation cannot be used."""
    if reason is not None:
        raise NotImplementedError(reason)
