"""Corrections for delayed gradients: what else asynchronous pipelines have been given against staleness.

Symbols: tau delay of a parameter in updates, w_t parameters at step t = 0, 1, ..., g_t gradient that arrives at step t
and was taken at w_{t - tau}, eta learning rate, T_c steps of annealing, rho_t = 1 - min(t / T_c, 1).

  learning-rate correction   eta / tau^rho_t, where tau > 0 (PipeMare T1; AsyncPP's "LR correction" of PipeDream)
  delay compensation         g_t + lambda g_t^2 (w_t - w_{t - tau}), the squared gradient standing for the Hessian's
                             diagonal; adaptively lambda / sqrt(average of g^2 + eps)
  gradient forecasting       a polynomial through the last gradients, evaluated tau steps ahead
  discrepancy correction     backward weights w_t - tau delta_t, delta an average of the increments (PipeMare T2)

BibTeX:

@inproceedings{yang2021pipemare,
  title = {{PipeMare}: Asynchronous Pipeline Parallel {DNN} Training},
  author = {Yang, Bowen and Zhang, Jian and Li, Jonathan and R{\\'e}, Christopher and Aberger, Christopher and
    De Sa, Christopher},
  booktitle = {Machine Learning and Systems},
  year = {2021},
}

@inproceedings{zheng2017asynchronous,
  title = {Asynchronous Stochastic Gradient Descent with Delay Compensation},
  author = {Zheng, Shuxin and Meng, Qi and Wang, Taifeng and Chen, Wei and Yu, Nenghai and Ma, Zhi-Ming and
    Liu, Tie-Yan},
  booktitle = {International Conference on Machine Learning},
  year = {2017},
}
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods import trees
from jaxlib_methods.optimizers import _delays as delays
from jaxlib_methods.optimizers._delays import ParamHistoryState, Tau
from jaxlib_methods.optimizers._nadam import delayed_nesterov, moments

PyTree = Any


class ScaleByDelayState(NamedTuple):
    """State of `scale_by_delay`.

    Source: this library.
    """

    count: jax.Array  # int32 []: steps done


class DelayCompensationState(NamedTuple):
    """State of `delay_compensation`.

    Source: this library.
    """

    history: ParamHistoryState  # the stale parameters; `stale_params` finds them here
    mean_square: PyTree  # like the parameters, at least float32: average of g^2; () where lambda is not adaptive


class ForecastGradientsState(NamedTuple):
    """State of `forecast_gradients`.

    Source: this library.
    """

    count: jax.Array  # int32 []: gradients received
    history: PyTree  # per parameter [length, ...] of its dtype: gradient t in slot t mod length; None where tau = 0


class DiscrepancyCorrectionState(NamedTuple):
    """State of `discrepancy_correction`.

    Source: this library.
    """

    shift: PyTree  # like the parameters: tau delta_t; None where tau = 0


def scale_by_delay(tau: Tau, anneal_steps: int | jax.Array = 7000) -> optax.GradientTransformationExtraArgs:
    r"""The learning-rate correction: divides by $\tau^{\rho_t}$ with $\rho_t = 1 - \min(t / T_c, 1)$ where tau > 0.

    It comes after the rule and the weight decay, so that the decay shrinks with the learning rate.

    Args:
      tau: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it.
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
    tau = delays.checked_delays(tau)
    if isinstance(anneal_steps, int) and anneal_steps < 1:
        raise ValueError(f"anneal_steps must be at least 1, got {anneal_steps}")

    def init(params: PyTree) -> ScaleByDelayState:
        delays.delay_of_each_leaf(params, tau)
        return ScaleByDelayState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: ScaleByDelayState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleByDelayState]:
        del params, extra_args
        rho = 1 - jnp.minimum(state.count.astype(jnp.float32) / jnp.asarray(anneal_steps, jnp.float32), 1)
        leaves, structure = jax.tree.flatten(updates)
        factor = lambda delay: jnp.exp(-rho * math.log(delay))
        scaled = [
            u if delay == 0 else u * factor(delay).astype(u.dtype)
            for u, delay in zip(leaves, delays.delay_of_each_leaf(updates, tau), strict=True)
        ]
        return structure.unflatten(scaled), ScaleByDelayState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def delay_compensation(
    tau: Tau,
    strength: jax.typing.ArrayLike = 0.04,
    decay: float | None = None,
    eps: float = 1e-7,
) -> optax.GradientTransformationExtraArgs:
    r"""Second-order delay compensation with a diagonal curvature: $g + \lambda\, g \odot g \odot (w_t - w_{t-\tau})$.

    It keeps the history of the parameters itself (`stale_params` finds it) and takes the place of `keep_param_history`,
    before clipping and the optimizer. The squared gradient is the diagonal of the empirical Fisher matrix.

    Args:
      tau: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it.
      strength: lambda; with `decay`, lambda_0 of the adaptive rule lambda_0 / sqrt(average of g^2 + eps).
      decay: of the average of g^2, in [0, 1); None: constant lambda.
      eps: of the adaptive rule.

    Returns:
      An optax transformation with `DelayCompensationState`; `update` needs the parameters.

    Raises:
      ValueError: for a bad delay, or rules that do not fit the parameters, and a decay outside of [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> link = delay_compensation(tau=1, strength=0.5)
      >>> state = link.init(jnp.array(1.0))
      >>> _, state = link.update(jnp.array(2.0), state, jnp.array(1.0))
      >>> compensated, state = link.update(jnp.array(2.0), state, jnp.array(4.0))  # taken at 1, applied at 4
      >>> float(compensated)
      8.0

    Source: Zheng et al. (ICML 2017), arXiv:1609.08326, eq. 10 [zheng2017asynchronous].
    """
    keep = delays.keep_param_history(tau)
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1) or be None, got {decay}")

    def init(params: PyTree) -> DelayCompensationState:
        mean_square = () if decay is None else moments(params)
        return DelayCompensationState(keep.init(params), mean_square)

    def update(
        updates: PyTree, state: DelayCompensationState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, DelayCompensationState]:
        _, history = keep.update(updates, state.history, params, **extra_args)
        stale = delays.oldest_params(state.history, params)
        mean_square, of = state.mean_square, jax.tree.map(lambda _: strength, updates)
        if decay is not None:
            average = lambda s, g: decay * s + (1 - decay) * jnp.square(g.astype(s.dtype))
            mean_square = jax.tree.map(average, mean_square, updates)
            of = jax.tree.map(lambda s: strength / jnp.sqrt(s + eps), mean_square)

        def compensated(g: jax.Array, w: jax.Array, old: jax.Array, strength: Any) -> jax.Array:
            return g + jnp.asarray(strength).astype(g.dtype) * jnp.square(g) * (w - old).astype(g.dtype)

        return jax.tree.map(compensated, updates, params, stale, of), DelayCompensationState(history, mean_square)

    return optax.GradientTransformationExtraArgs(init, update)


def forecast_weights(tau: int, length: int = 5, order: int = 2) -> np.ndarray:
    r"""Weights c of $\hat g_{t+\tau} = \sum_k c_k g_{t-k}$: a least-squares polynomial through the last gradients.

    With n gradients so far, the polynomial through min(n, length) of them has at most that many coefficients; the first
    gradient is repeated as it is.

    Args:
      tau: steps ahead, at least 0.
      length: gradients that the polynomial is fitted to.
      order: its degree.

    Returns:
      float64 [length, length]: row n - 1 holds the weights of g_t, g_{t-1}, ... once n gradients have arrived, zero
      for those that have not.

    Raises:
      ValueError: for a negative tau or order, or fewer gradients than coefficients.

    Example:
      >>> [round(c, 2) for c in forecast_weights(tau=1)[-1].tolist()]
      [1.8, 0.0, -0.8, -0.6, 0.6]

    Source: Ajanthan et al. (ICML 2025), arXiv:2505.01099, official code's baseline [ajanthan2025nesterov].
    """
    if tau < 0 or order < 0 or length < order + 1:
        raise ValueError(
            f"forecasting needs tau >= 0, order >= 0 and length >= order + 1, got {tau=}, {order=}, {length=}"
        )
    table = np.zeros((length, length))
    for n in range(1, length + 1):
        times = np.vander(-np.arange(n, dtype=np.float64), min(order, n - 1) + 1)
        table[n - 1, :n] = np.vander([float(tau)], times.shape[1]) @ np.linalg.pinv(times)
    return table


def forecast_gradients(tau: Tau, length: int = 5, order: int = 2) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each late gradient by a forecast for now: a polynomial in time through the last `length`, $\tau$ ahead.

    It takes `length` copies of every delayed parameter. The further ahead, the larger the weights of
    `forecast_weights`: at tau = 7 the noise of a gradient grows 21-fold with the defaults.

    Args:
      tau: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it.
      length: gradients that the polynomial is fitted to.
      order: its degree.

    Returns:
      An optax transformation with `ForecastGradientsState`.

    Raises:
      ValueError: for a bad delay, or rules that do not fit the parameters, and fewer gradients than coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> link, seen = forecast_gradients(tau=3), []
      >>> state = link.init(jnp.array(0.0))
      >>> for g in (0.0, 1.0, 4.0, 9.0, 16.0):  # t^2: exact as soon as three are there
      ...     forecast, state = link.update(jnp.array(g), state)
      ...     seen.append(round(float(forecast), 2))
      >>> seen
      [0.0, 4.0, 25.0, 36.0, 49.0]

    Source: Ajanthan et al. (ICML 2025), arXiv:2505.01099, official code's baseline [ajanthan2025nesterov].
    """
    tau = delays.checked_delays(tau)
    forecast_weights(0, length, order)

    def init(params: PyTree) -> ForecastGradientsState:
        depths = [length if delay else 0 for delay in delays.delay_of_each_leaf(params, tau)]
        return ForecastGradientsState(jnp.zeros((), jnp.int32), delays.rings(params, depths, jnp.zeros_like))

    def update(
        updates: PyTree, state: ForecastGradientsState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ForecastGradientsState]:
        del params, extra_args
        t = state.count
        age = (t - jnp.arange(length, dtype=jnp.int32)) % length  # of the gradient in each slot
        write = lambda g, ring: None if ring is None else delays.write_slot(ring, g, t % length)
        history = delays.map_with_history(write, updates, state.history)

        def forecast(g: jax.Array, ring: jax.Array | None, delay: int) -> jax.Array:
            if ring is None:
                return g
            dtype = jnp.float64 if ring.dtype == jnp.float64 else jnp.float32
            weights = jnp.asarray(forecast_weights(delay, length, order), dtype)[jnp.minimum(t, length - 1)][age]
            terms = weights.reshape(length, *(1,) * g.ndim) * ring.astype(dtype)
            return jnp.sum(terms, axis=0).astype(g.dtype)

        leaves, structure = jax.tree.flatten(updates)
        rings = structure.flatten_up_to(history)
        made = map(forecast, leaves, rings, delays.delay_of_each_leaf(updates, tau))
        return structure.unflatten(made), ForecastGradientsState(optax.safe_increment(t), history)

    return optax.GradientTransformationExtraArgs(init, update)


def discrepancy_correction(tau: Tau, decay: float = math.exp(-2)) -> optax.GradientTransformationExtraArgs:
    r"""Estimates the weights of the forward pass for a backward pass without stash: $w_t - \tau \delta_t$.

    delta is an average of the increments, $\delta_{t+1} = D^{1/\tau} \delta_t + (1 - D^{1/\tau}) (w_{t+1} - w_t)$. The
    link passes updates on and must be the last of the chain, where they are the increments; `discrepancy_corrected`
    gives the weights. Here tau is the forward delay minus the backward delay.

    Args:
      tau: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it.
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
    tau = delays.checked_delays(tau)
    if not 0 < decay < 1:
        raise ValueError(f"decay must lie in (0, 1), got {decay}")

    def init(params: PyTree) -> DiscrepancyCorrectionState:
        leaves, structure = jax.tree.flatten(params)
        each = zip(leaves, delays.delay_of_each_leaf(params, tau), strict=True)
        return DiscrepancyCorrectionState(
            structure.unflatten([jnp.zeros_like(p) if delay else None for p, delay in each])
        )

    def update(
        updates: PyTree, state: DiscrepancyCorrectionState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, DiscrepancyCorrectionState]:
        del params, extra_args

        def average(u: jax.Array, shift: jax.Array | None, delay: int) -> jax.Array | None:
            if shift is None:
                return None
            keep = decay ** (1 / delay)
            return keep * shift + (1 - keep) * delay * u.astype(shift.dtype)

        leaves, structure = jax.tree.flatten(updates)
        shifts = map(average, leaves, structure.flatten_up_to(state.shift), delays.delay_of_each_leaf(updates, tau))
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
    tau: Tau,
    anneal_steps: int | jax.Array = 7000,
    decay: float = math.exp(-2),
) -> optax.GradientTransformationExtraArgs:
    """PipeMare around any optimizer: the learning-rate correction, and the average for the discrepancy correction.

    Its pipeline keeps no stash: forward at the weights of the forward pass (`stale_params`), backward at
    `discrepancy_corrected(opt_state, params)`; `mixed_versions` runs a stage that way.

    Args:
      inner: the optimizer with its weight decay and learning rate.
      tau: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it.
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
    tau: Tau,
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
      tau: the delay of all parameters, or (regex, delay) rules, as `keep_param_history` takes it.
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
    tau = delays.checked_delays(tau)
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
