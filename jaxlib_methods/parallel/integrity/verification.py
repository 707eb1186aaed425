r"""SENTINEL: trusted verifiers between the stages of a pipeline compare every message with an average of honest ones.

A message is what worker r = 1..R of a stage sends across a boundary in a step: activations forward, their gradients
backward, (B, N, D). A verifier belongs to one boundary and one direction. It keeps the exponential moving average m of
the accepted messages' means over the batch, four distances to it, and for each distance a Tukey fence over the recent
accepted ones; a message beyond a fence is replaced by m, and a worker that sends several is banned. What follows of a
rejected message is tainted: it passes the next verifiers untested, so that no worker is blamed for what it was fed.

The state machine is a pure function of its state and of the messages of all replicas; `jax.vmap` makes it one over the
boundaries. Aggregation of the replicas' weight gradients is another axis: see the robust aggregation rules.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.parallel.integrity.distances import (
    DISTANCES,
    expand_reference,
    message_distances,
    message_summary,
    tukey_fence,
)
from jaxlib_methods.parallel.integrity.verifiers import VerifierConfig, VerifierState

__all__ = [
    "reroute",
    "verify",
    "verify_summaries",
]

DEFAULT = VerifierConfig()


def verify(
    state: VerifierState,
    messages: jax.Array,
    taint: jax.Array,
    config: VerifierConfig = DEFAULT,
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
      >>> from jaxlib_methods.parallel.integrity import init_verifier
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
    config: VerifierConfig = DEFAULT,
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
