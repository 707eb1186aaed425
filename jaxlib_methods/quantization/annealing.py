"""The inverse temperature: its schedule, and its place in the optimizer's state.

A rule keeps `AnnealingState`, whose inverse temperature is that of the step to come: the forward pass reads it there,
and the rule uses the same number for its Jacobian.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.typing import PyTree

__all__ = ["AnnealingState", "inverse_temperature_schedule", "read_inverse_temperature"]

InverseTemperature = optax.ScalarOrSchedule | int


class AnnealingState(NamedTuple):
    """State of the rules with an inverse temperature."""

    count: jax.Array  # int32 []: updates done
    inverse_temperature: jax.Array  # float32 []: of the next forward pass and of its update


def inverse_temperature_schedule(
    growth: float | int, every: int, *, initial: float | int = 1.0, maximum: float | int = 1e4
) -> Callable[[jax.Array], jax.Array]:
    r"""Geometric growth with a cap, $\beta_t = \min(\beta_0 \rho^{\lceil t / \mathrm{every} \rceil}, \beta_{\max})$.

    The first growth comes after the very first step, as in the authors' code.

    Args:
      growth: rho, the factor >= 1.
      every: steps between growths, >= 1.
      initial: beta_0 > 0.
      maximum: the cap; the papers' are 1e4 for proximal mean-field and 1e35 for mirror descent.

    Returns:
      A schedule: update count -> inverse temperature, float32.

    Raises:
      ValueError: a factor below 1 (beta must not fall), or another argument out of range.

    Example:
      >>> beta = inverse_temperature_schedule(2.0, 10, maximum=100.0)
      >>> [float(beta(t)) for t in (0, 1, 10, 11, 1000)]
      [1.0, 2.0, 2.0, 4.0, 100.0]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, Algorithm 1 [ajanthan2019proximal].
    """
    checks.at_least(1, growth=growth, every=every, remedy="an inverse temperature must not fall")
    if not 0 < initial <= maximum <= float(np.finfo(np.float32).max):
        raise ValueError(f"0 < initial <= maximum must hold within float32, got {initial} and {maximum}")

    def schedule(count: jax.Array | int) -> jax.Array:
        whole, rest = jnp.divmod(jnp.asarray(count).astype(jnp.int32), jnp.int32(every))
        growths = (whole + (rest > 0).astype(jnp.int32)).astype(jnp.float32)
        # In logarithms: growth^growths overflows long before the last step.
        log = jnp.minimum(growths * jnp.float32(np.log(growth)), jnp.float32(np.log(maximum / initial)))
        return jnp.minimum(jnp.float32(initial) * jnp.exp(log), jnp.float32(maximum))

    return schedule


def read_inverse_temperature(opt_state: PyTree) -> jax.Array:
    """Reads the inverse temperature of the next forward pass out of an optimizer's state, however nested.

    Args:
      opt_state: the state of one of this package's annealed optimizers.

    Returns:
      A float32 [] array.

    Raises:
      ValueError: there is no annealed rule in the state, or there are several.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlib_methods.quantization import Lattice, proximal_mean_field
      >>> optimizer = proximal_mean_field(1e-3, Lattice(), inverse_temperature=inverse_temperature_schedule(1.5, 1))
      >>> aux = jnp.zeros((2, 3))
      >>> state = optimizer.init(aux)
      >>> _, state = optimizer.update(jnp.ones(3), state, aux)
      >>> float(read_inverse_temperature(state))
      1.5
    """
    found = trees.find_states(opt_state, AnnealingState)
    if len(found) != 1:
        raise ValueError(
            f"the state holds {len(found)} inverse temperatures, one is needed; the methods 'icm', 'straight_through' "
            "and 'binary_connect' have none, and with several rules read AnnealingState by trees.find_states"
        )
    return found[0].inverse_temperature


def check_annealed(inverse_temperature: InverseTemperature) -> None:
    """Raises ValueError for a constant that is not positive, and for a schedule that falls on sampled counts."""
    if not callable(inverse_temperature):
        checks.positive(inverse_temperature=inverse_temperature)
        checks.finite(inverse_temperature=inverse_temperature)
        return
    counts = [0, 1, 2, 3, 5, *(10**power * digit for power in range(1, 8) for digit in (1, 2, 5))]
    with jax.ensure_compile_time_eval():  # also where a factory is called inside jit
        values = [float(inverse_temperature(jnp.int32(count))) for count in counts]
    for (earlier, low), (later, high) in itertools.pairwise(zip(counts, values, strict=True)):
        if not 0 < low <= high:
            raise ValueError(
                f"inverse_temperature must be a schedule that is positive and never falls, got {low} at step {earlier} "
                f"and {high} at step {later}"
            )


def inverse_temperature_at(inverse_temperature: InverseTemperature, count: jax.Array) -> jax.Array:
    """Its value, float32 []."""
    value = jnp.asarray(inverse_temperature(count) if callable(inverse_temperature) else inverse_temperature).astype(
        jnp.float32
    )
    return jnp.minimum(value, jnp.finfo(jnp.float32).max)  # infinity times no difference would be NaN
