r"""How long a pipeline's step takes over slow links: queues of messages between stages that compute in a fixed order.

Stage j = 0..P-1 computes $f_j$ seconds forward and $b_j$ backward for a microbatch. A boundary carries $s$ bytes in
each direction for a microbatch; a link sends one message at a time, $t = 8 s / \mathrm{bandwidth}$ seconds, and each
arrives $\ell$ seconds after its last bit has left. Stages send without waiting and receive into unlimited buffers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxlib_methods._core import checks
from jaxlib_methods.typing import PyTree

__all__ = [
    "LINKS",
    "Link",
    "StageCosts",
    "all_reduce_time",
    "blocking_floor",
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
