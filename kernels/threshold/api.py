"""The largest scores of a whole pytree as boolean masks: validation, canonical form, choice of an implementation."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlib_methods.kernels._dispatch import Kernel
from jaxlib_methods.kernels.threshold.reference import Leaves
from jaxlib_methods.typing import Implementation, PyTree

# There is no Pallas body: the counting passes are fused reads already.
KERNEL = Kernel("threshold", ("xla",))


def keep_largest(
    scores: PyTree, num_keep: PyTree, *, specs: PyTree | None = None, implementation: Implementation | None = None
) -> PyTree:
    r"""Masks exactly the $\kappa$ largest entries of a tree of scores; among equal scores the lower flat index wins.

    The flat index runs over the leaves in the order of `jax.tree.leaves`, row-major within a leaf. The scores are never
    sorted, concatenated, reshaped or copied: see `reference.py`. $\kappa$ may be traced, so one compilation serves all
    sparsities. Scores on a mesh are counted where they lie, under `jax.jit` with any sharding (automatic or explicit
    axes), and inside `jax.shard_map` when `specs` is given; the masks equal those of a single device.

    Args:
      scores: pytree of floats (float16, bfloat16, float32, float64; mixed dtypes are compared in their common one).
        Signed scores are ordered as numbers, -0 = +0. `None` leaves stay `None`.
      num_keep: how many to keep, $\kappa$. An integer or an integer scalar array: of all leaves together. A tree of
        those with the structure of `scores`: of each leaf by itself. A traced value is clipped to the possible range.
      specs: inside `jax.shard_map` only: the leaves' `PartitionSpec`s, as in its `in_specs`: one for all leaves, or a
        tree prefix. A leaf counts once, however many devices hold a replica of it.
      implementation: None or "xla". There is no Pallas body: the counting passes are fused reads already.

    Returns:
      A tree like `scores` of boolean arrays with exactly `num_keep` True entries.

    Raises:
      ValueError: scores that are not floats, `num_keep` outside [0, number of scores] or of another structure, and NaN
        scores. NaNs are only seen outside a trace; inside one they order beyond the infinities by their sign, and the
        count stays exact.
      NotImplementedError: for an implementation that does not exist.

    Example:
      >>> masks = keep_largest({"a": jnp.array([3.0, 1.0]), "b": jnp.array([[1.0, 2.0]])}, 3)
      >>> masks["a"].tolist(), masks["b"].tolist()  # the tie between a[1] and b[0, 0] goes to the former
      ([True, True], [[False, True]])
      >>> keep_largest([jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])], [1, 1])
      [Array([ True, False], dtype=bool), Array([False,  True], dtype=bool)]
    """
    leaves, treedef = jax.tree.flatten(scores)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    for (path, _), leaf in zip(jax.tree.leaves_with_path(scores), leaves, strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.finfo(leaf.dtype).bits < 16:
            raise ValueError(
                f"scores{jax.tree_util.keystr(path)} must be float16, bfloat16, float32 or float64, got {leaf.dtype}; "
                "convert it with .astype(jnp.float32)"
            )
    shapes = tuple(leaf.shape for leaf in leaves)
    axes = _axes(scores, shapes, specs)
    whole = jax.tree.structure(num_keep) == jax.tree.structure(0)
    groups = (0,) * len(leaves) if whole else tuple(range(len(leaves)))
    layout = Leaves(groups, 1 if whole else len(leaves), axes, shapes)
    sizes = layout.sizes()
    dtype = _count_dtype(sum(sizes))
    if whole:
        counts = [_count("num_keep", num_keep, sum(sizes), dtype)]
    else:
        if jax.tree.structure(num_keep) != treedef:
            raise ValueError(
                f"num_keep must be one integer or a tree like scores, {treedef}, got {jax.tree.structure(num_keep)}"
            )
        counts = [
            _count(f"num_keep{jax.tree_util.keystr(path)}", value, size, dtype)
            for (path, value), size in zip(jax.tree.leaves_with_path(num_keep), sizes, strict=True)
        ]
    if not leaves:
        return scores
    masks, has_nan = _keep_largest(tuple(leaves), jnp.stack(counts), layout, implementation)
    if not isinstance(has_nan, jax.core.Tracer) and bool(has_nan):
        bad = [
            f"scores{jax.tree_util.keystr(path)}"
            for (path, _), leaf in zip(jax.tree.leaves_with_path(scores), leaves, strict=True)
            if bool(jnp.isnan(leaf).any())
        ]
        raise ValueError(
            f"{', '.join(bad)} contains NaN; a NaN has no rank: look for the loss, the batch or the initialisation "
            "that made it"
        )
    return jax.tree.unflatten(treedef, masks)


def num_scores(scores: PyTree, *, specs: PyTree | None = None) -> PyTree:
    """Number of entries of every whole leaf, also inside `jax.shard_map`, where a device sees a part of it.

    Args:
      scores: pytree of arrays or shapes.
      specs: as in `keep_largest`.

    Returns:
      A tree like `scores` of Python integers.

    Raises:
      ValueError: for `specs` that do not fit.

    Example:
      >>> num_scores({"kernel": jnp.ones((2, 3)), "scale": None})
      {'kernel': 6, 'scale': None}
    """
    leaves, treedef = jax.tree.flatten(scores)
    shapes = tuple(jnp.shape(leaf) for leaf in leaves)
    layout = Leaves((0,) * len(leaves), 1, _axes(scores, shapes, specs), shapes)
    return treedef.unflatten(layout.sizes())


@functools.partial(jax.jit, static_argnames=("layout", "implementation"))
def _keep_largest(
    leaves: tuple[jax.Array, ...], counts: jax.Array, layout: Leaves, implementation: Implementation | None
) -> tuple[list[jax.Array], jax.Array]:
    dtype = _common_dtype({leaf.dtype for leaf in leaves})
    return KERNEL.run("keep_largest", implementation, [leaf.astype(dtype) for leaf in leaves], counts, layout)


def _common_dtype(dtypes: set[Any]) -> Any:
    """The narrowest float dtype that holds the values of all: float16 and bfloat16 meet in float32."""
    widest = max(jnp.finfo(dtype).bits for dtype in dtypes)
    return dtypes.pop() if len(dtypes) == 1 else jnp.dtype(f"float{max(widest, 32)}")


def _count(name: str, value: Any, size: int, dtype: Any) -> jax.Array:
    """A count as a scalar of `dtype`; checked when it is known, clipped (by the implementation) when it is traced."""
    if not isinstance(value, jax.core.Tracer):
        try:
            value = operator.index(value)
        except TypeError:
            raise ValueError(f"{name} must be an integer, got {value!r}; round it first") from None
        if not 0 <= value <= size:
            raise ValueError(f"{name} must lie in [0, {size}], the number of scores, got {value}")
        return jnp.asarray(value, dtype)
    if value.ndim or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be an integer scalar, got {value.aval}")
    return value.astype(dtype)


def _count_dtype(size: int) -> Any:
    if size < jnp.iinfo(jnp.int32).max:
        return jnp.int32
    if jax.dtypes.canonicalize_dtype(jnp.int64) != jnp.int64:
        raise ValueError(f"{size} scores do not fit 32-bit counts; enable 64-bit integers with jax.enable_x64(True)")
    return jnp.int64


def _axes(
    scores: PyTree, shapes: tuple[tuple[int, ...], ...], specs: PyTree | None
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """The mesh axes of every dimension of every leaf."""
    if specs is None:
        return tuple(((),) * len(shape) for shape in shapes)
    is_spec = lambda node: isinstance(node, PartitionSpec)
    try:
        per_leaf = jax.tree.leaves(jax.tree.broadcast(specs, scores, is_leaf=is_spec), is_leaf=is_spec)
    except ValueError as error:
        raise ValueError(f"specs must be one PartitionSpec or a tree of them, a prefix of scores: {error}") from error
    axes = []
    for spec, shape in zip(per_leaf, shapes, strict=True):
        entries = [() if e is None else e if isinstance(e, tuple) else (e,) for e in spec]
        if len(entries) > len(shape):
            raise ValueError(f"specs holds {spec} for an array of shape {shape}: more entries than dimensions")
        axes.append(tuple(entries) + ((),) * (len(shape) - len(entries)))
    return tuple(axes)
