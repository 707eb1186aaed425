"""Pipelines without weight stashing: PipeMare, and the variant of the Nesterov method that keeps no stash.

Symbols: tau delay of a parameter in updates, w_t parameters at step t = 0, 1, ..., eta learning rate, T_c steps of
annealing, rho_t = 1 - min(t / T_c, 1).

  learning-rate correction   eta / tau^rho_t, where tau > 0 (PipeMare T1; AsyncPP's "LR correction" of PipeDream)
  discrepancy correction     backward weights w_t - tau delta_t, delta an average of the increments (PipeMare T2)
  momentum of a stage        0.9 + 0.09 tau / P                                   (Nesterov without stash)
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods import trees
from jaxlib_methods.optimizers import _delays as delays
from jaxlib_methods.optimizers._delays import Tau
from jaxlib_methods.optimizers._nadam import delayed_nesterov

PyTree = Any


class ScaleByDelayState(NamedTuple):
    """State of `scale_by_delay`."""

    count: jax.Array  # int32 []: steps done


class DiscrepancyCorrectionState(NamedTuple):
    """State of `discrepancy_correction`."""

    shift: PyTree  # like the parameters: tau delta_t; None where tau = 0


def scale_by_delay(tau: Tau | jax.Array, anneal_steps: int | jax.Array = 7000) -> optax.GradientTransformationExtraArgs:
    r"""The learning-rate correction: divides by $\tau^{\rho_t}$ with $\rho_t = 1 - \min(t / T_c, 1)$ where tau > 0.

    It comes after the rule and the weight decay, so that the decay shrinks with the learning rate.

    Args:
      tau: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it; or an integer scalar
        array, which may be traced, for a program in which the stages of a pipeline differ.
      anneal_steps: T_c, after which nothing is corrected.

    Returns:
      An optax transformation with `ScaleByDelayState`.

    Raises:
      ValueError: for a bad delay, or rules that do not fit the parameters, and if anneal_steps is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> link = scale_by_delay(tau=4, anneal_steps=2)
      >>> state, seen = link.init(jnp.zeros(())), []
      >>> for _ in range(4):
      ...     update, state = link.update(jnp.array(1.0), state)
      ...     seen.append(float(update))
      >>> seen
      [0.25, 0.5, 1.0, 1.0]

    Source: Yang et al. (MLSys 2021), arXiv:1910.05124, learning rate rescheduling [yang2021pipemare]; Ajanthan et al.
      (ICML 2025), arXiv:2505.01099, official code [ajanthan2025nesterov].
    """
    tau = _checked_or_traced(tau)
    if isinstance(anneal_steps, int) and anneal_steps < 1:
        raise ValueError(f"anneal_steps must be at least 1, got {anneal_steps}")

    def init(params: PyTree) -> ScaleByDelayState:
        _delay_of_each_leaf(params, tau)
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
            u if _is_zero(delay) else u * factor(delay).astype(u.dtype)
            for u, delay in zip(leaves, _delay_of_each_leaf(updates, tau), strict=True)
        ]
        return structure.unflatten(scaled), ScaleByDelayState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def discrepancy_correction(tau: Tau | jax.Array, decay: float = math.exp(-2)) -> optax.GradientTransformationExtraArgs:
    r"""Estimates the weights of the forward pass for a backward pass without stash: $w_t - \tau \delta_t$.

    delta is an average of the increments, $\delta_{t+1} = D^{1/\tau} \delta_t + (1 - D^{1/\tau}) (w_{t+1} - w_t)$. The
    link passes updates on and must be the last of the chain, where they are the increments; `discrepancy_corrected`
    gives the weights. Here tau is the forward delay minus the backward delay.

    Args:
      tau: as `scale_by_delay` takes it.
      decay: D, in (0, 1): how much of an increment is left of it after tau steps.

    Returns:
      An optax transformation with `DiscrepancyCorrectionState`.

    Raises:
      ValueError: for a bad delay, or rules that do not fit the parameters, and a decay outside of (0, 1).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(optax.sgd(1.0), discrepancy_correction(tau=3))
      >>> w = jnp.array(0.0)
      >>> state = optimizer.init(w)
      >>> for _ in range(60):  # w moves by one per step
      ...     updates, state = optimizer.update(jnp.array(-1.0), state, w)
      ...     w = w + updates
      >>> float(w), round(float(discrepancy_corrected(state, w)), 3)
      (60.0, 57.0)

    Source: Yang et al. (MLSys 2021), arXiv:1910.05124, discrepancy correction [yang2021pipemare].
    """
    tau = _checked_or_traced(tau)
    if not 0 < decay < 1:
        raise ValueError(f"decay must lie in (0, 1), got {decay}")

    def init(params: PyTree) -> DiscrepancyCorrectionState:
        leaves, structure = jax.tree.flatten(params)
        each = zip(leaves, _delay_of_each_leaf(params, tau), strict=True)
        return DiscrepancyCorrectionState(
            structure.unflatten([None if _is_zero(delay) else jnp.zeros_like(p) for p, delay in each])
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
        shifts = map(average, leaves, structure.flatten_up_to(state.shift), _delay_of_each_leaf(updates, tau))
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
      >>> link = discrepancy_correction(tau=2)
      >>> discrepancy_corrected(link.init(jnp.ones(2)), jnp.ones(2)).tolist()
      [1.0, 1.0]

    Source: Yang et al. (MLSys 2021), arXiv:1910.05124, discrepancy correction [yang2021pipemare].
    """
    found = trees.find_states(opt_state, DiscrepancyCorrectionState)
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one discrepancy_correction, found {len(found)}; put one into the chain")
    back = lambda p, shift: p if shift is None else p - shift.astype(p.dtype)
    return delays.map_with_history(back, params, found[0].shift)


def pipemare(
    inner: optax.GradientTransformation,
    tau: Tau | jax.Array,
    anneal_steps: int | jax.Array = 7000,
    decay: float = math.exp(-2),
) -> optax.GradientTransformationExtraArgs:
    """PipeMare around any optimizer: the learning-rate correction, and the average for the discrepancy correction.

    Its pipeline keeps no stash: forward at the weights of the forward pass (`stale_params`), backward at
    `discrepancy_corrected(opt_state, params)`; `mixed_versions` runs a stage that way.

    Args:
      inner: the optimizer with its weight decay and learning rate.
      tau: as `scale_by_delay` takes it.
      anneal_steps: T_c of the learning-rate correction.
      decay: D of the discrepancy correction.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `scale_by_delay` and `discrepancy_correction`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = pipemare(optax.sgd(1.0), tau=2)
      >>> updates, _ = optimizer.update(jnp.array(1.0), optimizer.init(jnp.array(0.0)))
      >>> float(updates)
      -0.5

    Source: Yang et al. (MLSys 2021), arXiv:1910.05124 [yang2021pipemare].
    """
    return optax.chain(inner, scale_by_delay(tau, anneal_steps), discrepancy_correction(tau, decay))


def no_stash_nesterov(
    learning_rate: optax.ScalarOrSchedule,
    tau: Tau | jax.Array,
    num_stages: int,
    anneal_steps: int | jax.Array = 7000,
    weight_decay: jax.typing.ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""The variant without weight stashing: each stage has its own learning rate and its own momentum.

    $$\eta_i = \eta / \tau_i^{\rho_t}, \qquad \beta_{1,i} = 0.9 + 0.09\, (P - i) / P$$

    With one microbatch per update tau_i = P - i, and the momentum follows from the delay. The backward pass uses the
    newest weights (`mixed_versions`). The schedule of rho is PipeMare's; the paper's own is not known here.

    Args:
      learning_rate: eta, a number or a schedule.
      tau: as `scale_by_delay` takes it.
      num_stages: P.
      anneal_steps: T_c of rho_t = 1 - min(t / T_c, 1).
      weight_decay: decoupled, as in `delayed_nesterov`.

    Returns:
      The optimizer.

    Raises:
      ValueError: for a bad delay, one that P stages do not have, or rules that do not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = no_stash_nesterov(0.1, [("first", 3), ("last", 0)], num_stages=4)
      >>> params = {"first": jnp.ones(2), "last": jnp.ones(2)}
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> bool((jnp.abs(updates["first"]) < jnp.abs(updates["last"])).all())
      True

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov].
    """
    tau = _checked_or_traced(tau)
    if isinstance(tau, jax.Array):
        b1 = 0.9 + 0.09 / num_stages * tau.astype(jnp.float32)
        return optax.chain(
            delayed_nesterov(learning_rate, b1=b1, weight_decay=weight_decay), scale_by_delay(tau, anneal_steps)
        )
    present = [tau] if isinstance(tau, int) else [delay for _, delay in tau]
    if max(present) >= num_stages:
        raise ValueError(f"a pipeline of {num_stages} stages has delays up to {num_stages - 1}, got {max(present)}")

    def labels(params: PyTree) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(params), delays.delay_of_each_leaf(params, tau))

    of_delay = {
        delay: delayed_nesterov(learning_rate, b1=0.9 + 0.09 * delay / num_stages, weight_decay=weight_decay)
        for delay in present
    }
    return optax.chain(optax.partition(of_delay, labels), scale_by_delay(tau, anneal_steps))


def _checked_or_traced(tau: Tau | jax.Array) -> Tau | jax.Array:
    if not isinstance(tau, jax.Array):
        return delays.checked_delays(tau)
    if tau.ndim or not jnp.issubdtype(tau.dtype, jnp.integer):
        raise ValueError(f"tau as an array must be an integer scalar, got {tau.dtype}{list(tau.shape)}")
    return tau


def _delay_of_each_leaf(params: PyTree, tau: Tau | jax.Array) -> list[Any]:
    if isinstance(tau, jax.Array):
        return [tau] * len(jax.tree.leaves(params))
    return delays.delay_of_each_leaf(params, tau)


def _is_zero(delay: int | jax.Array) -> bool:
    return isinstance(delay, int) and delay == 0
