"""Masks: applied to parameters, carried in optimizer states, packed into bits.

A tree of masks looks like the parameters: boolean arrays, True where a connection is kept, and `None` where a parameter
is never pruned. Masks only simulate sparsity: a masked network costs as much as a dense one.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods.typing import PyTree

__all__ = [
    "MaskState",
    "PrunedState",
    "apply_masks",
    "mask_updates",
    "pack_masks",
    "pruned",
    "unpack_masks",
]


class MaskState(NamedTuple):
    """State of `mask_updates`."""

    masks: PyTree  # bool like the parameters, or uint8 [ceil(size / 8)] where packed; None: never pruned


class PrunedState(NamedTuple):
    """State of `pruned`."""

    masks: PyTree  # bool like the parameters, or uint8 [ceil(size / 8)] where packed; None: never pruned
    inner_state: PyTree  # of the inner transformation; its moments are 0 wherever the mask is False


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    r"""Sets pruned entries to zero: $c \odot w$.

    Args:
      params: any pytree of arrays.
      masks: boolean arrays with the structure and shapes of `params`; `None` leaves the parameter as it is.

    Returns:
      A tree like `params`. Pruned entries are exactly 0, also where they were not finite.

    Raises:
      ValueError: if the trees or the shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> masks = {"kernel": jnp.array([True, False]), "scale": None}
      >>> apply_masks({"kernel": jnp.array([2.0, 3.0]), "scale": jnp.array([4.0])}, masks)
      {'kernel': Array([2., 0.], dtype=float32), 'scale': Array([4.], dtype=float32)}
    """
    _check_masks(masks, params)
    return _where(masks, params)


def pack_masks(masks: PyTree) -> PyTree:
    """Packs boolean masks into bits, eight to a byte: 1/32 of float32 parameters.

    Args:
      masks: tree of boolean arrays, or `None` leaves.

    Returns:
      A tree of uint8 arrays of shape (ceil(size / 8),).

    Example:
      >>> import jax.numpy as jnp
      >>> pack_masks(jnp.array([[True, False], [True, True]])).tolist()
      [176]
    """
    return jax.tree.map(lambda mask: jnp.packbits(mask.reshape(-1)), masks)


def unpack_masks(packed: PyTree, like: PyTree) -> PyTree:
    """Undoes `pack_masks`.

    Args:
      packed: what `pack_masks` returned.
      like: arrays or shapes (`jax.ShapeDtypeStruct`) with the shapes of the masks, such as the parameters.

    Returns:
      A tree of boolean arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack_masks(jnp.array([176], jnp.uint8), like=jnp.zeros((2, 2))).tolist()
      [[True, False], [True, True]]
    """

    def unpack(bits: jax.Array | None, leaf: Any) -> jax.Array | None:
        if bits is None:
            return None
        return jnp.unpackbits(bits, count=math.prod(leaf.shape)).reshape(leaf.shape).astype(bool)

    return jax.tree.map(unpack, packed, like, is_leaf=_is_none)


def mask_updates(
    masks: PyTree | Callable[[PyTree], PyTree], *, packed: bool = False
) -> optax.GradientTransformationExtraArgs:
    """A link for `optax.chain` that zeroes the updates of pruned entries; its state carries the masks.

    Placed last it keeps pruned entries where they are. Moments that links before it keep are not masked: use `pruned`
    for that.

    Args:
      masks: boolean arrays like the parameters, `None` where a parameter is never pruned, or a function of the
        parameters that returns them, called by `init`.
      packed: keep the masks as bits, 1/8 of a boolean; unpacking costs one pass over them per update.

    Returns:
      An optax transformation with `MaskState`.

    Raises:
      ValueError: by `init`, if the masks do not match the parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(optax.sgd(1.0), mask_updates({"w": jnp.array([True, False])}))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> optimizer.update({"w": jnp.array([1.0, 1.0])}, optimizer.init(params), params)[0]["w"].tolist()
      [-1.0, 0.0]
    """

    def init(params: PyTree) -> MaskState:
        return MaskState(_initial_masks(masks, params, packed))

    def update(
        updates: PyTree, state: MaskState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, MaskState]:
        del params, extra_args
        return _where(_unpacked(state.masks, updates, packed), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def pruned(
    inner: optax.GradientTransformation, masks: PyTree | Callable[[PyTree], PyTree], *, packed: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Trains $w$ under $c \odot w$: masks the gradients before `inner` and the updates after it.

    With parameters that were masked by `apply_masks`, pruned entries stay exactly 0 under momentum and weight decay,
    and every moment that `inner` keeps of them stays exactly 0, as if they were not there. To change the masks, replace
    them in the state: `state._replace(masks=...)`; nothing is recompiled.

    Args:
      inner: any optax transformation, with its weight decay and learning rate.
      masks: boolean arrays like the parameters, `None` where a parameter is never pruned, or a function of the
        parameters that returns them, called by `init`.
      packed: keep the masks as bits, 1/8 of a boolean; unpacking costs one pass over them per update.

    Returns:
      An optax transformation with `PrunedState`; extra arguments go to `inner`.

    Raises:
      ValueError: by `init`, if the masks do not match the parameters.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> masks = {"w": jnp.array([True, False])}
      >>> optimizer = pruned(optax.sgd(0.5, momentum=0.9), masks)
      >>> params = apply_masks({"w": jnp.array([1.0, 2.0])}, masks)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update({"w": jnp.array([1.0, 1.0])}, state, params)
      >>> optax.apply_updates(params, updates)["w"]
      Array([0.5, 0. ], dtype=float32)

    Source: Lee, Ajanthan, Torr (ICLR 2019), arXiv:1810.02340, Algorithm 1 [lee2019snip].
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> PrunedState:
        return PrunedState(_initial_masks(masks, params, packed), inner.init(params))

    def update(
        updates: PyTree, state: PrunedState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PrunedState]:
        kept = _unpacked(state.masks, updates, packed)
        updates, inner_state = inner.update(_where(kept, updates), state.inner_state, params, **extra_args)
        return _where(kept, updates), PrunedState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_none(node: Any) -> bool:
    return node is None


def _where(masks: PyTree, values: PyTree) -> PyTree:
    keep = lambda mask, value: (
        value if mask is None else jnp.where(_sharded_like(mask, value), value, jnp.zeros_like(value))
    )
    return jax.tree.map(keep, masks, values, is_leaf=_is_none)


def _sharded_like(mask: jax.Array, value: jax.Array) -> jax.Array:
    """On a mesh with explicit axes the mask takes the value's sharding; elsewhere XLA removes the operation."""
    return jnp.logical_and(mask, jnp.ones_like(value, dtype=bool))


def _unpacked(masks: PyTree, like: PyTree, packed: bool) -> PyTree:
    return unpack_masks(masks, like) if packed else masks


def _initial_masks(masks: PyTree | Callable[[PyTree], PyTree], params: PyTree, packed: bool) -> PyTree:
    if not jax.tree.leaves(params):  # optax.tree_utils.tree_map_params asks which parts of a state are like params
        return pack_masks(masks) if packed and not callable(masks) else params
    masks = masks(params) if callable(masks) else masks
    _check_masks(masks, params)
    if packed:
        return pack_masks(masks)
    place = lambda mask, param: None if mask is None else _sharded_like(jnp.asarray(mask), param)
    return jax.tree.map(place, masks, params, is_leaf=_is_none)


def _check_masks(masks: PyTree, params: PyTree) -> None:
    """Structure, shapes and types; all static, so it also runs inside jit."""

    def check(path: Any, mask: Any, param: Any) -> None:
        if mask is None:
            return
        if not hasattr(mask, "dtype") or mask.dtype != np.bool_ or mask.shape != np.shape(param):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            got = f"{mask.dtype}{list(mask.shape)}" if hasattr(mask, "dtype") else repr(mask)
            raise ValueError(
                f"masks must hold booleans with the shapes of the parameters; at {name!r} the parameter has the shape "
                f"{np.shape(param)} and the mask is {got}; use prune_masks, or None where nothing is pruned"
            )

    leaf_or_none = jax.tree.map(lambda _: 0, masks, is_leaf=_is_none)
    try:
        aligned = jax.tree.map(lambda _, subtree: subtree, leaf_or_none, params, is_leaf=_is_none)
    except ValueError as error:
        raise ValueError(
            f"masks must be a tree like the parameters, with None where nothing is pruned: {error}"
        ) from error
    jax.tree_util.tree_map_with_path(check, masks, aligned, is_leaf=_is_none)
