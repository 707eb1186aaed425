"""What a solver's compiled programs take, as one pytree: arrays that may be traced and choices that may not."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax

from jaxlib_methods.message_passing._lines import Lines, Messages, to_lines
from jaxlib_methods.message_passing.grid import GridMRF, check
from jaxlib_methods.typing import Implementation, Rounding


class Schedule(NamedTuple):
    """What is static in a solve.

    Attributes:
      num_directions: D, 4, 8 or 16.
      edge_probability: rho, 1 for ISGMR and SGM.
      synchronous: Jacobi over the pairs (ISGMR) instead of Gauss-Seidel (TRWP).
      implementation: of the sweeps.
      num_iterations: over all directions.
      rounding: how labels are read off.
    """

    num_directions: int
    edge_probability: float
    synchronous: bool
    implementation: Implementation | None = None
    num_iterations: int = 1
    rounding: Rounding = "argmin"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("unaries", "pairwise", "weights", "messages"),
    meta_fields=("schedule",),
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """A batch of grid MRFs and how they are solved; `Problem.of` checks it.

    Attributes:
      unaries: (B, H, W, L).
      pairwise: V.
      weights: (D, B, H, W), or None for 1.
      messages: D arrays in sweep layout to start from, or None for zeros.
      schedule: static.
    """

    unaries: Any
    pairwise: Any
    weights: Any
    messages: Any
    schedule: Schedule

    @classmethod
    def of(cls, mrf: GridMRF, schedule: Schedule, messages: Messages | None = None) -> "Problem":
        """The problem, with a batch axis of 1 where `mrf` has none.

        Raises:
          ValueError: for an MRF that cannot be solved in these directions, and messages of another shape.
        """
        check(mrf, schedule.num_directions)
        unaries = mrf.unaries if mrf.unaries.ndim == 4 else mrf.unaries[None]
        weights = None if mrf.edge_weights is None else mrf.edge_weights[: schedule.num_directions]
        if weights is not None and mrf.unaries.ndim == 3:
            weights = weights[:, None]
        b, h, w, num_labels = unaries.shape
        shapes = [(w, num_labels, b * h)] * 2 + [(h, num_labels, b * w)] * (schedule.num_directions - 2)
        if messages is not None and [m.shape for m in messages] != shapes:
            raise ValueError(f"messages must have the shapes {shapes}, got {[m.shape for m in messages]}")
        return cls(unaries, mrf.pairwise, weights, messages, schedule)

    def lines(self) -> Lines:
        """Transposed into sweep layout, once, before all iterations."""
        thetas = (to_lines(self.unaries, True), to_lines(self.unaries, False))
        if self.weights is None:
            return Lines(thetas, self.pairwise, None)
        lines = lambda d: to_lines(self.weights[d][..., None], d < 2)[:, 0]
        return Lines(thetas, self.pairwise, tuple(lines(d) for d in range(self.schedule.num_directions)))

    def start(self, lines: Lines) -> Messages:
        """The messages of the first iteration."""
        return lines.zeros(self.schedule.num_directions) if self.messages is None else self.messages
