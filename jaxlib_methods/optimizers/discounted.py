"""The Nesterov method that the theory of delayed gradients analyses, without adaptivity.

Symbols: g_t gradient of step t = 1, 2, ... (asynchronously: of weights that are tau updates old), eta learning rate,
gamma_t momentum, w_t iterate, y_t = w_t + d_t look-ahead point. The stored parameter is y_t, so that "the gradient at
the delayed look-ahead point" needs no machinery beyond the delay itself.

Eq. 10:           d_t = gamma_t (w_t - w_{t-1});   w_{t+1} = w_t + d_t - eta (1 - gamma_t) g_t
with m_t = (w_t - w_{t+1}) / eta, in terms of what is stored:
                  m_t = gamma_t m_{t-1} + (1 - gamma_t) g_t
                  y_{t+1} = y_t - eta [(1 - gamma_t) g_t + gamma_{t+1} m_t]

The factor (1 - gamma_t) is the discount: with gamma near 1 it lines the look-ahead up with the delay.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core import checks
from jaxlib_methods.optimizers._moments import moments
from jaxlib_methods.typing import PyTree

__all__ = ["ScaleByDiscountedNesterovState", "discounted_nesterov", "scale_by_discounted_nesterov"]

ArrayLike = jax.typing.ArrayLike


class ScaleByDiscountedNesterovState(NamedTuple):
    """State of `scale_by_discounted_nesterov`."""

    count: jax.Array  # int32 []: steps done
    m: PyTree  # like the parameters, at least float32: (w_t - w_{t+1}) / eta


def scale_by_discounted_nesterov(
    momentum: optax.ScalarOrSchedule = 0.99, *, discounted: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Eq. 10, without adaptivity: Nesterov momentum whose gradients are discounted by $1 - \gamma_t$.

    $$m_t = \gamma_t m_{t-1} + (1 - \gamma_t) g_t, \quad \text{direction } (1 - \gamma_t) g_t + \gamma_{t+1} m_t$$

    The stored parameter is the look-ahead point y_t = w_t + d_t. Under a delay of 7 and a curvature lambda, gamma =
    0.99 is stable up to eta lambda = 0.168, gradient descent up to 0.209, gamma = 0.99 without discount up to 0.00168.

    Args:
      momentum: gamma_t, a number, or a schedule that is evaluated at t = 1, 2, ..., such as `theory_momentum`.
      discounted: False leaves both factors (1 - gamma_t) out, which is ordinary Nesterov momentum.

    Returns:
      An optax transformation with `ScaleByDiscountedNesterovState`.

    Raises:
      ValueError: for a momentum outside of [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_discounted_nesterov(0.9)
      >>> direction, _ = rule.update(jnp.array([1.0]), rule.init(jnp.zeros(1)))
      >>> round(float(direction[0]), 4)  # (1 - 0.9) + 0.9 (1 - 0.9)
      0.19

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099, eq. 10 [ajanthan2025nesterov].
    """
    checks.within("[0, 1)", momentum=momentum)

    def init(params: PyTree) -> ScaleByDiscountedNesterovState:
        return ScaleByDiscountedNesterovState(jnp.zeros((), jnp.int32), moments(params))

    def update(
        updates: PyTree, state: ScaleByDiscountedNesterovState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleByDiscountedNesterovState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        at = lambda t: momentum(t) if callable(momentum) else momentum
        gamma_t, gamma_next = at(count), at(count + 1)
        of_g = 1 - gamma_t if discounted else 1

        def weighted(a: Any, x: jax.Array, b: Any, y: jax.Array) -> jax.Array:
            cast = lambda scalar: jnp.asarray(scalar, y.dtype)
            return cast(a) * x.astype(y.dtype) + cast(b) * y

        m = jax.tree.map(lambda m, g: weighted(of_g, g, gamma_t, m), state.m, updates)
        direction = jax.tree.map(lambda g, m: weighted(of_g, g, gamma_next, m).astype(g.dtype), updates, m)
        return direction, ScaleByDiscountedNesterovState(count, m)

    return optax.GradientTransformationExtraArgs(init, update)


def discounted_nesterov(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.99,
    weight_decay: ArrayLike = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    discounted: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The update that the theory analyses, eq. 10, with decoupled weight decay; `delayed_nesterov` is the one for use.

    Args:
      learning_rate: eta, a number or a schedule.
      momentum: gamma_t, a number, or a schedule that is evaluated at t = 1, 2, ..., such as `theory_momentum`.
      weight_decay: the parameters shrink by learning_rate * weight_decay per step.
      mask: which parameters decay, as in `optax.adamw`.
      discounted: False leaves both factors (1 - gamma_t) out.

    Returns:
      The optimizer.

    Raises:
      ValueError: for a momentum outside of [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> w, optimizer = jnp.array([1.0]), discounted_nesterov(0.1, momentum=0.9)
      >>> updates, _ = optimizer.update(2 * w, optimizer.init(w), w)
      >>> round(float(updates[0]), 4)
      -0.038

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099, eq. 10 [ajanthan2025nesterov].
    """
    return optax.chain(
        scale_by_discounted_nesterov(momentum, discounted=discounted),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
