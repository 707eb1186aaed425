"""What a program costs in arithmetic and memory traffic: for rooflines and Pallas' cost estimates."""

import math
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """Floating-point operations, and bytes moved between memory and chip.

    Example:
      >>> Cost(flops=2_000, bytes_accessed=400).floor_s(flops_per_s=1e3, bytes_per_s=1e2)
      4.0
    """

    flops: float | int
    bytes_accessed: float | int

    def floor_s(self, *, flops_per_s: float | int = math.inf, bytes_per_s: float | int = math.inf) -> float:
        """The roofline: the shortest time in which a device of these rates can compute and move it all, in seconds."""
        return max(self.flops / flops_per_s, self.bytes_accessed / bytes_per_s)

    def pallas(self) -> Any:
        """The same for `pallas_call`."""
        from jax.experimental import pallas as pl  # not loaded with the library: only kernels need it

        return pl.CostEstimate(flops=int(self.flops), bytes_accessed=int(self.bytes_accessed), transcendentals=0)
