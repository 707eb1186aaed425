r"""Sparse asynchronous averaging: replicas average a small rotating subset of parameters, with a delay of tau rounds.

Symbols: x_j parameters of replica j, t round, S_t subset with a fraction p of the entries, tau delay in rounds, c
strength of the correction, lambda_t weight of the newest drift. After the local step, every round:

  snapshot   a_t = mean_j x_j[S_t],  o_{j,t} = x_j[S_t]                            the only communication
  then, for the round s = t - tau that has arrived (S = S_s, a = a_s, o_j = o_{j,s}):
  avg             x_j[S] <- a                                                    AsyncSPARTA; SPARTA at tau = 0
  weight_update   x_j[S] <- a + c (x_j[S] - o_j)
  ema             e_j[S] <- (1 - lambda_t) e_j[S] + lambda_t (x_j[S] - o_j),  x_j[S] <- a + c e_j[S]

The drift x_j - o_j is what a replica has moved since its snapshot; its average e_j stands for the drift of the mean.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core import checks
from jaxlib_methods.parallel.pipelines.hooks import DataHook
from jaxlib_methods.parallel.replicas import _subsets
from jaxlib_methods.parallel.replicas._entries import gather, scatter
from jaxlib_methods.typing import AveragingMethod, ParameterSubsets, PyTree

__all__ = [
    "SparseAveragingState",
    "averaged_per_round",
    "ema_weight_schedule",
    "replica_mean",
    "sparse_averaging",
]


class SparseAveragingState(NamedTuple):
    """State of `sparse_averaging`; K entries are averaged in a round."""

    steps: jax.Array  # int32 (): local steps seen
    restarted: jax.Array  # int32 (): first round since the parameters were transformed; before it, nothing arrives
    means: jax.Array  # float32 (max(tau, 1), K): round s in row s mod tau
    snapshots: jax.Array  # float32 (max(tau, 1), K): likewise, the replica's own
    drift: PyTree  # float32, like the parameters: the average e_j; () for the other methods


def ema_weight_schedule(
    total_rounds: int, *, warmup_rounds: int = 1000, start: float = 0.5, end: float = 0.01
) -> optax.Schedule:
    """lambda_t: constant, then a cosine down to `end` in the last round.

    Args:
      total_rounds: T.
      warmup_rounds: rounds at `start`.
      start: first weight.
      end: last weight.

    Returns:
      A function of the round.

    Raises:
      ValueError: unless 0 <= warmup_rounds < total_rounds - 1 and 0 < end <= start <= 1.

    Example:
      >>> weight = ema_weight_schedule(30_000)
      >>> [round(float(weight(t)), 5) for t in (0, 1000, 15_500, 29_999)]
      [0.5, 0.5, 0.25499, 0.01]

    Source: Ajanthan et al. (2026), arXiv:2601.22442, official code [ajanthan2026asyncmesh].
    """
    if not 0 <= warmup_rounds < total_rounds - 1:
        raise ValueError(f"warmup_rounds must lie in [0, total_rounds - 1), got {warmup_rounds} of {total_rounds}")
    if not 0 < end <= start <= 1:
        raise ValueError(f"weights must satisfy 0 < end <= start <= 1, got start={start}, end={end}")
    decay = optax.cosine_decay_schedule(start, total_rounds - warmup_rounds - 1, alpha=end / start)
    joined = optax.join_schedules([optax.constant_schedule(start), decay], [warmup_rounds])
    return lambda t: joined(jnp.asarray(t).astype(jnp.float32))  # optax mixes the types of an integer count


def sparse_averaging(
    fraction: float | int = 0.05,
    *,
    key: jax.Array,
    delay: int = 10,
    method: AveragingMethod = "ema",
    ema_weight: optax.ScalarOrSchedule = 0.5,
    correction: float | int = 1.0,
    subsets: ParameterSubsets = "partition",
    redraw: bool = True,
    interval: int = 1,
    axis_name: str = "data",
) -> DataHook:
    r"""Averages a rotating subset of the parameters over the replicas, with the result arriving $\tau$ rounds late.

    The state takes 2 max(tau, 1) K numbers, and one copy of the parameters for "ema": at p = 0.05 and tau = 10 it is
    twice the parameters. A round is one all-reduce of K numbers (`averaged_per_round`). In one program the reduction
    is computed at once and its result kept back: the delay is exact, and no latency is hidden by it. With one replica
    nothing changes.

    Args:
      fraction: p in (0, 1]. Static.
      key: typed key of the subsets, the same on all replicas.
      delay: tau, the rounds between a snapshot and its use. Static.
      method: "avg", "weight_update" or "ema".
      ema_weight: lambda, in (0, 1], a number or a function of the round. The first correction takes the drift itself.
      correction: c.
      subsets: "partition", "strided" or "bernoulli".
      redraw: draw another partition when the last one is used up. With the same one in every cycle no entry is
        averaged again before tau rounds, as long as tau is less than 1 / p.
      interval: local steps per round. Static.
      axis_name: of the replicas.

    Returns:
      The hook, with `SparseAveragingState`. A pipeline takes it as `data_hook`; elsewhere call its `apply` after the
      optimizer step where `axis_name` is bound, inside `jax.shard_map` or `jax.vmap(..., axis_name=...)`.

    Raises:
      ValueError: for a fraction outside (0, 1], a delay < 0, an interval < 1, or an unknown method or kind of subsets.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> averaging = sparse_averaging(1.0, key=jax.random.key(0), delay=0, method="avg")
      >>> replicas = {"w": jnp.array([[1.0, 2.0], [3.0, 6.0]])}  # two of them
      >>> state = jax.vmap(averaging.init)(replicas)
      >>> replicas, state = jax.vmap(averaging.apply, axis_name="data")(replicas, state)
      >>> replicas["w"].tolist()
      [[2.0, 4.0], [2.0, 4.0]]

    Source: Ajanthan et al. (2026), arXiv:2601.22442 [ajanthan2026asyncmesh].
    """
    checks.within("(0, 1]", fraction=fraction)
    checks.at_least(0, delay=delay)
    checks.at_least(1, interval=interval)
    checks.one_of(AveragingMethod, method=method)
    checks.one_of(ParameterSubsets, subsets=subsets)
    checks.within("(0, 1]", ema_weight=ema_weight)
    ema_weight = ema_weight if callable(ema_weight) else optax.constant_schedule(ema_weight)

    def subset(params: PyTree, t: jax.Array) -> list[jax.Array]:
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        return _subsets.subsets(subsets, key, t, fraction, sizes, redraw)

    def init(params: PyTree) -> SparseAveragingState:
        ring = jnp.zeros((max(delay, 1), averaged_per_round(params, fraction, subsets=subsets)), jnp.float32)
        drift = optax.tree.zeros_like(params, dtype=jnp.float32) if method == "ema" else ()
        zero = jnp.zeros((), jnp.int32)
        return SparseAveragingState(zero, zero, ring, ring, drift)

    def one_round(params: PyTree, state: SparseAveragingState) -> tuple[PyTree, SparseAveragingState]:
        t = state.steps // interval
        slot = t % max(delay, 1)
        both = jax.vmap(lambda t: subset(params, t))(jnp.stack([t, t - delay]))
        now, S = ([rows[i] for rows in both] for i in (0, 1))
        own = gather(params, now)
        mean = jax.lax.pmean(own, axis_name)
        arrived, kept = (mean, own) if delay == 0 else (state.means[slot], state.snapshots[slot])
        means, snapshots = (ring.at[slot].set(new) for ring, new in ((state.means, mean), (state.snapshots, own)))

        late = t - delay - state.restarted
        drift = state.drift
        moved = gather(params, S) - kept
        if method == "ema":
            weight = jnp.where(t == delay, 1.0, jnp.asarray(ema_weight(t), jnp.float32))
            before = gather(drift, S)
            moved = before + weight * (moved - before)
            drift = scatter(drift, S, moved, late >= 0)
        if method != "avg":
            arrived = arrived + jnp.float32(correction) * moved
        params = scatter(params, S, arrived, late >= 0)
        return params, state._replace(means=means, snapshots=snapshots, drift=drift)

    def apply(params: PyTree, state: SparseAveragingState, info: Any = None) -> tuple[PyTree, SparseAveragingState]:
        del info
        if jax.lax.axis_size(axis_name) > 1:
            params, state = at_interval(interval, one_round, state.steps, params, state)
        return params, state._replace(steps=optax.safe_increment(state.steps))

    def restart(state: SparseAveragingState) -> SparseAveragingState:
        return state._replace(restarted=-(-state.steps // interval))

    return DataHook(init, apply, restart)


def averaged_per_round(params: PyTree, fraction: float | int, *, subsets: ParameterSubsets = "partition") -> int:
    """K, the numbers that one round of `sparse_averaging` reduces over the replicas.

    A ring all-reduce moves 2 K (R - 1) / R float32 numbers per replica, R replicas.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s.
      fraction: p in (0, 1].
      subsets: "partition", "strided" or "bernoulli".

    Returns:
      The sum of ceil(N / n_p) over the arrays with N entries; for "bernoulli" of what holds all but 1e-8 of the draws.

    Raises:
      ValueError: for a fraction outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> averaged_per_round({"w": jnp.zeros((100, 30)), "b": jnp.zeros(30)}, 0.05)
      152

    Source: Ajanthan et al. (2026), arXiv:2601.22442 [ajanthan2026asyncmesh].
    """
    checks.within("(0, 1]", fraction=fraction)
    return sum(_subsets.capacity(subsets, fraction, math.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def replica_mean(params: PyTree, axis_name: str = "data") -> PyTree:
    """The average over all replicas: what a model is evaluated with.

    Args:
      params: of one replica, where `axis_name` is bound.
      axis_name: of the replicas.

    Returns:
      A tree like `params`; the replicas' own parameters stay what they are.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> jax.vmap(replica_mean, axis_name="data")(jnp.array([1.0, 3.0])).tolist()
      [2.0, 2.0]

    Source: Ajanthan et al. (2026), arXiv:2601.22442, official code [ajanthan2026asyncmesh].
    """
    return jax.tree.map(lambda x: jax.lax.pmean(x, axis_name), params)


def at_interval(interval: int, run: Callable[..., tuple], steps: jax.Array, *carry: Any) -> tuple:
    """`run(*carry)` where `interval` divides the steps, else the carry as it is."""
    if interval == 1:
        return run(*carry)
    return jax.lax.cond(steps % interval == 0, run, lambda *carry: carry, *carry)
