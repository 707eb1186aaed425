"""How long a step of a pipeline takes over slow links, and how many stages a link allows."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from jaxlib_methods._core import checks
from jaxlib_methods.parallel.pipelines._link_queues import finish_blocking, finish_queued, period
from jaxlib_methods.parallel.pipelines.links import Link, Seconds, StageCosts, all_reduce_time
from jaxlib_methods.parallel.pipelines.schedules import check_schedule, schedule_table
from jaxlib_methods.typing import PipelineSchedule

__all__ = [
    "StepTime",
    "largest_pipeline",
    "predict_step",
]


class StepTime(NamedTuple):
    """The time of one update.

    Args:
      step: seconds from one update to the next.
      compute: seconds of it in which the busiest stage computes.
      link: seconds of it in which the busiest direction of a boundary transmits.
      utilisation: compute / step.
    """

    step: float
    compute: float
    link: float
    utilisation: float


def predict_step(
    costs: StageCosts,
    link: Link,
    *,
    num_stages: int,
    schedule: PipelineSchedule = "gpipe",
    num_microbatches: int = 1,
    num_rounds: int = 1,
    num_replicas: int = 1,
    blocking: bool = False,
) -> StepTime:
    r"""Step time of a pipeline: each stage runs its list of passes in order, each as soon as its input is there.

    Asynchronous 1F1B, with $P - 1 - j$ passes of warm-up, has no end to a step. Its period is the largest mean of a
    cycle of dependencies,

    $$\max\Big(t,\ \max_{j \le k}
      \frac{\sum_{i=j}^{k} (f_i + b_i) + (k - j) (t^f + t^b + 2 \ell)}{k - j + 1}\Big),$$

    because stage j has k - j + 1 more microbatches under way than stage k + 1: transfers are not hidden entirely, equal
    stages wait $(t^f + t^b + 2 \ell) (P - 1) / P$ for each microbatch.

    `blocking=True` is the program of `synchronous_pipeline` and `asynchronous_pipeline` over gloo, slot by slot:
    the transfers of a slot follow its pass, first those forward and then those backward, also where a pass was idle,
    and nothing is computed meanwhile. A transfer is a rendezvous: it starts when the sender has reached it and knows
    that the receiver has ($\ell$ later), keeps the sender for t and the receiver for $t + \ell$.

    Args:
      costs: of one microbatch, and of the update.
      link: of every boundary; "circular" closes the ring with another one.
      num_stages: P.
      schedule: "gpipe" (all forward, then all backward in the reverse order), "1f1b", "circular" (GPipe in which every
        device holds `num_rounds` parts of its layers and the microbatches go round so many times) or "async" (1F1B with
        an update for each microbatch).
      num_microbatches: M, of one update; 1 for "async".
      num_rounds: R, of "circular".
      num_replicas: pipelines side by side, whose gradients a ring all-reduce over the same kind of link sums up;
        nothing overlaps with it.
      blocking: whether transfers wait for each other and computation waits for them.

    Returns:
      The times.

    Raises:
      ValueError: for an unknown schedule, numbers that do not fit it, or costs of another number of stages.

    Example:
      >>> costs = StageCosts(forward=1.0, backward=2.0, forward_bytes=0, backward_bytes=0)
      >>> predict_step(costs, Link(1e9), num_stages=4, num_microbatches=12).utilisation  # 12 / (12 + 4 - 1)
      0.8
      >>> predict_step(costs, Link(1e9), num_stages=4, schedule="async").step
      3.0

    Source: GPipe: Huang et al. (NeurIPS 2019), arXiv:1811.06965 [huang2019gpipe]; 1F1B and rounds: Narayanan et al.
    (SC 2021), arXiv:2104.04473 [narayanan2021efficient]; the period of the asynchronous pipeline: this library.
    """
    asynchronous = schedule == "async"
    if asynchronous and num_microbatches != 1:
        raise ValueError(
            f"the asynchronous schedule updates after every microbatch, got num_microbatches={num_microbatches}"
        )
    checks.at_least(1, num_replicas=num_replicas)
    checks.one_of(PipelineSchedule, schedule=schedule)
    slots = "1f1b" if asynchronous else schedule
    check_schedule(slots, num_stages, num_microbatches, num_rounds)
    forward, backward, update = (
        _per_stage(value, num_stages, name)
        for name, value in (("forward", costs.forward), ("backward", costs.backward), ("update", costs.update))
    )
    P, M = num_stages, num_microbatches
    reduced = all_reduce_time(costs.gradient_bytes, num_replicas, link)
    compute = max(M * (f + b) + u for f, b, u in zip(forward, backward, update, strict=True))
    sent = (link.seconds(costs.forward_bytes), link.seconds(costs.backward_bytes)) if P > 1 else (0.0, 0.0)
    after = [u + reduced for u in update]
    finish = functools.partial(finish_blocking, alternating=slots == "1f1b") if blocking else finish_queued
    if asynchronous:
        backward = [b + u for b, u in zip(backward, after, strict=True)]
        if blocking:
            ends = [
                finish(schedule_table(slots, P, m), forward, backward, sent, link.latency, 1)[0]
                for m in (_SETTLED, 2 * _SETTLED)
            ]
            step = (ends[1] - ends[0]) / _SETTLED
        else:
            step = period(forward, backward, sent, link.latency)
    else:
        ends = finish(schedule_table(slots, P, M, num_rounds), forward, backward, sent, link.latency, num_rounds)
        step = max(end + u for end, u in zip(ends, after, strict=True))
    return StepTime(step, compute, max(sent) * M * num_rounds, compute / step if step > 0 else 1.0)


_SETTLED = 120  # updates after which a period has settled, a multiple of the lengths of short cycles


def largest_pipeline(
    costs: StageCosts,
    link: Link,
    *,
    schedule: PipelineSchedule = "async",
    num_microbatches: int = 1,
    utilisation: float | int = 0.9,
    num_rounds: int = 1,
    num_replicas: int = 1,
    blocking: bool = False,
    max_stages: int = 1024,
) -> int:
    """The most equal stages that keep utilisation at or above a bound; the model grows with them.

    Each stage is one device's share of layers, so that P stages train a model of P times its size.

    Args:
      costs: of one stage; seconds are one number.
      link: of every boundary.
      schedule: as for `predict_step`.
      num_microbatches: M, of one update.
      utilisation: the bound, in (0, 1].
      num_rounds: as for `predict_step`.
      num_replicas: as for `predict_step`.
      blocking: as for `predict_step`.
      max_stages: where the search ends.

    Returns:
      P; 0 if even one stage is below the bound (the replicas' all-reduce waits), `max_stages` if more might do.

    Raises:
      ValueError: as `predict_step`, and for a bound outside (0, 1].

    Example:
      >>> costs = StageCosts(forward=1.0, backward=2.0, forward_bytes=1e6, backward_bytes=1e6)
      >>> largest_pipeline(costs, Link(1e9), schedule="gpipe", num_microbatches=63)
      7
      >>> largest_pipeline(costs, Link(80e6)), largest_pipeline(costs, Link(40e6))
      (1024, 6)
    """
    checks.within("(0, 1]", utilisation=utilisation)

    def enough(num_stages: int) -> bool:
        found = predict_step(
            costs,
            link,
            num_stages=num_stages,
            schedule=schedule,
            num_microbatches=num_microbatches,
            num_rounds=num_rounds,
            num_replicas=num_replicas,
            blocking=blocking,
        )
        return found.utilisation >= utilisation - 1e-12

    if not enough(1):
        return 0
    low, high = 1, 2  # utilisation never grows with P
    while high <= max_stages and enough(high):
        low, high = high, 2 * high
    high = min(high, max_stages + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def _per_stage(value: Seconds, num_stages: int, name: str) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * num_stages
    if len(values) != num_stages:
        raise ValueError(f"{name} must be one number or one for each of the {num_stages} stages, got {len(values)}")
    return values
