"""Corrections of delayed gradients: compensation by curvature, and forecasting.

Symbols: tau delay of a parameter in updates, w_t parameters at step t = 0, 1, ..., g_t gradient that arrives at step t
and was taken at w_{t - tau}.

  delay compensation         g_t + lambda g_t^2 (w_t - w_{t - tau}), the squared gradient standing for the Hessian's
                             diagonal; adaptively lambda / sqrt(average of g^2 + eps)
  gradient forecasting       a polynomial through the last gradients, evaluated tau steps ahead
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods.optimizers._delay_rules import (
    Delay,
    checked_delays,
    delay_of_each_leaf,
    map_with_history,
    rings,
    write_slot,
)
from jaxlib_methods.optimizers._moments import moments
from jaxlib_methods.optimizers.delays import ParamHistoryState, keep_param_history, oldest_params
from jaxlib_methods.typing import PyTree

__all__ = [
    "DelayCompensationState",
    "ForecastGradientsState",
    "delay_compensation",
    "forecast_gradients",
    "forecast_weights",
]


class DelayCompensationState(NamedTuple):
    """State of `delay_compensation`."""

    history: ParamHistoryState  # the stale parameters; `stale_params` finds them here
    mean_square: PyTree  # like the parameters, at least float32: average of g^2; () where lambda is not adaptive


class ForecastGradientsState(NamedTuple):
    """State of `forecast_gradients`."""

    count: jax.Array  # int32 []: gradients received
    history: PyTree  # per parameter [length, ...] of its dtype: gradient t in slot t mod length; None where tau = 0


def delay_compensation(
    delay: Delay,
    strength: jax.typing.ArrayLike = 0.04,
    decay: float | None = None,
    eps: float = 1e-7,
) -> optax.GradientTransformationExtraArgs:
    r"""Second-order delay compensation with a diagonal curvature: $g + \lambda\, g \odot g \odot (w_t - w_{t-\tau})$.

    It keeps the history of the parameters itself (`stale_params` finds it) and takes the place of `keep_param_history`,
    before clipping and the optimizer. The squared gradient is the diagonal of the empirical Fisher matrix.

    Args:
      delay: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it.
      strength: lambda; with `decay`, lambda_0 of the adaptive rule lambda_0 / sqrt(average of g^2 + eps).
      decay: of the average of g^2, in [0, 1); None: constant lambda.
      eps: of the adaptive rule.

    Returns:
      An optax transformation with `DelayCompensationState`; `update` needs the parameters.

    Raises:
      ValueError: for a bad delay, or rules that do not fit the parameters, and a decay outside of [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> link = delay_compensation(delay=1, strength=0.5)
      >>> state = link.init(jnp.array(1.0))
      >>> _, state = link.update(jnp.array(2.0), state, jnp.array(1.0))
      >>> compensated, state = link.update(jnp.array(2.0), state, jnp.array(4.0))  # taken at 1, applied at 4
      >>> float(compensated)
      8.0

    Source: Zheng et al. (ICML 2017), arXiv:1609.08326, eq. 10 [zheng2017asynchronous].
    """
    keep = keep_param_history(delay)
    checks.within("[0, 1)", decay=decay)

    def init(params: PyTree) -> DelayCompensationState:
        mean_square = () if decay is None else moments(params)
        return DelayCompensationState(keep.init(params), mean_square)

    def update(
        updates: PyTree, state: DelayCompensationState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, DelayCompensationState]:
        _, history = keep.update(updates, state.history, params, **extra_args)
        stale = oldest_params(state.history, params)
        mean_square, of = state.mean_square, jax.tree.map(lambda _: strength, updates)
        if decay is not None:
            average = lambda s, g: decay * s + (1 - decay) * jnp.square(g.astype(s.dtype))
            mean_square = jax.tree.map(average, mean_square, updates)
            of = jax.tree.map(lambda s: strength / jnp.sqrt(s + eps), mean_square)

        def compensated(g: jax.Array, w: jax.Array, old: jax.Array, strength: Any) -> jax.Array:
            return g + jnp.asarray(strength).astype(g.dtype) * jnp.square(g) * (w - old).astype(g.dtype)

        return jax.tree.map(compensated, updates, params, stale, of), DelayCompensationState(history, mean_square)

    return optax.GradientTransformationExtraArgs(init, update)


def forecast_weights(delay: int, length: int = 5, order: int = 2) -> np.ndarray:
    r"""Weights c of $\hat g_{t+\tau} = \sum_k c_k g_{t-k}$: a least-squares polynomial through the last gradients.

    With n gradients so far, the polynomial through min(n, length) of them has at most that many coefficients; the first
    gradient is repeated as it is.

    Args:
      delay: steps ahead, at least 0.
      length: gradients that the polynomial is fitted to.
      order: its degree.

    Returns:
      float64 [length, length]: row n - 1 holds the weights of g_t, g_{t-1}, ... once n gradients have arrived, zero
      for those that have not.

    Raises:
      ValueError: for a negative delay or order, or fewer gradients than coefficients.

    Example:
      >>> [round(c, 2) for c in forecast_weights(delay=1)[-1].tolist()]
      [1.8, 0.0, -0.8, -0.6, 0.6]

    Source: Ajanthan et al. (ICML 2025), arXiv:2505.01099, official code's baseline [ajanthan2025nesterov].
    """
    checks.at_least(0, delay=delay, order=order)
    checks.at_least(order + 1, length=length, remedy="a polynomial has order + 1 coefficients")
    table = np.zeros((length, length))
    for n in range(1, length + 1):
        times = np.vander(-np.arange(n, dtype=np.float64), min(order, n - 1) + 1)
        table[n - 1, :n] = np.vander([float(delay)], times.shape[1]) @ np.linalg.pinv(times)
    return table


def forecast_gradients(delay: Delay, length: int = 5, order: int = 2) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each late gradient by a forecast for now: a polynomial in time through the last `length`, $\tau$ ahead.

    It takes `length` copies of every delayed parameter. The further ahead, the larger the weights of
    `forecast_weights`: at tau = 7 the noise of a gradient grows 21-fold with the defaults.

    Args:
      delay: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it.
      length: gradients that the polynomial is fitted to.
      order: its degree.

    Returns:
      An optax transformation with `ForecastGradientsState`.

    Raises:
      ValueError: for a bad delay, or rules that do not fit the parameters, and fewer gradients than coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> link, seen = forecast_gradients(delay=3), []
      >>> state = link.init(jnp.array(0.0))
      >>> for g in (0.0, 1.0, 4.0, 9.0, 16.0):  # t^2: exact as soon as three are there
      ...     forecast, state = link.update(jnp.array(g), state)
      ...     seen.append(round(float(forecast), 2))
      >>> seen
      [0.0, 4.0, 25.0, 36.0, 49.0]

    Source: Ajanthan et al. (ICML 2025), arXiv:2505.01099, official code's baseline [ajanthan2025nesterov].
    """
    tau = checked_delays(delay)
    forecast_weights(0, length, order)

    def init(params: PyTree) -> ForecastGradientsState:
        depths = [length if delay else 0 for delay in delay_of_each_leaf(params, tau)]
        return ForecastGradientsState(jnp.zeros((), jnp.int32), rings(params, depths, jnp.zeros_like))

    def update(
        updates: PyTree, state: ForecastGradientsState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ForecastGradientsState]:
        del params, extra_args
        t = state.count
        age = (t - jnp.arange(length, dtype=jnp.int32)) % length  # of the gradient in each slot
        write = lambda g, ring: None if ring is None else write_slot(ring, g, t % length)
        history = map_with_history(write, updates, state.history)

        def forecast(g: jax.Array, ring: jax.Array | None, delay: int) -> jax.Array:
            if ring is None:
                return g
            dtype = compute_dtype(ring.dtype)
            weights = jnp.asarray(forecast_weights(delay, length, order), dtype)[jnp.minimum(t, length - 1)][age]
            terms = weights.reshape(length, *(1,) * g.ndim) * ring.astype(dtype)
            return jnp.sum(terms, axis=0).astype(g.dtype)

        leaves, structure = jax.tree.flatten(updates)
        rings = structure.flatten_up_to(history)
        made = map(forecast, leaves, rings, delay_of_each_leaf(updates, tau))
        return structure.unflatten(made), ForecastGradientsState(optax.safe_increment(t), history)

    return optax.GradientTransformationExtraArgs(init, update)
