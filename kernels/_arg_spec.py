"""The form in which every kernel lists its workloads: what tests lower, benchmarks time and tuning is for."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class ArgSpec:
    """One named workload of a kernel.

    Attributes:
      name: unique among the kernel's.
      args: argument -> its value; arrays as `jax.ShapeDtypeStruct`, so that a list of workloads takes no memory.
      source: where the sizes come from.
      tags: "ci" for those small enough for tests.
    """

    name: str
    args: Mapping[str, Any]
    source: str
    tags: tuple[str, ...] = ()
