"""Nesterov momentum for delayed gradients: NAdam with PyTorch's momentum schedule, and the update of the theory.

Symbols: g_t gradient of step t = 1, 2, ... (asynchronously: of weights that are tau updates old), eta learning rate,
gamma_t momentum, w_t iterate, y_t = w_t + d_t look-ahead point. The stored parameter is y_t, so that "the gradient at
the delayed look-ahead point" needs no machinery beyond the delay itself.

Theory, eq. 10:   d_t = gamma_t (w_t - w_{t-1});   w_{t+1} = w_t + d_t - eta (1 - gamma_t) g_t
with m_t = (w_t - w_{t+1}) / eta, in terms of what is stored:
                  m_t = gamma_t m_{t-1} + (1 - gamma_t) g_t
                  y_{t+1} = y_t - eta [(1 - gamma_t) g_t + gamma_{t+1} m_t]

Practice, NAdam:  mu_t = b1 (1 - 0.96^(t psi) / 2);   Pi_t = mu_1 ... mu_t
                  m_t = b1 m_{t-1} + (1 - b1) g_t;   v_t = b2 v_{t-1} + (1 - b2) g_t^2
                  y_{t+1} = y_t - eta [(1 - mu_t) / (1 - Pi_t) g_t + mu_{t+1} / (1 - Pi_t mu_{t+1}) m_t]
                                    / (sqrt(v_t / (1 - b2^t)) + eps)

The factor (1 - gamma_t), here (1 - mu_t), is the discount: with gamma near 1 it lines the look-ahead up with the delay.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

ArrayLike = jax.typing.ArrayLike
PyTree = Any
DISCOUNTS = ("both", "momentum", "none")


class ScaleByNadamState(NamedTuple):
    """State of `scale_by_nadam`."""

    count: jax.Array  # int32 []: steps done
    mu_product: jax.Array  # float32 [] (float64 with float64 parameters): Pi_t, 0 once it underflows
    m: PyTree  # like the parameters, at least float32: average of the gradients
    v: PyTree  # like the parameters, at least float32: average of their squares


class ScaleByDiscountedNesterovState(NamedTuple):
    """State of `scale_by_discounted_nesterov`."""

    count: jax.Array  # int32 []: steps done
    m: PyTree  # like the parameters, at least float32: (w_t - w_{t+1}) / eta


def momentum_schedule(step: jax.Array, b1: ArrayLike = 0.99, momentum_decay: ArrayLike = 0.004) -> jax.Array:
    r"""The momentum of NAdam's step t, $\mu_t = \beta_1 (1 - \tfrac12 0.96^{t \psi})$.

    It grows from b1 / 2 towards b1, with half of the way done at t = 17 / psi.

    Args:
      step: t = 1, 2, ..., a floating-point array of any shape.
      b1: beta_1, the limit.
      momentum_decay: psi; larger is faster, and infinity means mu_t = b1.

    Returns:
      mu_t, of the shape and dtype of `step`.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(momentum_schedule(jnp.float32(t))), 4) for t in (1, 1000, 50_000)]
      [0.4951, 0.5696, 0.9899]

    Source: Dozat (ICLR workshop 2016) [dozat2016incorporating]; the constants are PyTorch's.
    """
    return b1 * (1 - 0.5 * jnp.exp(step * (momentum_decay * math.log(0.96))))


def scale_by_nadam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    momentum_decay: ArrayLike = 0.004,
    *,
    discount: str = "both",
) -> optax.GradientTransformationExtraArgs:
    r"""NAdam's direction with PyTorch's momentum schedule; `optax.nadam` has no schedule and gives other numbers.

    $$\Big[\frac{1 - \mu_t}{1 - \Pi_t} g_t + \frac{\mu_{t+1}}{1 - \Pi_t \mu_{t+1}} m_t\Big] \Big/
      \Big(\sqrt{v_t / (1 - \beta_2^t)} + \epsilon\Big)$$

    Pi_t underflows to 0 after some hundred steps, which is harmless: it only enters as 1 - Pi_t. Moments are kept in
    float32 at least, because averages with b2 = 0.999 do not move in bfloat16.

    Args:
      b1: decay of m, and the limit of mu_t.
      b2: decay of v.
      eps: added to the denominator.
      momentum_decay: psi of `momentum_schedule`.
      discount: where the gradient is weighted with 1 - gamma. "both": by 1 - mu_t in the direction and by 1 - b1 in m,
        which is NAdam. "momentum": in m alone; the direction takes the gradient whole. "none": nowhere, as in eq. 10
        without its discount, which lengthens the step by 1 / (1 - gamma). The last two are ablations.

    Returns:
      An optax transformation with `ScaleByNadamState`.

    Raises:
      ValueError: for a decay outside of [0, 1), a negative eps or psi, and an unknown discount.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> rule, w = scale_by_nadam(b1=0.99), jnp.zeros(())
      >>> state = rule.init(w)
      >>> for g in (1.0, -1.0, 2.0):
      ...     direction, state = rule.update(jnp.float32(g), state)
      ...     w = w - 0.1 * direction
      >>> round(float(w), 6)
      -0.11574

    Source: Dozat (ICLR workshop 2016), Algorithm 1 [dozat2016incorporating]; Ajanthan et al. (ICML 2025),
      arXiv:2505.01099 [ajanthan2025nesterov].
    """
    _check_decay("b1", b1)
    _check_decay("b2", b2)
    _check_not_negative("eps", eps)
    _check_not_negative("momentum_decay", momentum_decay)
    _check_discount(discount, DISCOUNTS)

    def init(params: PyTree) -> ScaleByNadamState:
        return ScaleByNadamState(
            jnp.zeros((), jnp.int32), jnp.ones((), _scalar_dtype(params)), moments(params), moments(params)
        )

    def update(
        updates: PyTree, state: ScaleByNadamState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleByNadamState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        t = count.astype(state.mu_product.dtype)
        mu, mu_next = momentum_schedule(t, b1, momentum_decay), momentum_schedule(t + 1, b1, momentum_decay)
        Pi = state.mu_product * mu
        of_g = (1 - mu if discount == "both" else 1) / (1 - Pi)
        of_m = mu_next / (1 - Pi * mu_next)
        into_m = 1 if discount == "none" else 1 - b1
        m = jax.tree.map(lambda m, g: b1 * m + into_m * g.astype(m.dtype), state.m, updates)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g.astype(v.dtype)), state.v, updates)
        correction = _one_minus_power(b2, t)

        def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            cast = lambda scalar: jnp.asarray(scalar).astype(m.dtype)
            numerator = cast(of_g) * g.astype(m.dtype) + cast(of_m) * m
            return (numerator / (jnp.sqrt(v / cast(correction)) + eps)).astype(g.dtype)

        return jax.tree.map(direction, updates, m, v), ScaleByNadamState(count, Pi, m, v)

    return optax.GradientTransformationExtraArgs(init, update)


def nadam(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    momentum_decay: ArrayLike = 0.004,
    weight_decay: ArrayLike = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    discount: str = "both",
) -> optax.GradientTransformationExtraArgs:
    """NAdam with decoupled weight decay, as `torch.optim.NAdam(decoupled_weight_decay=True)`.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of m, and the limit of mu_t.
      b2: decay of v.
      eps: added to the denominator.
      momentum_decay: psi of `momentum_schedule`.
      weight_decay: the parameters shrink by learning_rate * weight_decay per step.
      mask: which parameters decay, as in `optax.adamw`.
      discount: see `scale_by_nadam`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `scale_by_nadam`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> w, optimizer = jnp.array([1.0]), nadam(0.1)
      >>> updates, state = optimizer.update(2 * w, optimizer.init(w), w)
      >>> [round(float(u), 4) for u in updates]
      [-0.1056]

    Source: Dozat (ICLR workshop 2016), Algorithm 1 [dozat2016incorporating].
    """
    return optax.chain(
        scale_by_nadam(b1, b2, eps, momentum_decay, discount=discount),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def delayed_nesterov(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.99,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    momentum_decay: ArrayLike = 0.004,
    weight_decay: ArrayLike = 0.01,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    discount: str = "both",
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of asynchronous pipelines with weight stashing: NAdam with b1 = 0.99 and its discounted gradient.

    It is `nadam` with the paper's constants; gradients come from stale weights (`keep_param_history`, `stale_params`).

    Args:
      learning_rate: a number or a schedule.
      b1: decay of m, and the limit of mu_t.
      b2: decay of v.
      eps: added to the denominator.
      momentum_decay: psi of `momentum_schedule`.
      weight_decay: the parameters shrink by learning_rate * weight_decay per step.
      mask: which parameters decay, as in `optax.adamw`.
      discount: see `scale_by_nadam`; other values than "both" are the ablation.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `scale_by_nadam`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxlib_methods.optimizers import keep_param_history, stale_params
      >>> w = jnp.array([3.0])
      >>> optimizer = optax.chain(keep_param_history(tau=7), delayed_nesterov(0.02))
      >>> state = optimizer.init(w)
      >>> for _ in range(600):  # minimises w^2 with gradients that are seven steps old
      ...     updates, state = optimizer.update(2 * stale_params(state, w), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.abs(w[0]) < 0.1)
      True

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov].
    """
    return nadam(learning_rate, b1, b2, eps, momentum_decay, weight_decay, mask, discount=discount)


def theory_momentum(step: jax.Array) -> jax.Array:
    r"""The momentum of the convergence theorem, $\gamma_t = (t - 2) / t$, for `scale_by_discounted_nesterov`.

    At t = 1 the formula gives -1 where there is no previous step to extrapolate; 0 is used there.

    Args:
      step: t = 1, 2, ..., an array of any shape.

    Returns:
      gamma_t in [0, 1), float32, or float64 with a float64 `step`.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(g), 3) for g in theory_momentum(jnp.arange(1.0, 6.0))]
      [0.0, 0.0, 0.333, 0.5, 0.6]

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099, eq. 10 [ajanthan2025nesterov].
    """
    t = step if jnp.issubdtype(step.dtype, jnp.floating) else step.astype(jnp.float32)
    return jnp.maximum(1 - 2 / t, 0)


def scale_by_discounted_nesterov(
    gamma: optax.ScalarOrSchedule = 0.99, *, discount: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Eq. 10, without adaptivity: Nesterov momentum whose gradients are discounted by $1 - \gamma_t$.

    $$m_t = \gamma_t m_{t-1} + (1 - \gamma_t) g_t, \quad \text{direction } (1 - \gamma_t) g_t + \gamma_{t+1} m_t$$

    The stored parameter is the look-ahead point y_t = w_t + d_t. Under a delay of 7 and a curvature lambda, gamma =
    0.99 is stable up to eta lambda = 0.168, gradient descent up to 0.209, gamma = 0.99 without discount up to 0.00168.

    Args:
      gamma: the momentum, or a schedule that is evaluated at t = 1, 2, ..., such as `theory_momentum`.
      discount: False leaves both factors (1 - gamma_t) out, which is ordinary Nesterov momentum.

    Returns:
      An optax transformation with `ScaleByDiscountedNesterovState`.

    Raises:
      ValueError: for a gamma outside of [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_discounted_nesterov(0.9)
      >>> direction, _ = rule.update(jnp.array([1.0]), rule.init(jnp.zeros(1)))
      >>> round(float(direction[0]), 4)  # (1 - 0.9) + 0.9 (1 - 0.9)
      0.19

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099, eq. 10 [ajanthan2025nesterov].
    """
    if not callable(gamma):
        _check_decay("gamma", gamma)

    def init(params: PyTree) -> ScaleByDiscountedNesterovState:
        return ScaleByDiscountedNesterovState(jnp.zeros((), jnp.int32), moments(params))

    def update(
        updates: PyTree, state: ScaleByDiscountedNesterovState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleByDiscountedNesterovState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        at = lambda t: gamma(t) if callable(gamma) else gamma
        gamma_t, gamma_next = at(count), at(count + 1)
        of_g = 1 - gamma_t if discount else 1

        def weighted(a: Any, x: jax.Array, b: Any, y: jax.Array) -> jax.Array:
            cast = lambda scalar: jnp.asarray(scalar, y.dtype)
            return cast(a) * x.astype(y.dtype) + cast(b) * y

        m = jax.tree.map(lambda m, g: weighted(of_g, g, gamma_t, m), state.m, updates)
        direction = jax.tree.map(lambda g, m: weighted(of_g, g, gamma_next, m).astype(g.dtype), updates, m)
        return direction, ScaleByDiscountedNesterovState(count, m)

    return optax.GradientTransformationExtraArgs(init, update)


def discounted_nesterov(
    learning_rate: optax.ScalarOrSchedule,
    gamma: optax.ScalarOrSchedule = 0.99,
    weight_decay: ArrayLike = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    discount: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The update that the theory analyses, eq. 10, with decoupled weight decay; `delayed_nesterov` is the one for use.

    Args:
      learning_rate: eta, a number or a schedule.
      gamma: the momentum, or a schedule that is evaluated at t = 1, 2, ..., such as `theory_momentum`.
      weight_decay: the parameters shrink by learning_rate * weight_decay per step.
      mask: which parameters decay, as in `optax.adamw`.
      discount: False leaves both factors (1 - gamma_t) out.

    Returns:
      The optimizer.

    Raises:
      ValueError: for a gamma outside of [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> w, optimizer = jnp.array([1.0]), discounted_nesterov(0.1, gamma=0.9)
      >>> updates, _ = optimizer.update(2 * w, optimizer.init(w), w)
      >>> round(float(updates[0]), 4)
      -0.038

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099, eq. 10 [ajanthan2025nesterov].
    """
    return optax.chain(
        scale_by_discounted_nesterov(gamma, discount=discount),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def moments(params: PyTree) -> PyTree:
    """Zeros for averages of gradients or of their squares: like the parameters, but at least float32."""
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_at_least_float32(p)), params)


def _scalar_dtype(params: PyTree) -> Any:
    return jnp.float64 if jnp.float64 in map(_at_least_float32, jax.tree.leaves(params)) else jnp.float32


def _at_least_float32(leaf: jax.Array) -> Any:
    return jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32


def _one_minus_power(decay: ArrayLike, t: jax.Array) -> jax.Array:
    """1 - decay^t; the direct form loses four digits of float32 at the first steps of a slow average."""
    log = math.log(decay) if isinstance(decay, float) and decay > 0 else jnp.log(decay)
    return -jnp.expm1(t * log)


def _check_decay(name: str, value: Any) -> None:
    if isinstance(value, float | int) and not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def _check_not_negative(name: str, value: Any) -> None:
    if isinstance(value, float | int) and not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def _check_discount(value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"discount must be one of {', '.join(map(repr, allowed))}, got {value!r}")
