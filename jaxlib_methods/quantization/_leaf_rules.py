"""What all rules share: a transformation of every quantized leaf, and the gradients of its auxiliary variables."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods.quantization._projection_maps import lift, pull_back
from jaxlib_methods.quantization.annealing import (
    AnnealingState,
    InverseTemperature,
    check_annealed,
    inverse_temperature_at,
)
from jaxlib_methods.quantization.labels import Labels
from jaxlib_methods.quantization.lattice import Lattice, map_leaves
from jaxlib_methods.typing import PyTree

LeafRule = Callable[[Labels, jax.Array, jax.Array, jax.Array], jax.Array]  # labels, params, update, beta -> update


def change_leaves(
    method: str,
    lattice: Lattice,
    change: LeafRule,
    *,
    projections: tuple[str, ...] = (),
    inverse_temperature: InverseTemperature | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Changes the update of every quantized leaf; without an inverse temperature beta is 1, and there is no state.

    Args:
      method: its name in errors.
      lattice: what is quantized.
      change: (labels, params, update, beta) -> update, leaf by leaf.
      projections: that the method is defined for; none: all.
      inverse_temperature: a schedule or a constant.

    Raises:
      ValueError: another projection, an inverse temperature that is not positive or falls; by `init` and `update`, a
        lifted leaf without its axis of labels; by `update`, missing params.
    """
    if projections and lattice.projection not in projections:
        needed = " or ".join(f"projection={name!r}" for name in projections)
        raise ValueError(f"{method} needs a lattice with {needed}, got {lattice.projection!r}")
    constant = inverse_temperature is None
    if not constant:
        check_annealed(inverse_temperature)
    at = lambda count: AnnealingState(count, inverse_temperature_at(inverse_temperature, count))

    def init(params: PyTree) -> Any:
        map_leaves(lambda labels, x: x, lattice, params)
        return optax.EmptyState() if constant else at(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(f"{method} needs params; call update(updates, state, params)")
        beta = jnp.float32(1) if constant else state.inverse_temperature
        updates = map_leaves(lambda labels, x, g: change(labels, x, g, beta), lattice, params, updates)
        return updates, state if constant else at(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def pulled_back(
    lattice: Lattice, jacobian: str, labels: Labels, x: jax.Array, g: jax.Array, beta: jax.Array
) -> jax.Array:
    """The gradient with respect to a leaf's auxiliary variables from that with respect to w or u."""
    return pull_back(lattice.projection, jacobian, labels, x, beta, lifted(lattice, labels, x, g))


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
