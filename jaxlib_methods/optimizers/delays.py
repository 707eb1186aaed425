"""Delayed gradients, simulated exactly on one device around any optax chain, with ring buffers.

Symbols: stages i = 1..P, the last one is P; K microbatches per update; tau_i delay of stage i in updates; w_i^(v)
parameters of stage i after v updates, v = 0 at the start. Any grouping of the parameters may take the place of stages.

Two models of staleness:

* **Stale weights** (`keep_param_history`, `stale_params`): update m = 0, 1, 2, ... takes one full gradient of batch m
  at the composite {w_j^(max(m - tau_j, 0))}_j, in which every group stands at its own version, and applies its parts
  to the newest w_j^(m). This is asynchronous 1F1B with weight stashing, to the bit: the forward pass of microbatch m
  meets every stage at that version, and the backward pass uses the same stashed weights.
* **Late gradients** (`delay_gradients`): update m applies to group j its part of the gradient that was taken at step
  max(m - tau_j, 0), of that step's batch, at that step's newest weights of all groups. This is an optimizer that
  receives its gradients late, as from a parameter server. With one delay for all groups and one batch for all steps
  the two are the same sequence; with different delays they are not.
"""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.optimizers._delay_rules import (
    Delay,
    checked_delays,
    delay_of_each_leaf,
    label_leaves,
    map_with_history,
    read_slot,
    rings,
    write_slot,
)
from jaxlib_methods.typing import PyTree

__all__ = [
    "DelayGradientsState",
    "ParamHistoryState",
    "clip_by_group_norm",
    "delay_gradients",
    "delay_memory",
    "keep_param_history",
    "pipeline_delays",
    "stale_params",
]


class ParamHistoryState(NamedTuple):
    """State of `keep_param_history`."""

    count: jax.Array  # int32 []: updates done, m; the parameters are version m
    history: PyTree  # per parameter [tau, ...] of its dtype: version v in slot v mod tau; None where tau = 0


class DelayGradientsState(NamedTuple):
    """State of `delay_gradients`."""

    count: jax.Array  # int32 []: gradients received
    history: PyTree  # per parameter [tau + 1, ...] of its dtype: gradient t in slot t mod (tau + 1); None where tau = 0


def pipeline_delays(num_stages: int, accumulation: int = 1) -> tuple[int, ...]:
    r"""Delays of the stages of an asynchronous 1F1B pipeline, $\tau_i = \lfloor (2 (P - i) + 1) / (2 K) \rfloor$.

    Args:
      num_stages: P.
      accumulation: K, the microbatches whose gradients make one update.

    Returns:
      tau_1, ..., tau_P in updates; the last stage's is 0.

    Raises:
      ValueError: if P or K is not positive.

    Example:
      >>> pipeline_delays(8)
      (7, 6, 5, 4, 3, 2, 1, 0)
      >>> pipeline_delays(8, accumulation=2)
      (3, 3, 2, 2, 1, 1, 0, 0)

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov].
    """
    checks.at_least(1, num_stages=num_stages, accumulation=accumulation)
    return tuple((2 * (num_stages - i) + 1) // (2 * accumulation) for i in range(1, num_stages + 1))


def delay_memory(params: PyTree, delay: Delay, *, late_gradients: bool = False) -> int:
    r"""Bytes of the ring buffers: $\sum_j \tau_j |w_j|$ for `keep_param_history`, one copy more for `delay_gradients`.

    The newest version is the parameters themselves and not counted. Nothing is allocated.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s such as `jax.eval_shape` gives.
      delay: as `keep_param_history` takes it.
      late_gradients: True for `delay_gradients`, whose rings have tau + 1 slots.

    Returns:
      The number of bytes.

    Raises:
      ValueError: as `keep_param_history`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> matrix = jax.ShapeDtypeStruct((768, 768), jnp.float32)
      >>> delay_memory({"first": matrix, "last": matrix}, [("first", 7), ("last", 0)])
      16515072
    """
    depths = _gradient_depths(params, delay) if late_gradients else delay_of_each_leaf(params, delay)
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)]
    return sum(depth * size for depth, size in zip(depths, sizes, strict=True))


def keep_param_history(delay: Delay) -> optax.GradientTransformationExtraArgs:
    """A link for `optax.chain` that remembers earlier parameters, so that gradients can be taken at stale ones.

    Updates pass through unchanged; where in the chain it stands makes no difference. One step is

        grads = jax.grad(loss)(stale_params(opt_state, params), batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)

    It costs tau copies of each parameter (`delay_memory` tells before), one of which is read and written per step.

    Args:
      delay: the delay of all parameters in updates, or (regex, delay) rules on their paths as in `trees.label_tree`:
        the first match wins, every rule must match and every parameter must be matched. Static: it determines shapes.

    Returns:
      An optax transformation with `ParamHistoryState`; `update` needs the parameters.

    Raises:
      ValueError: for a negative or fractional delay at once; by `init`, for rules that match nothing and parameters
        without a rule; by `update`, without parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(keep_param_history([("first", 2), ("last", 0)]), optax.sgd(1.0))
      >>> params = {"first": jnp.array(0.0), "last": jnp.array(0.0)}
      >>> state = optimizer.init(params)
      >>> for _ in range(5):
      ...     grads = {"first": jnp.array(-1.0), "last": jnp.array(-1.0)}
      ...     updates, state = optimizer.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> {name: float(w) for name, w in stale_params(state, params).items()}
      {'first': 3.0, 'last': 5.0}

    Source: Narayanan et al. (SOSP 2019), weight stashing [narayanan2019pipedream]; Ajanthan et al. (ICML 2025),
      arXiv:2505.01099 [ajanthan2025nesterov].
    """
    tau = checked_delays(delay)

    def init(params: PyTree) -> ParamHistoryState:
        return ParamHistoryState(jnp.zeros((), jnp.int32), rings(params, delay_of_each_leaf(params, tau), jnp.asarray))

    def update(
        updates: PyTree, state: ParamHistoryState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ParamHistoryState]:
        del extra_args
        return updates, push_params(state, params, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def stale_params(opt_state: PyTree, params: PyTree) -> PyTree:
    r"""The composite stale parameters $\{w_j^{(\max(m - \tau_j, 0))}\}_j$: where to take the gradient of update m.

    Args:
      opt_state: state of an optimizer with `keep_param_history` (or `delay_compensation`) anywhere in it.
      params: the newest parameters.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: if the state holds no history, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(2)}
      >>> optimizer = optax.chain(keep_param_history(delay=1), optax.sgd(0.5))
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update({"w": jnp.ones(2)}, state, params)
      >>> stale_params(state, optax.apply_updates(params, updates))
      {'w': Array([1., 1.], dtype=float32)}

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov].
    """
    found = trees.find_states(opt_state, ParamHistoryState)
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold one history of parameters, found {len(found)}; "
            "put one keep_param_history(delay) (or delay_compensation(delay), which keeps its own) into the chain"
        )
    return oldest_params(found[0], params)


def delay_gradients(delay: Delay) -> optax.GradientTransformationExtraArgs:
    r"""A link for `optax.chain` that hands on the gradients of $\tau$ steps ago, $g_{\max(t - \tau, 0)}$.

    What stands before it in the chain acts when the gradient is made, what stands after it when it arrives. Until step
    tau the first gradient is repeated, as a pipeline computes its first gradients at version 0. All parts of a gradient
    were taken at one version of the parameters; for the staleness of a pipeline use `keep_param_history`.

    Args:
      delay: as `keep_param_history` takes it.

    Returns:
      An optax transformation with `DelayGradientsState`.

    Raises:
      ValueError: for a negative or fractional delay at once; by `init`, for rules that match nothing and parameters
        without a rule.

    Example:
      >>> import jax.numpy as jnp
      >>> link, received = delay_gradients(delay=2), []
      >>> state = link.init(jnp.array(0.0))
      >>> for g in (1.0, 2.0, 3.0, 4.0, 5.0):
      ...     late, state = link.update(jnp.array(g), state)
      ...     received.append(float(late))
      >>> received
      [1.0, 1.0, 1.0, 2.0, 3.0]
    """
    tau = checked_delays(delay)

    def init(params: PyTree) -> DelayGradientsState:
        return DelayGradientsState(
            jnp.zeros((), jnp.int32), rings(params, _gradient_depths(params, tau), jnp.zeros_like)
        )

    def update(
        updates: PyTree, state: DelayGradientsState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, DelayGradientsState]:
        del params, extra_args
        t = state.count

        def late(g: jax.Array, ring: jax.Array | None) -> jax.Array:
            if ring is None:
                return g
            return read_slot(ring, jnp.where(t < len(ring) - 1, 0, (t + 1) % len(ring))).astype(g.dtype)

        write = lambda g, ring: None if ring is None else write_slot(ring, g, t % len(ring))
        history = map_with_history(write, updates, state.history)
        return map_with_history(late, updates, history), DelayGradientsState(optax.safe_increment(t), history)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_group_norm(
    max_norm: float | int, groups: Sequence[tuple[str, Hashable]]
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient of each group by its own norm, as every pipeline stage clips its own parameters.

    Args:
      max_norm: the largest Euclidean norm that the gradient of a group may keep.
      groups: (regex, label) rules on the paths, as in `trees.label_tree`; parameters with equal labels are one group.

    Returns:
      An optax transformation.

    Raises:
      ValueError: if max_norm is not positive; by `init`, for rules that match nothing and parameters without a rule.

    Example:
      >>> import jax.numpy as jnp
      >>> grads = {"first": jnp.array([3.0, 4.0]), "last": jnp.array([0.6, 0.8])}
      >>> clip = clip_by_group_norm(2.0, [("first", 0), ("last", 1)])
      >>> clipped, _ = clip.update(grads, clip.init(grads))
      >>> {name: [round(float(g), 3) for g in leaf] for name, leaf in clipped.items()}
      {'first': [1.2, 1.6], 'last': [0.6, 0.8]}

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov].
    """
    checks.positive(max_norm=max_norm)
    clip = optax.clip_by_global_norm(max_norm)
    return optax.partition({label: clip for _, label in groups}, functools.partial(label_leaves, rules=groups))


def oldest_params(state: ParamHistoryState, params: PyTree) -> PyTree:
    """The version that the next `push_params` forgets; the parameters themselves where tau is 0."""
    oldest = lambda p, ring: p if ring is None else read_slot(ring, state.count % len(ring)).astype(p.dtype)
    return map_with_history(oldest, params, state.history)


def push_params(state: ParamHistoryState, params: PyTree | None, updates: PyTree) -> ParamHistoryState:
    """Version m takes the slot of version m - tau, which the updates were computed from."""
    if params is None:
        raise ValueError("params must be given to update: the history of parameters is made of them")

    def write(p: jax.Array, u: jax.Array, ring: jax.Array | None) -> jax.Array | None:
        if ring is None:
            return None
        # Always p. Only a value that depends on the updates keeps XLA from copying the ring, to write it before it has
        # been read for them.
        p = jnp.where(state.count >= 0, p, u.astype(p.dtype))
        return write_slot(ring, p, state.count % len(ring))

    return ParamHistoryState(optax.safe_increment(state.count), map_with_history(write, params, updates, state.history))


def _gradient_depths(params: PyTree, delay: Delay) -> list[int]:
    """One slot more than there are late gradients: written before it is read, the ring is never copied."""
    return [tau + 1 if tau else 0 for tau in delay_of_each_leaf(params, delay)]
