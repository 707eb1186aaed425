"""What a verifier does and what it remembers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.parallel.integrity.distances import (
    DISTANCES,
    check_axes,
    random_directions,
)
from jaxlib_methods.typing import MessageDistance

__all__ = [
    "VerifierConfig",
    "VerifierState",
    "init_verifier",
]


@dataclasses.dataclass(frozen=True)
class VerifierConfig:
    """What a verifier does; the defaults are the best supported reading of the paper.

    A step is one call of `verify`, that is one message of every replica.

    Args:
      decay: beta of the reference's moving average: 0.9 for activations, 0.8 for their gradients.
      warmup_steps: steps in which all finite messages are accepted.
      reduce_axes: axes of a message (B, N, D) over which it is averaged: (0,) keeps the tokens, (0, 1) does not.
      distances: which of `DISTANCES` are computed and compared.
      num_votes: how many of them must lie beyond their fence; 1 is any.
      num_directions: random projections of the sliced Wasserstein distance, L.
      window: steps whose accepted distances make the fences, W.
      fence_factor: c at the start, in tau = Q3 + c (Q3 - Q1).
      fence_range: bounds of c.
      adapt_every: steps between changes of c, K.
      target_rate: share of the window's messages that the fences would reject, above which c grows.
      growth: factor of c then.
      shrink: factor of c while they would reject none; in the warm-up only, since later the window has no tail.
      threshold: a fixed tau in place of the fences; infinity accepts every finite message, 0 none after the warm-up.
      num_violations: rejected messages within `horizon` after which a worker is banned, V.
      horizon: steps.

    Raises:
      ValueError: for a value out of its range.

    Example:
      >>> VerifierConfig(decay=0.8, warmup_steps=100).num_votes
      1

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """

    decay: float | int = 0.9
    warmup_steps: int = 1000
    reduce_axes: tuple[int, ...] = (0,)
    distances: tuple[MessageDistance, ...] = DISTANCES
    num_votes: int = 1
    num_directions: int = 64
    window: int = 100
    fence_factor: float | int = 1.5
    fence_range: tuple[float | int, float | int] = (1.5, 10.0)
    adapt_every: int = 50
    target_rate: float | int = 0.01
    growth: float | int = 1.1
    shrink: float | int = 0.99
    threshold: float | int | None = None
    num_violations: int = 5
    horizon: int = 20

    def __post_init__(self):
        checks.within("[0, 1)", decay=self.decay)
        checks.not_negative(warmup_steps=self.warmup_steps, threshold=self.threshold)
        counts = ("num_directions", "window", "adapt_every", "num_violations", "horizon")
        checks.at_least(1, **{name: getattr(self, name) for name in counts})
        unknown = [name for name in self.distances if name not in DISTANCES]
        if unknown or not self.distances:
            raise ValueError(f"distances must be some of {DISTANCES}, got {self.distances}")
        checks.within(f"[1, {len(self.distances)}]", num_votes=self.num_votes)
        low, high = self.fence_range
        if not 0 <= low <= self.fence_factor <= high:
            raise ValueError(f"fence_factor must lie in fence_range, got {self.fence_factor} and {self.fence_range}")
        if not 0 < self.shrink <= 1 <= self.growth:
            raise ValueError(f"shrink must lie in (0, 1] and growth above 1, got {self.shrink} and {self.growth}")
        if self.num_violations > self.horizon:
            raise ValueError(
                f"num_violations must fit into the horizon of {self.horizon} steps, got {self.num_violations}; "
                "nobody is banned"
            )


class VerifierState(NamedTuple):
    """State of one verifier; N' is the number of tokens left by `reduce_axes`, 1 if none.

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """

    count: jax.Array  # int32 []: steps done
    reference: jax.Array  # float32 [N', D]: m
    started: jax.Array  # bool []: whether m has seen a message
    projections: jax.Array  # float32 [D, L]: unit columns w
    window: jax.Array  # float32 [W, R, 4]: distances of accepted messages; NaN elsewhere, and where not computed
    fence_factor: jax.Array  # float32 []: c
    fences: jax.Array  # float32 [4]: tau
    flags: jax.Array  # bool [horizon, R]: violations of recent steps
    violations: jax.Array  # int32 [R]: rejected messages so far of the worker in this slot
    bans: jax.Array  # int32 [R]: workers banned from this slot so far


def init_verifier(config: VerifierConfig, num_replicas: int, shape: Sequence[int], *, key: jax.Array) -> VerifierState:
    """The state of a verifier before its first message.

    Args:
      config: of the verifier.
      num_replicas: R.
      shape: of one worker's message, for example (B, N, D).
      key: typed key of the projections; the same for all verifiers of a run.

    Returns:
      The state.

    Raises:
      ValueError: for no replica, or `reduce_axes` that the message does not have.

    Example:
      >>> init_verifier(VerifierConfig(window=10), 4, (2, 8, 16), key=jax.random.key(0)).window.shape
      (10, 4, 4)

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    checks.at_least(1, num_replicas=num_replicas)
    check_axes(tuple(shape), config.reduce_axes)
    points = math.prod(size for axis, size in enumerate(shape[:-1]) if axis not in config.reduce_axes)
    start = jnp.inf if config.threshold is None else config.threshold
    return VerifierState(
        count=jnp.zeros((), jnp.int32),
        reference=jnp.zeros((points, shape[-1]), jnp.float32),
        started=jnp.zeros((), bool),
        projections=random_directions(shape[-1], config.num_directions, key=key),
        window=jnp.full((config.window, num_replicas, len(DISTANCES)), jnp.nan, jnp.float32),
        fence_factor=jnp.asarray(config.fence_factor, jnp.float32),
        fences=jnp.full(len(DISTANCES), start, jnp.float32),
        flags=jnp.zeros((config.horizon, num_replicas), bool),
        violations=jnp.zeros(num_replicas, jnp.int32),
        bans=jnp.zeros(num_replicas, jnp.int32),
    )
