r"""Schedules: which stage works forward (F) or backward (B) on which micro-batch in which slot.

One slot is one F or one B of one micro-batch; P stages j = 0..P-1, M micro-batches m.

  1F1B    F of m on stage j in slot 2 m + j, B in slot 2 m + 2 P - 1 - j. Every stage alternates; at most P - j
          micro-batches are between their F and their B on stage j. Synchronously the gradients of M micro-batches make
          one update and the pipe runs dry; asynchronously every B is followed by that stage's update and the pipe stays
          full, so that F of m meets version max(m - (P - 1 - j), 0): the delays are P - 1 - j.
  GPipe   all F, then all B: F of m on stage j in slot m + j, B in slot (M + P - 1) + (M - 1 - m) + (P - 1 - j).
  circular  R rounds through the stages with 1/R of the blocks each: round r of m on stage j in slot
          (m div P) P R + r P + m mod P + j; backward in the reverse order.

A program repeats a pattern of slots: `Phase`. Within a slot of a pattern a stage only ever works in one direction, so
that exactly the pairs of stages that exchange something are known to the compiler.
"""

import dataclasses

import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods.typing import SynchronousSchedule

__all__ = [
    "bubble_fraction",
    "schedule_table",
]

IDLE, FORWARD, BACKWARD = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Slot:
    """One slot of a pattern: stage j works on micro-batch `step` * k + `offsets[j]` in repetition k = 0, 1, ..."""

    forward: tuple[bool, ...]  # per stage: F, else B
    step: int
    offsets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A pattern of slots and how often it is repeated."""

    slots: tuple[Slot, ...]
    repetitions: int


def one_forward_one_backward(num_stages: int, repetitions: int) -> Phase:
    """1F1B: in even slots the even stages work forward and the odd ones backward, in odd slots the other way round."""
    P = num_stages
    slots = []
    for half in (0, 1):
        forward = tuple((j + half) % 2 == 0 for j in range(P))
        offsets = tuple((half - j) // 2 if f else (half + j + 1 - 2 * P) // 2 for j, f in enumerate(forward))
        slots.append(Slot(forward, 1, offsets))
    return Phase(tuple(slots), repetitions)


def phases_of(schedule: SynchronousSchedule, num_stages: int, num_microbatches: int) -> tuple[Phase, ...]:
    """The phases of a synchronous step."""
    P, M = num_stages, num_microbatches
    if schedule == "1f1b":
        return (one_forward_one_backward(P, M + P - 1),)
    forward = Slot((True,) * P, 1, tuple(-j for j in range(P)))
    backward = Slot((False,) * P, -1, tuple(M - 1 + P - 1 - j for j in range(P)))
    return Phase((forward,), M + P - 1), Phase((backward,), M + P - 1)


def schedule_table(
    schedule: SynchronousSchedule, num_stages: int, num_microbatches: int, num_rounds: int = 1
) -> np.ndarray:
    """The slots of a schedule, from the start of an empty pipe until it is empty again.

    Args:
      schedule: "gpipe", "1f1b" (also the asynchronous one, which has the same slots) or "circular".
      num_stages: P.
      num_microbatches: M.
      num_rounds: R, rounds of the circular schedule; its slots are as many times shorter.

    Returns:
      int [slots, P, 2]: the work (0 none, 1 F, 2 B) and the micro-batch (-1 where there is none).

    Raises:
      ValueError: for an unknown schedule and for numbers that do not fit it.

    Example:
      >>> table = schedule_table("1f1b", num_stages=2, num_microbatches=2)
      >>> for j in range(2):
      ...     print(" ".join(".FB"[work] + (str(m) if work else ".") for work, m in table[:, j]))
      F0 .. F1 B0 .. B1
      .. F0 B0 F1 B1 ..

    Source: Huang et al. (NeurIPS 2019), arXiv:1811.06965 [huang2019gpipe]; Narayanan et al. (SOSP 2019),
    arXiv:1806.03377 [narayanan2019pipedream]; Narayanan et al. (SC 2021), arXiv:2104.04473 [narayanan2021efficient];
    Ajanthan et al. (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov].
    """
    check_schedule(schedule, num_stages, num_microbatches, num_rounds)
    P, M, R = num_stages, num_microbatches, num_rounds
    rows = []
    if schedule == "circular":
        slots = M * R + P - 1
        table = np.full((2 * slots, P, 2), (IDLE, -1))
        for j in range(P):
            for item in range(M * R):
                m = item // (P * R) * P + item % P if R > 1 else item
                table[item + j, j] = FORWARD, m
                table[2 * slots - 1 - item - j, j] = BACKWARD, m
        return table
    for phase in phases_of(schedule, P, M):
        for k in range(phase.repetitions):
            for slot in phase.slots:
                row = []
                for forward, offset in zip(slot.forward, slot.offsets, strict=True):
                    m = slot.step * k + offset
                    row.append((FORWARD if forward else BACKWARD, m) if 0 <= m < M else (IDLE, -1))
                rows.append(row)
    return np.array(rows)


def bubble_fraction(
    schedule: SynchronousSchedule, num_stages: int, num_microbatches: int, num_rounds: int = 1
) -> float:
    """The share of the slots of all stages in which nothing is done: (P - 1) / (M R + P - 1).

    The asynchronous pipeline has that of "1f1b" with the micro-batches of the whole training, M to infinity.

    Args:
      schedule: as for `schedule_table`.
      num_stages: P.
      num_microbatches: M.
      num_rounds: R.

    Returns:
      The fraction, in [0, 1).

    Raises:
      ValueError: as `schedule_table`.

    Example:
      >>> bubble_fraction("gpipe", 4, 12), bubble_fraction("circular", 4, 12, num_rounds=3)
      (0.2, 0.07692307692307693)

    Source: Narayanan et al. (SC 2021), arXiv:2104.04473, Section 2.2 [narayanan2021efficient].
    """
    check_schedule(schedule, num_stages, num_microbatches, num_rounds)
    return (num_stages - 1) / (num_microbatches * num_rounds + num_stages - 1)


def check_schedule(schedule: SynchronousSchedule, num_stages: int, num_microbatches: int, num_rounds: int) -> None:
    """Raises ValueError for what does not exist."""
    checks.one_of(SynchronousSchedule, schedule=schedule)
    checks.at_least(1, num_stages=num_stages, num_microbatches=num_microbatches, num_rounds=num_rounds)
    if num_rounds > 1 and schedule != "circular":
        raise ValueError(f"only the circular schedule has several rounds, got num_rounds={num_rounds} for {schedule!r}")
    if num_rounds > 1 and num_microbatches % num_stages:
        raise ValueError(
            f"several rounds need micro-batches in groups of the stages, got {num_microbatches} for {num_stages} "
            f"stages; take a multiple of {num_stages}"
        )
