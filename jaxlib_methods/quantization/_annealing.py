"""The inverse temperature: its schedule, its place in the optimizer state, and what all annealed rules share.

A rule keeps `AnnealingState(count, beta)`; beta is that of the step to come, so the forward pass reads it there and the
rule uses the same number for its Jacobian.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods import trees
from jaxlib_methods.quantization import _projections
from jaxlib_methods.quantization._lattice import Lattice, map_leaves
from jaxlib_methods.quantization._projections import Labels, lift
from jaxlib_methods.typing import PyTree

LeafRule = Callable[[Labels, jax.Array, jax.Array, jax.Array], jax.Array]  # labels, params, update, beta -> update


class AnnealingState(NamedTuple):
    """State of the rules with an inverse temperature."""

    count: jax.Array  # int32 []: updates done
    beta: jax.Array  # float32 []: inverse temperature of the next forward pass and of its update


def inverse_temperature_schedule(
    rho: float | int, every: int, *, initial: float | int = 1.0, maximum: float | int = 1e4
) -> Callable[[jax.Array], jax.Array]:
    r"""Geometric growth with a cap, $\beta_t = \min(\beta_0 \rho^{\lceil t / \mathrm{every} \rceil}, \beta_{\max})$.

    The first growth comes after the very first step, as in the authors' code.

    Args:
      rho: growth factor >= 1.
      every: steps between growths, >= 1.
      initial: beta_0 > 0.
      maximum: the cap; the papers' are 1e4 for proximal mean-field and 1e35 for mirror descent.

    Returns:
      A schedule: update count -> beta, float32.

    Raises:
      ValueError: a factor below 1 (beta must not fall), or another argument out of range.

    Example:
      >>> beta = inverse_temperature_schedule(2.0, 10, maximum=100.0)
      >>> [float(beta(t)) for t in (0, 1, 10, 11, 1000)]
      [1.0, 2.0, 2.0, 4.0, 100.0]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, Algorithm 1 [ajanthan2019proximal].
    """
    if not rho >= 1:
        raise ValueError(f"rho must be at least 1, got {rho}: the inverse temperature must not fall")
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    if not 0 < initial <= maximum <= float(np.finfo(np.float32).max):
        raise ValueError(f"0 < initial <= maximum must hold within float32, got {initial} and {maximum}")

    def schedule(count: jax.Array | int) -> jax.Array:
        whole, rest = jnp.divmod(jnp.asarray(count).astype(jnp.int32), jnp.int32(every))
        growths = (whole + (rest > 0).astype(jnp.int32)).astype(jnp.float32)
        # In logarithms: rho^growths overflows long before the last step.
        log = jnp.minimum(growths * jnp.float32(np.log(rho)), jnp.float32(np.log(maximum / initial)))
        return jnp.minimum(jnp.float32(initial) * jnp.exp(log), jnp.float32(maximum))

    return schedule


def inverse_temperature(opt_state: PyTree) -> jax.Array:
    """Reads beta for the next forward pass out of an optimizer's state, however nested.

    Args:
      opt_state: the state of one of this package's annealed optimizers.

    Returns:
      beta, float32 [].

    Raises:
      ValueError: there is no annealed rule in the state, or there are several.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlib_methods.quantization import Lattice, proximal_mean_field
      >>> optimizer = proximal_mean_field(1e-3, Lattice(), beta=inverse_temperature_schedule(1.5, 1))
      >>> aux = jnp.zeros((2, 3))
      >>> state = optimizer.init(aux)
      >>> _, state = optimizer.update(jnp.ones(3), state, aux)
      >>> float(inverse_temperature(state))
      1.5
    """
    found = trees.find_states(opt_state, AnnealingState)
    if len(found) != 1:
        raise ValueError(
            f"the state holds {len(found)} inverse temperatures, one is needed; the methods 'icm', 'straight_through' "
            "and 'binary_connect' have none, and with several rules read AnnealingState by trees.find_states"
        )
    return found[0].beta


# ---------------------------------------------------------------------------------------------- shared by the rules


def check_beta(beta: Any) -> None:
    """Raises ValueError for a constant that is not positive, and for a schedule that falls on sampled counts."""
    if not callable(beta):
        if not isinstance(beta, jax.core.Tracer) and not 0 < float(beta) < np.inf:
            raise ValueError(f"beta must be positive and finite, got {beta}")
        return
    counts = [0, 1, 2, 3, 5, *(10**power * digit for power in range(1, 8) for digit in (1, 2, 5))]
    with jax.ensure_compile_time_eval():  # also where a factory is called inside jit
        values = [float(beta(jnp.int32(count))) for count in counts]
    for (earlier, low), (later, high) in itertools.pairwise(zip(counts, values, strict=True)):
        if not 0 < low <= high:
            raise ValueError(
                f"beta must be a schedule that is positive and never falls, got {low} at step {earlier} and {high} at "
                f"step {later}"
            )


def check_projection(method: str, lattice: Lattice, *allowed: str) -> None:
    """Raises ValueError where the method is not defined for the lattice's projection."""
    if lattice.projection not in allowed:
        needed = " or ".join(f"projection={name!r}" for name in allowed)
        raise ValueError(f"{method} needs a lattice with {needed}, got {lattice.projection!r}")


def rule(
    method: str, lattice: Lattice, of_leaf: LeafRule, *, beta: Any = None
) -> optax.GradientTransformationExtraArgs:
    """The transformation of every quantized leaf by `of_leaf`; without a temperature beta is 1, and there is no state.

    Raises ValueError where a lifted leaf lacks its axis of labels, and where `update` is called without parameters.
    """
    at = lambda count: AnnealingState(count, _at(beta, count))

    def init(params: PyTree) -> Any:
        map_leaves(lambda labels, x: x, lattice, params)
        return optax.EmptyState() if beta is None else at(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(f"{method} needs params; call update(updates, state, params)")
        temperature = jnp.float32(1) if beta is None else state.beta
        changed = lambda labels, x, g: of_leaf(labels, x, g, temperature)
        updates = map_leaves(changed, lattice, params, updates)
        return updates, state if beta is None else at(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _at(beta: Any, count: jax.Array) -> jax.Array:
    value = jnp.asarray(beta(count) if callable(beta) else beta).astype(jnp.float32)
    return jnp.minimum(value, jnp.finfo(jnp.float32).max)  # infinity times no difference would be NaN


def pull_back(
    lattice: Lattice, jacobian: str, labels: Labels, x: jax.Array, g: jax.Array, beta: jax.Array
) -> jax.Array:
    """The gradient with respect to a leaf's auxiliary variables from that with respect to w or u."""
    return _projections.pull_back(lattice.projection, jacobian, labels, x, beta, lifted(lattice, labels, x, g))


def lifted(lattice: Lattice, labels: Labels, x: jax.Array, g: jax.Array) -> jax.Array:
    """The gradient with respect to u from that with respect to w; what is one already stays."""
    if lattice.lifted and g.shape == x.shape[1:]:
        return lift(labels, g)
    if g.shape != x.shape:
        raise ValueError(
            f"gradients must have the shape of the auxiliary variables {x.shape} or of the projected weights, "
            f"got {g.shape}"
        )
    return g


def with_adam(
    scale_by_rule: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a rule: an L2 term, added before Adam as in the authors' code, Adam, and the learning rate."""
    return optax.chain(
        scale_by_rule,
        optax.add_decayed_weights(weight_decay),
        adam(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam(
    b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Adam's moments; optax's own needs implicit promotion of its counter, which strict users have switched off."""
    inner = optax.with_extra_args_support(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> tuple[PyTree, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
