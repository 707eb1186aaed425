"""Which parameter is how late, and the ring buffers that keep what is late."""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods import trees
from jaxlib_methods.typing import PyTree

Delay = Any  # int: one delay for all parameters; Sequence[tuple[str, int]]: by the first regex found in the path


def checked_delays(delay: Delay) -> Delay:
    """The delays, checked; what needs the parameters is checked by `delay_of_each_leaf`."""
    if isinstance(delay, str) or not isinstance(delay, Sequence):
        return _checked_delay(delay)
    return tuple((pattern, _checked_delay(tau)) for pattern, tau in delay)


def checked_or_traced(delay: Delay | jax.Array) -> Delay | jax.Array:
    """`checked_delays`, which lets an integer scalar array through."""
    if not isinstance(delay, jax.Array):
        return checked_delays(delay)
    if delay.ndim or not jnp.issubdtype(delay.dtype, jnp.integer):
        raise ValueError(f"delay as an array must be an integer scalar, got {delay.dtype}{list(delay.shape)}")
    return delay


def _checked_delay(delay: Any) -> int:
    whole = hasattr(delay, "__index__") and not isinstance(delay, bool)  # also NumPy's integers
    if not whole or operator.index(delay) < 0:
        raise ValueError(f"delay must be a whole number of updates, 0 or more, got {delay!r}")
    return operator.index(delay)


def delay_of_each_leaf(params: PyTree, delay: Delay | jax.Array) -> list[Any]:
    """The delays in the order of `jax.tree.leaves`."""
    delay = checked_or_traced(delay)
    if isinstance(delay, int | jax.Array):
        return [delay] * len(jax.tree.leaves(params))
    return jax.tree.leaves(label_leaves(params, delay))


def label_leaves(params: PyTree, rules: Sequence[tuple[str, Hashable]]) -> PyTree:
    """`trees.label_tree`, but for the tree without leaves with which optax.tree_utils initialises."""
    return trees.label_tree(params, rules) if jax.tree.leaves(params) else params


def map_with_history(function: Callable[..., Any], tree: PyTree, *others: PyTree) -> PyTree:
    """`jax.tree.map` where the other trees may hold None at a leaf of the first, and the result too."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(map(function, leaves, *map(structure.flatten_up_to, others)))


def read_slot(ring: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ring, slot, 0, keepdims=False)


def write_slot(ring: jax.Array, leaf: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(ring, leaf.astype(ring.dtype), slot, 0)


def rings(params: PyTree, depths: list[int], start: Callable[[jax.Array], jax.Array]) -> PyTree:
    leaves, structure = jax.tree.flatten(params)
    repeat = lambda leaf, depth: jnp.broadcast_to(start(leaf), (depth, *leaf.shape)) if depth else None
    return structure.unflatten(map(repeat, leaves, depths))
