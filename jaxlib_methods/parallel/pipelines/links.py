r"""How long a pipeline's step takes over slow links: queues of messages between stages that compute in a fixed order.

Stage j = 0..P-1 computes $f_j$ seconds forward and $b_j$ backward for a microbatch. A boundary carries $s$ bytes in
each direction for a microbatch; a link sends one message at a time, $t = 8 s / \mathrm{bandwidth}$ seconds, and each
arrives $\ell$ seconds after its last bit has left. Stages send without waiting and receive into unlimited buffers.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxlib_methods._core import checks
from jaxlib_methods.parallel.pipelines._link_queues import finish_blocking, finish_queued, period
from jaxlib_methods.parallel.pipelines.schedules import check_schedule, schedule_table
from jaxlib_methods.typing import PipelineSchedule, PyTree

__all__ = [
    "LINKS",
    "Link",
    "StageCosts",
    "StepTime",
    "all_reduce_time",
    "blocking_floor",
    "largest_pipeline",
    "predict_step",
    "stage_costs",
]

Seconds = float | int | Sequence[float | int]


class Link(NamedTuple):
    """A full-duplex connection between neighbours.

    Args:
      bandwidth: bits per second, in each direction.
      latency: seconds one way.
    """

    bandwidth: float | int
    latency: float | int = 0.0

    def seconds(self, size: float | int) -> float:
        """Seconds that `size` bytes occupy the link, without the latency."""
        return 8.0 * size / self.bandwidth


LINKS = {
    "80 Mbit/s": Link(80e6),
    "200 Mbit/s + 50 ms": Link(200e6, 0.05),
    "1 Gbit/s": Link(1e9),
    "100 Gbit/s": Link(100e9),
}


class StageCosts(NamedTuple):
    """What a stage costs for one microbatch; seconds are one number for all stages, or one for each.

    Args:
      forward: seconds of the forward pass, f; 0 for the last stage of this library's pipelines, which computes it as a
        part of its backward pass.
      backward: seconds of the backward pass, b, with the recomputation where there is one.
      forward_bytes: what a boundary carries towards the last stage; `link_bytes` reads it from the compiled program.
      backward_bytes: what it carries back.
      update: seconds of the optimizer's step.
      gradient_bytes: of the largest stage, what its replicas on the data axis sum up before an update.
    """

    forward: Seconds
    backward: Seconds
    forward_bytes: float | int
    backward_bytes: float | int
    update: Seconds = 0.0
    gradient_bytes: float | int = 0


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


def all_reduce_time(size: float | int, num_devices: int, link: Link) -> float:
    r"""Seconds of a ring all-reduce, $2 (n - 1) (8 s / (n \cdot \mathrm{bandwidth}) + \ell)$.

    Args:
      size: bytes s that each device contributes.
      num_devices: n.
      link: between neighbours of the ring.

    Returns:
      The seconds; 0 for one device.

    Example:
      >>> round(all_reduce_time(100e6, 2, Link(1e9, 0.01)), 3)
      0.82
    """
    return 2.0 * (num_devices - 1) * (link.seconds(size) / num_devices + link.latency)


def blocking_floor(
    link: Link, *, num_tokens: int, forward_bytes: float | int, backward_bytes: float | int, num_microbatches: int
) -> float:
    r"""Least seconds of a step whose boundary sends one message at a time and waits until it has arrived.

    tokens (forward + backward bytes) 8 / bandwidth + 2 microbatches latency: the simulated links of the published
    records, where a transfer in either direction blocks the boundary.

    Args:
      link: of the boundary.
      num_tokens: of the whole step.
      forward_bytes: of one token over a boundary, towards the last stage.
      backward_bytes: of one token back.
      num_microbatches: messages of the step in each direction.

    Returns:
      The seconds, whatever the stages compute.

    Example:
      >>> step = {"num_tokens": 524_288, "num_microbatches": 64}
      >>> round(blocking_floor(LINKS["200 Mbit/s + 50 ms"], **step, forward_bytes=2048, backward_bytes=2048), 1)
      92.3

    Source: Ramasinghe, Ajanthan, Avraham, Zuo, Long (NeurIPS 2025), arXiv:2506.01260, official records
    [ramasinghe2025protocol].
    """
    return link.seconds(num_tokens * (forward_bytes + backward_bytes)) + 2 * num_microbatches * link.latency


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


def stage_costs(
    block: Callable[[PyTree, jax.Array], jax.Array],
    params: PyTree,
    x: jax.Array | jax.ShapeDtypeStruct,
    *,
    flops_per_second: float | int,
    num_blocks: int = 1,
    rematerialise: bool = True,
    forward_bytes: float | int | None = None,
    backward_bytes: float | int | None = None,
) -> StageCosts:
    """Costs of a stage of equal blocks, from the operations that XLA counts in one of them.

    Nothing is allocated or run. XLA counts the body of a loop once: give a block without loops, such as one layer.

    Args:
      block: `(params, x) -> y` with y like x.
      params: of one block; arrays or `jax.ShapeDtypeStruct`s.
      x: a microbatch at a boundary.
      flops_per_second: that a device sustains on such blocks.
      num_blocks: per stage.
      rematerialise: whether the backward pass runs the forward pass again.
      forward_bytes: per microbatch over a boundary, as `link_bytes` reads it; None: those of x.
      backward_bytes: likewise, towards the first stage.

    Returns:
      The costs; an update is taken to cost nothing.

    Raises:
      ValueError: if flops_per_second is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> w, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((8, 64), jnp.float32)
      >>> costs = stage_costs(lambda w, x: x @ w, w, x, flops_per_second=1e9)
      >>> costs.forward * 1e9 == 2 * 8 * 64 * 64, costs.backward / costs.forward, costs.gradient_bytes
      (True, 3.0, 16384)
    """
    checks.positive(flops_per_second=flops_per_second)

    def with_vjp(params: PyTree, x: jax.Array) -> Any:
        y, pull_back = jax.vjp(block, params, x)
        return y, pull_back(y)

    count = lambda function: jax.jit(function).lower(params, x).cost_analysis()["flops"]
    forward, both = count(block), count(with_vjp)
    backward = both if rematerialise else both - forward
    size = math.prod(x.shape) * x.dtype.itemsize
    gradient = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return StageCosts(
        num_blocks * forward / flops_per_second,
        num_blocks * backward / flops_per_second,
        size if forward_bytes is None else forward_bytes,
        size if backward_bytes is None else backward_bytes,
        gradient_bytes=num_blocks * gradient,
    )


def _per_stage(value: Seconds, num_stages: int, name: str) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * num_stages
    if len(values) != num_stages:
        raise ValueError(f"{name} must be one number or one for each of the {num_stages} stages, got {len(values)}")
    return values
