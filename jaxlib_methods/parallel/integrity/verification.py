r"""SENTINEL: trusted verifiers between the stages of a pipeline compare every message with an average of honest ones.

A message is what worker r = 1..R of a stage sends across a boundary in a step: activations forward, their gradients
backward, (B, N, D). A verifier belongs to one boundary and one direction. It keeps the exponential moving average m of
the accepted messages' means over the batch, four distances to it, and for each distance a Tukey fence over the recent
accepted ones; a message beyond a fence is replaced by m, and a worker that sends several is banned. What follows of a
rejected message is tainted: it passes the next verifiers untested, so that no worker is blamed for what it was fed.

The state machine is a pure function of its state and of the messages of all replicas; `jax.vmap` makes it one over the
boundaries. Aggregation of the replicas' weight gradients is another axis: see the robust aggregation rules.
"""

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
    expand_reference,
    message_distances,
    message_summary,
    random_directions,
    tukey_fence,
)
from jaxlib_methods.typing import MessageDistance

__all__ = [
    "VerifierConfig",
    "VerifierState",
    "init_verifier",
    "reroute",
    "verify",
    "verify_summaries",
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


def verify(
    state: VerifierState,
    messages: jax.Array,
    taint: jax.Array,
    config: VerifierConfig = VerifierConfig(),
) -> tuple[VerifierState, jax.Array, jax.Array]:
    """Tests the messages of one step, and learns from those that pass.

    A message that is not finite is never accepted, in the warm-up neither and whatever the fences; its sender is blamed
    after the warm-up. The receiver goes on with `jnp.where(accept, message, replacement)` and hands on
    `taint | ~accept`.

    Args:
      state: of `init_verifier`.
      messages: (R, B, N, D), of all replicas.
      taint: bool (R,): messages that follow from a rejected one. They are not tested and nothing is learned from them.
      config: the verifier's.

    Returns:
      (state, accept bool (R,), replacement (B, N, D): the reference before this step, repeated over the averaged axes).

    Example:
      >>> config = VerifierConfig(warmup_steps=20, window=20, fence_factor=5.0)
      >>> state = init_verifier(config, 4, (2, 3, 5), key=jax.random.key(0))
      >>> for step in range(30):
      ...     messages = 1.0 + 0.1 * jax.random.normal(jax.random.key(step), (4, 2, 3, 5))
      ...     state, accept, replacement = verify(state, messages.at[2].multiply(-1 if step == 29 else 1),
      ...                                         jnp.zeros(4, bool), config)
      >>> accept.tolist(), state.violations.tolist()
      ([True, True, False, True], [0, 0, 1, 0])

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    summaries = jax.vmap(lambda message: message_summary(message, config.reduce_axes))(messages)
    replacement = expand_reference(state.reference, messages.shape[1:], config.reduce_axes).astype(messages.dtype)
    state, accept = verify_summaries(state, summaries, taint, config)
    return state, accept, replacement


def verify_summaries(
    state: VerifierState,
    summaries: jax.Array,
    taint: jax.Array,
    config: VerifierConfig = VerifierConfig(),
) -> tuple[VerifierState, jax.Array]:
    """`verify` from the summaries of the messages: what verifiers of different replicas have to exchange.

    Inside of `jax.shard_map`, gather `message_summary` of each device over the data axis; with equal states all
    devices then decide the same.

    Args:
      state: of `init_verifier`.
      summaries: (R, N', D).
      taint: bool (R,).
      config: the verifier's.

    Returns:
      (state, accept bool (R,)).

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    judged = judge(state, summaries, taint, config)
    return learn(state, judged, taint, config), ~judged.rejected


class Judged(NamedTuple):
    """The decision on the messages of a step, and what is learned from it."""

    summaries: jax.Array  # float32 (R, N', D), finite
    distances: jax.Array  # float32 (R, 4)
    rejected: jax.Array  # bool (R,)


def judge(state: VerifierState, summaries: jax.Array, taint: jax.Array, config: VerifierConfig) -> Judged:
    """The decision alone: it is all that the next stage waits for."""
    finite = jnp.all(jnp.isfinite(summaries), axis=(1, 2))
    summaries = jnp.where(finite[:, None, None], summaries, 0.0)
    distances = message_distances(summaries, state.reference, state.projections, config.distances)
    armed = (state.count >= config.warmup_steps) & state.started
    return Judged(summaries, distances, ~finite | (armed & ~taint & _outvoted(distances, state.fences, config)))


def learn(state: VerifierState, judged: Judged, taint: jax.Array, config: VerifierConfig) -> VerifierState:
    """The state after the step: reference, window and fences from accepted messages, violations from the others."""
    t, (summaries, distances, rejected) = state.count, judged
    accepted = ~rejected & ~taint
    total = jnp.sum(jnp.where(accepted[:, None, None], summaries, 0.0), axis=0)
    mean = total / jnp.maximum(jnp.sum(accepted.astype(jnp.float32)), 1)
    beta = jnp.where(state.started, config.decay, 0.0).astype(jnp.float32)
    reference = jnp.where(jnp.any(accepted), beta * state.reference + (1 - beta) * mean, state.reference)

    kept = jnp.where((accepted & state.started)[:, None], distances, jnp.nan)
    window = state.window.at[t % config.window].set(kept)
    factor, fences = _fences(state, window, config)

    violation = rejected & ~taint & (t >= config.warmup_steps)
    flags = state.flags.at[t % config.horizon].set(violation)
    banned = jnp.sum(flags, axis=0) >= config.num_violations
    return state._replace(
        count=t + 1,
        reference=reference,
        started=state.started | jnp.any(accepted),
        window=window,
        fence_factor=factor,
        fences=fences,
        flags=flags & ~banned[None],
        violations=jnp.where(banned, 0, state.violations + violation.astype(jnp.int32)),
        bans=state.bans + banned.astype(jnp.int32),
    )


def _outvoted(distances: jax.Array, fences: jax.Array, config: VerifierConfig) -> jax.Array:
    """Which messages lie beyond enough fences; a distance that is not a number does, NaN in place of a message no."""
    if config.threshold is not None:
        fences = jnp.full_like(fences, config.threshold)
    compared = jnp.array([name in config.distances for name in DISTANCES])
    beyond = ~(distances <= fences[(None,) * (distances.ndim - 1)]) & compared[(None,) * (distances.ndim - 1)]
    return jnp.sum(beyond, axis=-1) >= config.num_votes


def _fences(state: VerifierState, window: jax.Array, config: VerifierConfig) -> tuple[jax.Array, jax.Array]:
    """c and tau for the next step."""
    samples = window.reshape(-1, window.shape[-1])
    fences = tukey_fence(samples, state.fence_factor)
    fences = jnp.where(jnp.isnan(fences), state.fences, fences)
    count = lambda which: jnp.sum(which.astype(jnp.float32))
    there = ~jnp.all(jnp.isnan(samples), axis=1)
    share = count(there & _outvoted(samples, fences, config)) / jnp.maximum(count(there), 1)
    # Later, the window no longer holds what lies beyond the fence, and an empty tail is no reason to go lower.
    shrink = jnp.where(state.count < config.warmup_steps, config.shrink, 1.0)
    change = jnp.where(share > config.target_rate, config.growth, jnp.where(share > 0, 1.0, shrink))
    adapt = (state.count + 1) % config.adapt_every == 0
    factor = jnp.clip(state.fence_factor * change, *config.fence_range)
    return jnp.where(adapt, factor, state.fence_factor), fences


def reroute(banned: jax.Array) -> jax.Array:
    """Who does the work of each slot of a stage: its own worker, or for a banned one the next of the others in turn.

    Args:
      banned: bool (R,).

    Returns:
      int32 (R,): the replica that computes for slot r. With all banned there is nobody, and slots keep their number.

    Example:
      >>> reroute(jnp.array([False, True, False, True, True])).tolist()
      [0, 0, 2, 2, 0]

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    slots = jnp.arange(banned.shape[0], dtype=jnp.int32)
    active = jnp.argsort(banned, stable=True).astype(jnp.int32)
    nth = jnp.cumsum(banned) - 1
    left = jnp.sum(~banned)
    others = active[jnp.where(banned, nth % jnp.maximum(left, 1), 0)]
    return jnp.where(banned & (left > 0), others, slots)
