r"""Replicas that work alone for H steps and then agree: federated averaging, DiLoCo and its streaming form.

Symbols: x_j parameters of replica j, H local steps between synchronisations, theta the parameters all replicas share.

  FedAvg      every H steps      x_j <- mean_j x_j
  DiLoCo      every H steps      theta <- outer optimizer on the outer gradient theta - mean_j x_j;   x_j <- theta
  streaming   the same for one fragment of the parameters at a time, each at its own phase of the H steps; the new theta
              arrives tau steps late, and is mixed: x_j <- alpha x_j + (1 - alpha) theta
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.parallel.pipelines.hooks import DataHook
from jaxlib_methods.parallel.replicas.averaging import at_interval, replica_mean
from jaxlib_methods.typing import PyTree

__all__ = [
    "DiLoCoState",
    "FedAvgState",
    "StreamingDiLoCoState",
    "diloco",
    "fed_avg",
    "outer_sgd",
    "streaming_diloco",
]


class FedAvgState(NamedTuple):
    """State of `fed_avg`."""

    steps: jax.Array  # int32 (): local steps done


class DiLoCoState(NamedTuple):
    """State of `diloco`."""

    steps: jax.Array  # int32 (): local steps done
    shared: PyTree  # theta, like the parameters
    outer: PyTree  # state of the outer optimizer


class StreamingDiLoCoState(NamedTuple):
    """State of `streaming_diloco`; trees are of the lists of a fragment's arrays."""

    steps: jax.Array  # int32 (): local steps done
    shared: tuple[PyTree, ...]  # theta, one list for each fragment
    outer: tuple[PyTree, ...]  # state of the outer optimizer of each fragment


def fed_avg(interval: int, *, axis_name: str = "data") -> DataHook:
    """Federated averaging: after every H local steps all replicas take their mean.

    Args:
      interval: H. Static.
      axis_name: of the replicas.

    Returns:
      The hook, with `FedAvgState`; used as that of `sparse_averaging`.

    Raises:
      ValueError: if `interval` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> averaging = fed_avg(2)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> state = jax.vmap(averaging.init)(x)
      >>> for _ in range(2):
      ...     x, state = jax.vmap(averaging.apply, axis_name="data")(x + jnp.array([[0.0], [1.0]]), state)
      >>> x.ravel().tolist()
      [3.0, 3.0]

    Source: McMahan et al. (AISTATS 2017), arXiv:1602.05629 [mcmahan2017communication].
    """
    checks.at_least(1, interval=interval)

    def apply(params: PyTree, state: FedAvgState, info: Any = None) -> tuple[PyTree, FedAvgState]:
        del info
        steps = optax.safe_increment(state.steps)
        (params,) = at_interval(interval, lambda x: (_mean(x, axis_name),), steps, params)
        return params, FedAvgState(steps)

    return DataHook(lambda params: FedAvgState(jnp.zeros((), jnp.int32)), apply, restart=lambda state: state)


def outer_sgd(
    learning_rate: optax.ScalarOrSchedule = 0.7, momentum: float | int = 0.9
) -> optax.GradientTransformationExtraArgs:
    """DiLoCo's outer optimizer: SGD with Nesterov momentum.

    Args:
      learning_rate: a number or a schedule of the synchronisations.
      momentum: of the outer gradients.

    Returns:
      An optax transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = outer_sgd()
      >>> updates, _ = rule.update(jnp.array(1.0), rule.init(jnp.array(0.0)))
      >>> round(float(updates), 2)  # 0.7 (1 + 0.9)
      -1.33

    Source: Douillard et al. (2023), arXiv:2311.08105 [douillard2023diloco].
    """
    return optax.with_extra_args_support(optax.sgd(learning_rate, momentum=momentum, nesterov=True))


def diloco(
    interval: int = 500, outer: optax.GradientTransformation | None = None, *, axis_name: str = "data"
) -> DataHook:
    """DiLoCo: after every H local steps an outer optimizer moves the shared parameters, and all replicas start there.

    The states of the inner optimizers stay what they are.

    Args:
      interval: H. Static.
      outer: the outer optimizer; None: `outer_sgd()`.
      axis_name: of the replicas.

    Returns:
      The hook, with `DiLoCoState`; used as that of `sparse_averaging`. All replicas must start from equal parameters.

    Raises:
      ValueError: if `interval` is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> averaging = diloco(1, optax.sgd(1.0))  # with a rate of one it is federated averaging
      >>> x = jnp.array([[1.0], [1.0]])
      >>> state = jax.vmap(averaging.init)(x)
      >>> x, state = jax.vmap(averaging.apply, axis_name="data")(x + jnp.array([[0.0], [1.0]]), state)
      >>> x.ravel().tolist()
      [1.5, 1.5]

    Source: Douillard et al. (2023), arXiv:2311.08105 [douillard2023diloco].
    """
    checks.at_least(1, interval=interval)
    outer = outer_sgd() if outer is None else outer

    def init(params: PyTree) -> DiLoCoState:
        return DiLoCoState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.asarray, params), outer.init(params))

    def synchronise(x: PyTree, shared: PyTree, outer_state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        shared, outer_state = _outer_step(outer, x, shared, outer_state, axis_name)
        return shared, shared, outer_state

    def apply(params: PyTree, state: DiLoCoState, info: Any = None) -> tuple[PyTree, DiLoCoState]:
        del info
        steps = optax.safe_increment(state.steps)
        params, shared, outer_state = at_interval(interval, synchronise, steps, params, state.shared, state.outer)
        return params, DiLoCoState(steps, shared, outer_state)

    return DataHook(init, apply)


def streaming_diloco(
    interval: int,
    fragments: Sequence[tuple[str, int]],
    outer: optax.GradientTransformation | None = None,
    *,
    delay: int = 1,
    mixing: float | int = 0.5,
    axis_name: str = "data",
) -> DataHook:
    r"""Streaming DiLoCo: one fragment of the parameters at a time, with the result mixed in $\tau$ steps late.

    Fragment f of F is synchronised at the steps t with t mod H = floor(f H / F), so that the traffic of DiLoCo is
    spread over the H steps. The outer step of such a t is computed at once, and applied at t + tau.

    Args:
      interval: H, at least F. Static.
      fragments: (regex, f) rules on the paths of the parameters, f in 0..F-1. Those of a pipeline's hook are
        common/0, common/1, ... for the arrays that all stages have, and rest/float32 for what the ends have besides.
      outer: the outer optimizer; None: `outer_sgd(0.4)`.
      delay: tau, the steps that the exchange may take, below H. Static.
      mixing: alpha in [0, 1], what a replica keeps of its own parameters.
      axis_name: of the replicas.

    Returns:
      The hook, with `StreamingDiLoCoState`; used as that of `sparse_averaging`. All replicas must start from equal
      parameters.

    Raises:
      ValueError: for H below the number of fragments, a delay outside of [0, H), alpha outside of [0, 1], fragments
        that are not numbered 0..F-1; on init, a parameter that no rule matches.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> averaging = streaming_diloco(2, [("a", 0), ("b", 1)], optax.sgd(1.0), delay=0, mixing=0.0)
      >>> x = {"a": jnp.zeros((2, 1)), "b": jnp.zeros((2, 1))}
      >>> state = jax.vmap(averaging.init)(x)
      >>> x = jax.tree.map(lambda leaf: leaf + jnp.array([[0.0], [1.0]]), x)
      >>> x, state = jax.vmap(averaging.apply, axis_name="data")(x, state)
      >>> x["a"].ravel().tolist(), x["b"].ravel().tolist()
      ([0.0, 1.0], [0.5, 0.5])

    Source: Douillard et al. (2025), arXiv:2501.18512, Algorithm 2 [douillard2025streaming].
    """
    labels = sorted({f for _, f in fragments})
    F = len(labels)
    if labels != list(range(F)) or not F:
        raise ValueError(f"fragments must be numbered 0, 1, ..., got {labels}")
    checks.at_least(F, interval=interval, remedy="each fragment has a turn in it")
    checks.within(f"[0, {interval})", delay=delay, remedy="it is shorter than the interval")
    checks.within("[0, 1]", mixing=mixing)
    outer = outer_sgd(0.4) if outer is None else outer

    def split(params: PyTree) -> list[list[jax.Array]]:
        groups: list[list[jax.Array]] = [[] for _ in range(F)]
        for f, leaf in zip(jax.tree.leaves(trees.label_tree(params, fragments)), jax.tree.leaves(params), strict=True):
            groups[f].append(leaf)
        return groups

    def init(params: PyTree) -> StreamingDiLoCoState:
        shared = tuple(jax.tree.map(jnp.asarray, group) for group in split(params))
        return StreamingDiLoCoState(jnp.zeros((), jnp.int32), shared, tuple(map(outer.init, shared)))

    def apply(params: PyTree, state: StreamingDiLoCoState, info: Any = None) -> tuple[PyTree, StreamingDiLoCoState]:
        del info
        steps = optax.safe_increment(state.steps)
        mixed, shared, outer_states = [], [], []
        for f, x in enumerate(split(params)):
            since = (steps - f * interval // F) % interval  # steps since the fragment's turn
            outer_step = lambda theta, s, x=x: _outer_step(outer, x, theta, s, axis_name)
            theta, outer_state = at_interval(interval, outer_step, since, state.shared[f], state.outer[f])
            arrived = (since == delay) & (steps >= delay + f * interval // F + interval * (f == 0))
            mix = lambda own, new, arrived=arrived: jnp.where(
                arrived, mixing * own + (1 - mixing) * new.astype(own.dtype), own
            )
            mixed.append(jax.tree.map(mix, x, theta))
            shared.append(theta)
            outer_states.append(outer_state)
        taken = [iter(group) for group in mixed]
        which = jax.tree.leaves(trees.label_tree(params, fragments))
        params = jax.tree.structure(params).unflatten([next(taken[f]) for f in which])
        return params, StreamingDiLoCoState(steps, tuple(shared), tuple(outer_states))

    return DataHook(init, apply)


def _mean(x: PyTree, axis_name: str) -> PyTree:
    # Both branches of a condition must be of one type: the choice, which is none, makes the mean vary over the axis.
    return jax.tree.map(lambda leaf, mean: jnp.where(leaf == leaf, mean, mean), x, replica_mean(x, axis_name))


def _outer_step(
    outer: optax.GradientTransformation, x: PyTree, shared: PyTree, outer_state: PyTree, axis_name: str
) -> tuple[PyTree, PyTree]:
    gradient = jax.tree.map(jnp.subtract, shared, replica_mean(x, axis_name))
    updates, outer_state = outer.update(gradient, outer_state, shared)
    return optax.apply_updates(shared, updates), outer_state
