r"""How long a pipeline's step takes over slow links: queues of messages between stages that compute in a fixed order.

Stage j = 0..P-1 computes $f_j$ seconds forward and $b_j$ backward for a microbatch. A boundary carries $s$ bytes in
each direction for a microbatch; a link sends one message at a time, $t = 8 s / \mathrm{bandwidth}$ seconds, and each
arrives $\ell$ seconds after its last bit has left. Stages send without waiting and receive into unlimited buffers.

BibTeX:

@inproceedings{huang2019gpipe,
  title = {{GPipe}: Efficient Training of Giant Neural Networks using Pipeline Parallelism},
  author = {Huang, Yanping and Cheng, Youlong and Bapna, Ankur and Firat, Orhan and Chen, Mia Xu and Chen, Dehao and
    Lee, HyoukJoong and Ngiam, Jiquan and Le, Quoc V. and Wu, Yonghui and Chen, Zhifeng},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019},
}

@inproceedings{narayanan2021efficient,
  title = {Efficient Large-Scale Language Model Training on {GPU} Clusters Using {Megatron-LM}},
  author = {Narayanan, Deepak and Shoeybi, Mohammad and Casper, Jared and LeGresley, Patrick and Patwary, Mostofa and
    Korthikanti, Vijay and Vainbrand, Dmitri and Kashinkunti, Prethvi and Bernauer, Julie and Catanzaro, Bryan and
    Phanishayee, Amar and Zaharia, Matei},
  booktitle = {International Conference for High Performance Computing, Networking, Storage and Analysis},
  year = {2021},
}

@inproceedings{ramasinghe2025protocol,
  title = {Protocol Models: Scaling Decentralized Training with Communication-Efficient Model Parallelism},
  author = {Ramasinghe, Sameera and Ajanthan, Thalaiyasingam and Avraham, Gil and Zuo, Yan and Long, Alexander},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2025},
  eprint = {2506.01260},
  archivePrefix = {arXiv},
}
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

PyTree = Any
Seconds = float | int | Sequence[float | int]
SCHEDULES = ("gpipe", "1f1b", "circular", "async")


class Link(NamedTuple):
    """A full-duplex connection between neighbours.

    Args:
      bandwidth: bits per second, in each direction.
      latency: seconds one way.

    Source: this library.
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
      forward: seconds of the forward pass, f.
      backward: seconds of the backward pass, b, with the recomputation where there is one.
      forward_bytes: what a boundary carries towards the last stage; `link_bytes` reads it from the compiled program.
      backward_bytes: what it carries back.
      update: seconds of the optimizer's step.
      gradient_bytes: of the largest stage, what its replicas on the data axis sum up before an update.

    Source: this library.
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

    Source: this library.
    """

    step: float
    compute: float
    link: float
    utilisation: float


def all_reduce_time(size: float | int, devices: int, link: Link) -> float:
    r"""Seconds of a ring all-reduce, $2 (n - 1) (8 s / (n \cdot \mathrm{bandwidth}) + \ell)$.

    Args:
      size: bytes s that each device contributes.
      devices: n.
      link: between neighbours of the ring.

    Returns:
      The seconds; 0 for one device.

    Example:
      >>> round(all_reduce_time(100e6, 2, Link(1e9, 0.01)), 3)
      0.82

    Source: this library.
    """
    return 2.0 * (devices - 1) * (link.seconds(size) / devices + link.latency)


def blocking_floor(
    tokens: int, forward_bytes: float | int, backward_bytes: float | int, microbatches: int, link: Link
) -> float:
    r"""Least seconds of a step whose boundary sends one message at a time and waits until it has arrived.

    tokens (forward + backward bytes) 8 / bandwidth + 2 microbatches latency: the simulated links of the published
    records, where a transfer in either direction blocks the boundary.

    Args:
      tokens: of the whole step.
      forward_bytes: of one token over a boundary, towards the last stage.
      backward_bytes: of one token back.
      microbatches: messages of the step in each direction.
      link: of the boundary.

    Returns:
      The seconds, whatever the stages compute.

    Example:
      >>> round(blocking_floor(524_288, 2048, 2048, 64, LINKS["200 Mbit/s + 50 ms"]), 1)
      92.3

    Source: Ramasinghe, Ajanthan, Avraham, Zuo, Long (NeurIPS 2025), arXiv:2506.01260, official records
    [ramasinghe2025protocol].
    """
    return link.seconds(tokens * (forward_bytes + backward_bytes)) + 2 * microbatches * link.latency


def predict_step(
    costs: StageCosts,
    link: Link,
    *,
    stages: int,
    schedule: str = "gpipe",
    microbatches: int = 1,
    repeats: int = 1,
    replicas: int = 1,
) -> StepTime:
    r"""Step time of a pipeline.

    Synchronous schedules are evaluated operation by operation: stage j runs its list of passes in order, each as soon
    as its input is there. Asynchronous 1F1B with $P - 1 - j$ passes of warm-up has no end to a step, and its period is
    the largest mean of a cycle of dependencies,

    $$\max\Big(t,\ \max_{j \le k}
      \frac{\sum_{i=j}^{k} (f_i + b_i) + (k - j) (t^f + t^b + 2 \ell)}{k - j + 1}\Big),$$

    because stage j has k - j + 1 more microbatches under way than stage k + 1: transfers are not hidden entirely, equal
    stages wait $(t^f + t^b + 2 \ell) (P - 1) / P$ for each microbatch.

    Args:
      costs: of one microbatch, and of the update.
      link: of every boundary; "circular" closes the ring with another one.
      stages: P.
      schedule: "gpipe" (all forward, then all backward in the reverse order), "1f1b", "circular" (GPipe in which every
        device holds `repeats` parts of its layers and the microbatches go round so many times) or "async" (an update
        for each microbatch).
      microbatches: of one update; 1 for "async".
      repeats: of "circular".
      replicas: pipelines side by side, whose gradients a ring all-reduce over the same kind of link sums up; nothing
        overlaps with it.

    Returns:
      The times.

    Raises:
      ValueError: for an unknown schedule, a size below 1, or costs of another number of stages.

    Example:
      >>> costs = StageCosts(forward=1.0, backward=2.0, forward_bytes=0, backward_bytes=0)
      >>> predict_step(costs, Link(1e9), stages=4, microbatches=12).utilisation  # 12 / (12 + 4 - 1)
      0.8
      >>> predict_step(costs, Link(1e9), stages=4, schedule="async").step
      3.0

    Source: GPipe: Huang et al. (NeurIPS 2019) [huang2019gpipe]; 1F1B and interleaving: Narayanan et al. (SC 2021)
    [narayanan2021efficient]; the period of the asynchronous pipeline: this library.
    """
    _check(schedule, stages, microbatches, repeats, replicas)
    forward, backward, update = (
        _per_stage(value, stages, name)
        for name, value in (("forward", costs.forward), ("backward", costs.backward), ("update", costs.update))
    )
    reduced = all_reduce_time(costs.gradient_bytes, replicas, link)
    update = [seconds + reduced for seconds in update]
    sent = [link.seconds(size) if stages > 1 else 0.0 for size in (costs.forward_bytes, costs.backward_bytes)]
    if schedule == "async":
        backward = [b + u for b, u in zip(backward, update, strict=True)]
        step = _period(forward, backward, sent, link.latency)
        busy = [f + b - reduced for f, b in zip(forward, backward, strict=True)]
        return _step_time(step, max(busy), max(sent))
    ends = _finish(_orders(schedule, stages, microbatches, repeats), forward, backward, sent, link.latency, repeats)
    busy = [microbatches * (f + b) + u - reduced for f, b, u in zip(forward, backward, update, strict=True)]
    step = max(end + u for end, u in zip(ends, update, strict=True))
    return _step_time(step, max(busy), max(sent) * microbatches * repeats)


def _step_time(step: float, compute: float, link: float) -> StepTime:
    return StepTime(step, compute, link, compute / step if step > 0 else 1.0)


def largest_pipeline(
    costs: StageCosts,
    link: Link,
    *,
    schedule: str = "async",
    microbatches: int = 1,
    utilisation: float | int = 0.9,
    most: int = 1024,
    **options: Any,
) -> int:
    """The most equal stages that keep utilisation at or above a bound; the model grows with them.

    Each stage is one device's share of layers, so that P stages train a model of P times its size.

    Args:
      costs: of one stage; seconds are one number.
      link: of every boundary.
      schedule: as for `predict_step`.
      microbatches: of one update.
      utilisation: the bound, in (0, 1].
      most: where the search ends.
      **options: further options of `predict_step`.

    Returns:
      P; 0 if even one stage is below the bound (its update and its replicas' all-reduce wait), and `most` if more
      stages might do.

    Raises:
      ValueError: as `predict_step`, and for a bound outside (0, 1].

    Example:
      >>> costs = StageCosts(forward=1.0, backward=2.0, forward_bytes=1e6, backward_bytes=1e6)
      >>> largest_pipeline(costs, Link(1e9), schedule="gpipe", microbatches=63)
      7
      >>> largest_pipeline(costs, Link(80e6)), largest_pipeline(costs, Link(40e6))
      (1024, 6)

    Source: this library.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must lie in (0, 1], got {utilisation}")
    enough = lambda stages: (
        predict_step(costs, link, stages=stages, schedule=schedule, microbatches=microbatches, **options).utilisation
        >= utilisation - 1e-12
    )
    if not enough(1):
        return 0
    low, high = 1, 2  # utilisation never grows with P
    while high <= most and enough(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
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
    blocks: int = 1,
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
      blocks: per stage.
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

    Source: this library.
    """
    if not flops_per_second > 0:
        raise ValueError(f"flops_per_second must be positive, got {flops_per_second}")

    def with_vjp(params: PyTree, x: jax.Array) -> Any:
        y, pull_back = jax.vjp(block, params, x)
        return y, pull_back(y)

    count = lambda function: jax.jit(function).lower(params, x).cost_analysis()["flops"]
    forward, both = count(block), count(with_vjp)
    backward = both if rematerialise else both - forward
    size = math.prod(x.shape) * x.dtype.itemsize
    gradient = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return StageCosts(
        blocks * forward / flops_per_second,
        blocks * backward / flops_per_second,
        size if forward_bytes is None else forward_bytes,
        size if backward_bytes is None else backward_bytes,
        gradient_bytes=blocks * gradient,
    )


# ------------------------------------------------------------------------------ the dependencies

Pass = tuple[bool, int, int]  # backward, repeat, microbatch


def _orders(schedule: str, P: int, M: int, repeats: int) -> list[list[Pass]]:
    """The passes of every stage in the order in which it runs them."""
    if schedule == "1f1b":
        orders = []
        for j in range(P):
            warm_up = min(P - 1 - j, M)
            order: list[Pass] = [(False, 0, m) for m in range(warm_up)]
            for m in range(M):
                order += [(False, 0, m + warm_up)] * (m + warm_up < M) + [(True, 0, m)]
            orders.append(order)
        return orders
    rounds = list(itertools.product(range(repeats if schedule == "circular" else 1), range(M)))
    return [[(False, *at) for at in rounds] + [(True, *at) for at in reversed(rounds)]] * P


def _source(stage: int, work: Pass, P: int, repeats: int) -> tuple[int, Pass] | None:
    """The stage and the pass that a pass gets its input from; None: from the data."""
    backward, r, m = work
    if backward:
        if stage == P - 1:
            return (stage, (False, r, m)) if r == repeats - 1 else (0, (True, r + 1, m))
        return stage + 1, work
    if stage == 0:
        return None if r == 0 else (P - 1, (False, r - 1, m))
    return stage - 1, work


def _finish(
    orders: list[list[Pass]],
    forward: list[float],
    backward: list[float],
    sent: list[float],
    latency: float,
    repeats: int,
) -> list[float]:
    """When each stage has finished its list: the recurrence end = max(stage free, input there) + seconds."""
    P = len(orders)
    repeats = max(r for _, r, _ in orders[0]) + 1
    ends = [0.0] * P
    link_free = [[0.0] * P, [0.0] * P]  # of each stage's outgoing link: forward, backward
    arrived: dict[tuple[int, Pass], float] = {}  # of a pass's output, where it is needed
    waiting = [iter(order) for order in orders]
    upcoming: list[Pass | None] = [next(w) for w in waiting]
    moved = True
    while moved:
        moved = False
        for j in range(P):
            while (work := upcoming[j]) is not None:
                source = _source(j, work, P, repeats)
                if source is not None and source not in arrived:
                    break
                ready = max(ends[j], arrived.get(source, 0.0))
                is_backward = work[0]
                ends[j] = ready + (backward if is_backward else forward)[j] / repeats
                local = P == 1 or (j == P - 1 and work[:2] == (False, repeats - 1))
                if local:
                    arrived[j, work] = ends[j]
                else:
                    leaves = max(ends[j], link_free[is_backward][j]) + sent[is_backward]
                    link_free[is_backward][j] = leaves
                    arrived[j, work] = leaves + latency
                upcoming[j] = next(waiting[j], None)
                moved = True
    return ends


def _period(forward: list[float], backward: list[float], sent: list[float], latency: float) -> float:
    """The largest mean over the cycles of asynchronous 1F1B: down from stage j to k, and back up."""
    around = sum(sent) + 2 * latency
    step = max(sent)
    for j in range(len(forward)):
        total = -around
        for k in range(j, len(forward)):
            total += forward[k] + backward[k] + around
            step = max(step, total / (k - j + 1))
    return step


def _check(schedule: str, stages: int, microbatches: int, repeats: int, replicas: int) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    for name, value in (
        ("stages", stages),
        ("microbatches", microbatches),
        ("repeats", repeats),
        ("replicas", replicas),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if repeats > 1 and schedule != "circular":
        raise ValueError(f"repeats are of the circular schedule, got {repeats} with {schedule!r}")
    if microbatches > 1 and schedule == "async":
        raise ValueError(f"the asynchronous schedule updates after every microbatch, got microbatches={microbatches}")


def _per_stage(value: Seconds, stages: int, name: str) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * stages
    if len(values) != stages:
        raise ValueError(f"{name} must be one number or one for each of the {stages} stages, got {len(values)}")
    return values
