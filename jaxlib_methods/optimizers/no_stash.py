"""Pipelines without weight stashing: PipeMare and its parts.

Symbols: tau delay of a parameter in updates, w_t parameters at step t = 0, 1, ..., eta learning rate, T_c steps of
annealing, rho_t = 1 - min(t / T_c, 1).

  learning-rate correction   eta / tau^rho_t, where tau > 0 (PipeMare T1; AsyncPP's "LR correction" of PipeDream)
  discrepancy correction     backward weights w_t - tau delta_t, delta an average of the increments (PipeMare T2)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.optimizers._delay_rules import Delay, checked_or_traced, delay_of_each_leaf, map_with_history
from jaxlib_methods.typing import PyTree

__all__ = [
    "DiscrepancyCorrectionState",
    "ScaleByDelayState",
    "discrepancy_corrected",
    "discrepancy_correction",
    "mixed_versions",
    "pipemare",
    "scale_by_delay",
]


class ScaleByDelayState(NamedTuple):
    """State of `scale_by_delay`."""

    count: jax.Array  # int32 []: steps done


class DiscrepancyCorrectionState(NamedTuple):
    """State of `discrepancy_correction`."""

    shift: PyTree  # like the parameters: tau delta_t; None where tau = 0


def mixed_versions(function: Callable[..., Any]) -> Callable[..., Any]:
    r"""Runs a stage forward at one version of its parameters and backward at another, as pipelines without stashing do.

    The result is a function of (forward_params, backward_params, *inputs) with the value f(forward_params, *inputs).
    Its derivatives are those of f at (backward_params, *inputs): the cotangents of backward_params and of the inputs
    are the VJP of a recomputed forward pass at the stored inputs with the backward weights; that of forward_params is
    0. Applied to single layers in place of whole stages, the activations of the forward pass are reused instead.

    Args:
      function: `f(params, *inputs)`, a stage or a layer.

    Returns:
      The function `(forward_params, backward_params, *inputs) -> f(forward_params, *inputs)`.

    Example:
      >>> import jax
      >>> stage = mixed_versions(lambda w, x: w * w * x)
      >>> stage(2.0, 3.0, 5.0)
      20.0
      >>> [float(g) for g in jax.grad(stage, argnums=(0, 1, 2))(2.0, 3.0, 5.0)]
      [0.0, 30.0, 9.0]

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov].
    """

    @jax.custom_vjp
    def mixed(forward_params: PyTree, backward_params: PyTree, *inputs: Any) -> Any:
        del backward_params
        return function(forward_params, *inputs)

    def forward(forward_params: PyTree, backward_params: PyTree, *inputs: Any) -> tuple[Any, Any]:
        return function(forward_params, *inputs), (forward_params, backward_params, inputs)

    def backward(kept: Any, cotangent: Any) -> tuple[Any, ...]:
        forward_params, backward_params, inputs = kept
        _, vjp = jax.vjp(function, backward_params, *inputs)
        return jax.tree.map(jnp.zeros_like, forward_params), *vjp(cotangent)

    mixed.defvjp(forward, backward)
    return mixed


def scale_by_delay(
    delay: Delay | jax.Array, anneal_steps: int | jax.Array = 7000
) -> optax.GradientTransformationExtraArgs:
    r"""The learning-rate correction: divides by $\tau^{\rho_t}$ with $\rho_t = 1 - \min(t / T_c, 1)$ where tau > 0.

    It comes after the rule and the weight decay, so that the decay shrinks with the learning rate.

    Args:
      delay: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it; or an integer
        scalar array, which may be traced, for a program in which the stages of a pipeline differ.
      anneal_steps: T_c, after which nothing is corrected.

    Returns:
      An optax transformation with `ScaleByDelayState`.

    Raises:
      ValueError: for a bad delay, or rules that do not fit the parameters, and if anneal_steps is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_delay(delay=4, anneal_steps=2)
      >>> state, seen = link.init(jnp.zeros(())), []
      >>> for _ in range(4):
      ...     update, state = link.update(jnp.array(1.0), state)
      ...     seen.append(float(update))
      >>> seen
      [0.25, 0.5, 1.0, 1.0]

    Source: Yang et al. (MLSys 2021), arXiv:1910.05124, learning rate rescheduling [yang2021pipemare]; Ajanthan et al.
      (ICML 2025), arXiv:2505.01099, official code [ajanthan2025nesterov].
    """
    tau = checked_or_traced(delay)
    checks.at_least(1, anneal_steps=anneal_steps)

    def init(params: PyTree) -> ScaleByDelayState:
        delay_of_each_leaf(params, tau)
        return ScaleByDelayState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: ScaleByDelayState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleByDelayState]:
        del params, extra_args
        rho = 1 - jnp.minimum(state.count.astype(jnp.float32) / jnp.asarray(anneal_steps, jnp.float32), 1)
        leaves, structure = jax.tree.flatten(updates)

        def factor(delay: int | jax.Array) -> jax.Array:
            if isinstance(delay, int):
                return jnp.exp(-rho * math.log(delay))
            return jnp.exp(-rho * jnp.log(jnp.maximum(delay, 1).astype(jnp.float32)))  # 1 at a traced tau of 0

        scaled = [
            u if is_zero(delay) else u * factor(delay).astype(u.dtype)
            for u, delay in zip(leaves, delay_of_each_leaf(updates, tau), strict=True)
        ]
        return structure.unflatten(scaled), ScaleByDelayState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def discrepancy_correction(
    delay: Delay | jax.Array, decay: float = math.exp(-2)
) -> optax.GradientTransformationExtraArgs:
    r"""Estimates the weights of the forward pass for a backward pass without stash: $w_t - \tau \delta_t$.

    delta is an average of the increments, $\delta_{t+1} = D^{1/\tau} \delta_t + (1 - D^{1/\tau}) (w_{t+1} - w_t)$. The
    link passes updates on and must be the last of the chain, where they are the increments; `discrepancy_corrected`
    gives the weights. Here tau is the forward delay minus the backward delay.

    Args:
      delay: as `scale_by_delay` takes it.
      decay: D, in (0, 1): how much of an increment is left of it after tau steps.

    Returns:
      An optax transformation with `DiscrepancyCorrectionState`.

    Raises:
      ValueError: for a bad delay, or rules that do not fit the parameters, and a decay outside of (0, 1).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(optax.sgd(1.0), discrepancy_correction(delay=3))
      >>> w = jnp.array(0.0)
      >>> state = optimizer.init(w)
      >>> for _ in range(60):  # w moves by one per step
      ...     updates, state = optimizer.update(jnp.array(-1.0), state, w)
      ...     w = w + updates
      >>> float(w), round(float(discrepancy_corrected(state, w)), 3)
      (60.0, 57.0)

    Source: Yang et al. (MLSys 2021), arXiv:1910.05124, discrepancy correction [yang2021pipemare].
    """
    tau = checked_or_traced(delay)
    checks.within("(0, 1)", decay=decay)

    def init(params: PyTree) -> DiscrepancyCorrectionState:
        leaves, structure = jax.tree.flatten(params)
        each = zip(leaves, delay_of_each_leaf(params, tau), strict=True)
        return DiscrepancyCorrectionState(
            structure.unflatten([None if is_zero(delay) else jnp.zeros_like(p) for p, delay in each])
        )

    def update(
        updates: PyTree, state: DiscrepancyCorrectionState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, DiscrepancyCorrectionState]:
        del params, extra_args

        def average(u: jax.Array, shift: jax.Array | None, delay: int | jax.Array) -> jax.Array | None:
            if shift is None:
                return None
            if isinstance(delay, jax.Array):
                delay = delay.astype(shift.dtype)  # at a traced tau of 0 the shift stays 0
                keep = decay ** (1 / jnp.maximum(delay, 1))
            else:
                keep = decay ** (1 / delay)
            return keep * shift + (1 - keep) * delay * u.astype(shift.dtype)

        leaves, structure = jax.tree.flatten(updates)
        shifts = map(average, leaves, structure.flatten_up_to(state.shift), delay_of_each_leaf(updates, tau))
        return updates, DiscrepancyCorrectionState(structure.unflatten(shifts))

    return optax.GradientTransformationExtraArgs(init, update)


def discrepancy_corrected(opt_state: PyTree, params: PyTree) -> PyTree:
    r"""The backward weights $w_t - \tau \delta_t$ of `discrepancy_correction`.

    Args:
      opt_state: state of an optimizer with one `discrepancy_correction` in it.
      params: the newest parameters.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: if the state holds no such link, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> link = discrepancy_correction(delay=2)
      >>> discrepancy_corrected(link.init(jnp.ones(2)), jnp.ones(2)).tolist()
      [1.0, 1.0]

    Source: Yang et al. (MLSys 2021), arXiv:1910.05124, discrepancy correction [yang2021pipemare].
    """
    found = trees.find_states(opt_state, DiscrepancyCorrectionState)
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one discrepancy_correction, found {len(found)}; put one into the chain")
    back = lambda p, shift: p if shift is None else p - shift.astype(p.dtype)
    return map_with_history(back, params, found[0].shift)


def pipemare(
    inner: optax.GradientTransformation,
    delay: Delay | jax.Array,
    anneal_steps: int | jax.Array = 7000,
    decay: float = math.exp(-2),
) -> optax.GradientTransformationExtraArgs:
    """PipeMare around any optimizer: the learning-rate correction, and the average for the discrepancy correction.

    Its pipeline keeps no stash: forward at the weights of the forward pass (`stale_params`), backward at
    `discrepancy_corrected(opt_state, params)`; `mixed_versions` runs a stage that way.

    Args:
      inner: the optimizer with its weight decay and learning rate.
      delay: as `scale_by_delay` takes it.
      anneal_steps: T_c of the learning-rate correction.
      decay: D of the discrepancy correction.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `scale_by_delay` and `discrepancy_correction`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = pipemare(optax.sgd(1.0), delay=2)
      >>> updates, _ = optimizer.update(jnp.array(1.0), optimizer.init(jnp.array(0.0)))
      >>> float(updates)
      -0.5

    Source: Yang et al. (MLSys 2021), arXiv:1910.05124 [yang2021pipemare].
    """
    return optax.chain(inner, scale_by_delay(delay, anneal_steps), discrepancy_correction(delay, decay))


def is_zero(delay: int | jax.Array) -> bool:
    return isinstance(delay, int) and delay == 0
