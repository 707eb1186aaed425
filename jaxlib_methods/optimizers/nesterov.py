"""NAdam with PyTorch's momentum schedule, and the Nesterov methods of asynchronous pipelines that are made of it.

Symbols: g_t gradient of step t = 1, 2, ... (asynchronously: of weights that are tau updates old), eta learning rate,
y_t the stored parameters, which are the look-ahead point of the Nesterov method.

  mu_t    = b1 (1 - 0.96^(t psi) / 2);   Pi_t = mu_1 ... mu_t
  m_t     = b1 m_{t-1} + (1 - b1) g_t;   v_t = b2 v_{t-1} + (1 - b2) g_t^2
  y_{t+1} = y_t - eta [(1 - mu_t) / (1 - Pi_t) g_t + mu_{t+1} / (1 - Pi_t mu_{t+1}) m_t]
                    / (sqrt(v_t / (1 - b2^t)) + eps)

The factor (1 - mu_t) is the discount: with mu near 1 it lines the look-ahead up with the delay. `discounted` has the
method without adaptivity, which the theory analyses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import common_compute_dtype
from jaxlib_methods.optimizers._delay_rules import Delay, checked_or_traced, delay_of_each_leaf
from jaxlib_methods.optimizers._moments import moments, one_minus_power
from jaxlib_methods.optimizers.no_stash import scale_by_delay
from jaxlib_methods.optimizers.schedules import momentum_schedule
from jaxlib_methods.typing import NesterovDiscount, PyTree

__all__ = [
    "ScaleByNadamState",
    "delayed_nesterov",
    "nadam",
    "no_stash_nesterov",
    "scale_by_nadam",
]

ArrayLike = jax.typing.ArrayLike


class ScaleByNadamState(NamedTuple):
    """State of `scale_by_nadam`."""

    count: jax.Array  # int32 []: steps done
    mu_product: jax.Array  # float32 [] (float64 with float64 parameters): Pi_t, 0 once it underflows
    m: PyTree  # like the parameters, at least float32: average of the gradients
    v: PyTree  # like the parameters, at least float32: average of their squares


def scale_by_nadam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    momentum_decay: ArrayLike = 0.004,
    *,
    discount: NesterovDiscount = "both",
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
    checks.within("[0, 1)", b1=b1, b2=b2)
    checks.not_negative(eps=eps, momentum_decay=momentum_decay)
    checks.one_of(NesterovDiscount, discount=discount)

    def init(params: PyTree) -> ScaleByNadamState:
        return ScaleByNadamState(
            jnp.zeros((), jnp.int32), jnp.ones((), common_compute_dtype(params)), moments(params), moments(params)
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
        correction = one_minus_power(b2, t)

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
    discount: NesterovDiscount = "both",
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
    discount: NesterovDiscount = "both",
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
      >>> from jaxlib_methods.optimizers.delays import keep_param_history, stale_params
      >>> w = jnp.array([3.0])
      >>> optimizer = optax.chain(keep_param_history(delay=7), delayed_nesterov(0.02))
      >>> state = optimizer.init(w)
      >>> for _ in range(600):  # minimises w^2 with gradients that are seven steps old
      ...     updates, state = optimizer.update(2 * stale_params(state, w), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.abs(w[0]) < 0.1)
      True

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov].
    """
    return nadam(learning_rate, b1, b2, eps, momentum_decay, weight_decay, mask, discount=discount)


def no_stash_nesterov(
    learning_rate: optax.ScalarOrSchedule,
    delay: Delay | jax.Array,
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
      delay: as `scale_by_delay` takes it.
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
    tau = checked_or_traced(delay)
    if isinstance(tau, jax.Array):
        b1 = 0.9 + 0.09 / num_stages * tau.astype(jnp.float32)
        return optax.chain(
            delayed_nesterov(learning_rate, b1=b1, weight_decay=weight_decay), scale_by_delay(tau, anneal_steps)
        )
    present = [tau] if isinstance(tau, int) else [delay for _, delay in tau]
    if max(present) >= num_stages:
        raise ValueError(f"a pipeline of {num_stages} stages has delays up to {num_stages - 1}, got {max(present)}")

    def labels(params: PyTree) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(params), delay_of_each_leaf(params, tau))

    of_delay = {
        delay: delayed_nesterov(learning_rate, b1=0.9 + 0.09 * delay / num_stages, weight_decay=weight_decay)
        for delay in present
    }
    return optax.chain(optax.partition(of_delay, labels), scale_by_delay(tau, anneal_steps))
