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

from jaxlib_methods.parallel.integrity.distances import (
    DISTANCES,
    check_axes,
    expand_reference,
    message_distances,
    message_summary,
    random_directions,
    tukey_fence,
)

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
      votes: how many of them must lie beyond their fence; 1 is any.
      directions: random projections of the sliced Wasserstein distance, L.
      window: steps whose accepted distances make the fences, W.
      fence_factor: c at the start, in tau = Q3 + c (Q3 - Q1).
      fence_range: bounds of c.
      adapt_every: steps between changes of c, K.
      target_rate: share of the window's messages that the fences would reject, above which c grows.
      growth: factor of c then.
      shrink: factor of c while they would reject none; in the warm-up only, since later the window has no tail.
      threshold: a fixed tau in place of the fences; infinity accepts every finite message, 0 none after the warm-up.
      violations: rejected messages within `horizon` after which a worker is banned, V.
      horizon: steps.

    Raises:
      ValueError: for a value out of its range.

    Example:
      >>> VerifierConfig(decay=0.8, warmup_steps=100).votes
      1

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """

    decay: float | int = 0.9
    warmup_steps: int = 1000
    reduce_axes: tuple[int, ...] = (0,)
    distances: tuple[str, ...] = DISTANCES
    votes: int = 1
    directions: int = 64
    window: int = 100
    fence_factor: float | int = 1.5
    fence_range: tuple[float | int, float | int] = (1.5, 10.0)
    adapt_every: int = 50
    target_rate: float | int = 0.01
    growth: float | int = 1.1
    shrink: float | int = 0.99
    threshold: float | int | None = None
    violations: int = 5
    horizon: int = 20

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        for name in ("directions", "window", "adapt_every", "violations", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        unknown = [name for name in self.distances if name not in DISTANCES]
        if unknown or not self.distances:
            raise ValueError(f"distances must be some of {DISTANCES}, got {self.distances}")
        if not 1 <= self.votes <= len(self.distances):
            raise ValueError(f"votes must lie between 1 and the {len(self.distances)} distances, got {self.votes}")
        low, high = self.fence_range
        if not 0 <= low <= self.fence_factor <= high:
            raise ValueError(f"fence_factor must lie in fence_range, got {self.fence_factor} and {self.fence_range}")
        if not 0 < self.shrink <= 1 <= self.growth:
            raise ValueError(f"shrink must lie in (0, 1] and growth above 1, got {self.shrink} and {self.growth}")
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}; None takes adaptive fences")
        if self.violations > self.horizon:
            raise ValueError(
                f"violations must fit into the horizon of {self.horizon} steps, got {self.violations}; nobody is banned"
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


def init_verifier(options: VerifierConfig, replicas: int, shape: Sequence[int], key: jax.Array) -> VerifierState:
    """The state of a verifier before its first message.

    Args:
      options: of the verifier.
      replicas: R.
      shape: of one worker's message, for example (B, N, D).
      key: typed key of the projections; the same for all verifiers of a run.

    Returns:
      The state.

    Raises:
      ValueError: for no replica, or `reduce_axes` that the message does not have.

    Example:
      >>> init_verifier(VerifierConfig(window=10), 4, (2, 8, 16), jax.random.key(0)).window.shape
      (10, 4, 4)

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    if replicas < 1:
        raise ValueError(f"replicas must be at least 1, got {replicas}")
    check_axes(tuple(shape), options.reduce_axes)
    points = math.prod(size for axis, size in enumerate(shape[:-1]) if axis not in options.reduce_axes)
    start = jnp.inf if options.threshold is None else options.threshold
    return VerifierState(
        count=jnp.zeros((), jnp.int32),
        reference=jnp.zeros((points, shape[-1]), jnp.float32),
        started=jnp.zeros((), bool),
        projections=random_directions(key, shape[-1], options.directions),
        window=jnp.full((options.window, replicas, len(DISTANCES)), jnp.nan, jnp.float32),
        fence_factor=jnp.asarray(options.fence_factor, jnp.float32),
        fences=jnp.full(len(DISTANCES), start, jnp.float32),
        flags=jnp.zeros((options.horizon, replicas), bool),
        violations=jnp.zeros(replicas, jnp.int32),
        bans=jnp.zeros(replicas, jnp.int32),
    )


def verify(
    state: VerifierState,
    messages: jax.Array,
    taint: jax.Array,
    options: VerifierConfig = VerifierConfig(),
) -> tuple[VerifierState, jax.Array, jax.Array]:
    """Tests the messages of one step, and learns from those that pass.

    A message that is not finite is never accepted, in the warm-up neither and whatever the fences; its sender is blamed
    after the warm-up. The receiver goes on with `jnp.where(accept, message, replacement)` and hands on
    `taint | ~accept`.

    Args:
      state: of `init_verifier`.
      messages: (R, B, N, D), of all replicas.
      taint: bool (R,): messages that follow from a rejected one. They are not tested and nothing is learned from them.
      options: the verifier's.

    Returns:
      (state, accept bool (R,), replacement (B, N, D): the reference before this step, repeated over the averaged axes).

    Example:
      >>> options = VerifierConfig(warmup_steps=20, window=20, fence_factor=5.0)
      >>> state = init_verifier(options, 4, (2, 3, 5), jax.random.key(0))
      >>> for step in range(30):
      ...     messages = 1.0 + 0.1 * jax.random.normal(jax.random.key(step), (4, 2, 3, 5))
      ...     state, accept, replacement = verify(state, messages.at[2].multiply(-1 if step == 29 else 1),
      ...                                         jnp.zeros(4, bool), options)
      >>> accept.tolist(), state.violations.tolist()
      ([True, True, False, True], [0, 0, 1, 0])

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    summaries = jax.vmap(lambda message: message_summary(message, options.reduce_axes))(messages)
    replacement = expand_reference(state.reference, messages.shape[1:], options.reduce_axes).astype(messages.dtype)
    state, accept = verify_summaries(state, summaries, taint, options)
    return state, accept, replacement


def verify_summaries(
    state: VerifierState,
    summaries: jax.Array,
    taint: jax.Array,
    options: VerifierConfig = VerifierConfig(),
) -> tuple[VerifierState, jax.Array]:
    """`verify` from the summaries of the messages: what verifiers of different replicas have to exchange.

    Inside of `jax.shard_map`, gather `message_summary` of each device over the data axis; with equal states all
    devices then decide the same.

    Args:
      state: of `init_verifier`.
      summaries: (R, N', D).
      taint: bool (R,).
      options: the verifier's.

    Returns:
      (state, accept bool (R,)).

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    judged = judge(state, summaries, taint, options)
    return learn(state, judged, taint, options), ~judged.rejected


class Judged(NamedTuple):
    """The decision on the messages of a step, and what is learned from it."""

    summaries: jax.Array  # float32 (R, N', D), finite
    distances: jax.Array  # float32 (R, 4)
    rejected: jax.Array  # bool (R,)


def judge(state: VerifierState, summaries: jax.Array, taint: jax.Array, options: VerifierConfig) -> Judged:
    """The decision alone: it is all that the next stage waits for."""
    finite = jnp.all(jnp.isfinite(summaries), axis=(1, 2))
    summaries = jnp.where(finite[:, None, None], summaries, 0.0)
    distances = message_distances(summaries, state.reference, state.projections, options.distances)
    armed = (state.count >= options.warmup_steps) & state.started
    return Judged(summaries, distances, ~finite | (armed & ~taint & _outvoted(distances, state.fences, options)))


def learn(state: VerifierState, judged: Judged, taint: jax.Array, options: VerifierConfig) -> VerifierState:
    """The state after the step: reference, window and fences from accepted messages, violations from the others."""
    t, (summaries, distances, rejected) = state.count, judged
    accepted = ~rejected & ~taint
    total = jnp.sum(jnp.where(accepted[:, None, None], summaries, 0.0), axis=0)
    mean = total / jnp.maximum(jnp.sum(accepted.astype(jnp.float32)), 1)
    beta = jnp.where(state.started, options.decay, 0.0).astype(jnp.float32)
    reference = jnp.where(jnp.any(accepted), beta * state.reference + (1 - beta) * mean, state.reference)

    kept = jnp.where((accepted & state.started)[:, None], distances, jnp.nan)
    window = state.window.at[t % options.window].set(kept)
    factor, fences = _fences(state, window, options)

    violation = rejected & ~taint & (t >= options.warmup_steps)
    flags = state.flags.at[t % options.horizon].set(violation)
    banned = jnp.sum(flags, axis=0) >= options.violations
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


def _outvoted(distances: jax.Array, fences: jax.Array, options: VerifierConfig) -> jax.Array:
    """Which messages lie beyond enough fences; a distance that is not a number does, NaN in place of a message no."""
    if options.threshold is not None:
        fences = jnp.full_like(fences, options.threshold)
    compared = jnp.array([name in options.distances for name in DISTANCES])
    beyond = ~(distances <= fences[(None,) * (distances.ndim - 1)]) & compared[(None,) * (distances.ndim - 1)]
    return jnp.sum(beyond, axis=-1) >= options.votes


def _fences(state: VerifierState, window: jax.Array, options: VerifierConfig) -> tuple[jax.Array, jax.Array]:
    """c and tau for the next step."""
    samples = window.reshape(-1, window.shape[-1])
    fences = tukey_fence(samples, state.fence_factor)
    fences = jnp.where(jnp.isnan(fences), state.fences, fences)
    count = lambda which: jnp.sum(which.astype(jnp.float32))
    there = ~jnp.all(jnp.isnan(samples), axis=1)
    share = count(there & _outvoted(samples, fences, options)) / jnp.maximum(count(there), 1)
    # Later, the window no longer holds what lies beyond the fence, and an empty tail is no reason to go lower.
    shrink = jnp.where(state.count < options.warmup_steps, options.shrink, 1.0)
    change = jnp.where(share > options.target_rate, options.growth, jnp.where(share > 0, 1.0, shrink))
    adapt = (state.count + 1) % options.adapt_every == 0
    factor = jnp.clip(state.fence_factor * change, *options.fence_range)
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
