"""Parameters as stacks of tall matrices, after optax's `MuonDimensionNumbers`: equal shapes together, over a mesh."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from jaxlib_methods import trees
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods._core.linalg import transpose
from jaxlib_methods.typing import PyTree


class Stack(NamedTuple):
    """How one parameter is a stack of matrices (batch, m, n) with m >= n."""

    axes: tuple[int, ...]  # of the parameter, in the order batch, reduction, output
    sizes: tuple[int, ...]  # of those axes
    batch: int
    fan_in: int
    fan_out: int

    @property
    def tall(self) -> tuple[int, int]:
        return max(self.fan_in, self.fan_out), min(self.fan_in, self.fan_out)

    def pack(self, x: jax.Array) -> jax.Array:
        X = x.transpose(self.axes).reshape(self.batch, self.fan_in, self.fan_out)
        return transpose(X) if self.fan_in < self.fan_out else X

    def unpack(self, X: jax.Array) -> jax.Array:
        x = (transpose(X) if self.fan_in < self.fan_out else X).reshape(self.sizes)
        return x.transpose(sorted(range(len(self.axes)), key=self.axes.__getitem__))


def _is_dimension_numbers(node: Any) -> bool:
    return isinstance(node, MuonDimensionNumbers)


def _is_spec(node: Any) -> bool:
    return node is None or _is_dimension_numbers(node) or isinstance(node, optax.MaskedNode)


def resolve(dimension_numbers: PyTree | Callable | None, params: PyTree) -> PyTree:
    """Dimension numbers, or None, at every leaf of params; a spec may stand for a whole subtree."""
    if callable(dimension_numbers) and not _is_dimension_numbers(dimension_numbers):
        dimension_numbers = dimension_numbers(params)
    return jax.tree.map(
        lambda spec, subtree: jax.tree.map(lambda _: Boxed(spec), subtree), dimension_numbers, params, is_leaf=_is_spec
    )


class Boxed:
    """Keeps a None from being an empty subtree."""

    def __init__(self, spec: MuonDimensionNumbers | None):
        self.spec = spec


def stacks_of(params: PyTree, dimension_numbers: PyTree | Callable | None) -> list[Stack]:
    """One for each leaf; raises where a leaf is not a matrix."""
    specs = [box.spec for box in jax.tree.leaves(resolve(dimension_numbers, params))]
    names = jax.tree.leaves(trees.path_names(params))
    leaves = jax.tree.leaves(params)
    return [_stack(name, leaf.shape, spec) for name, leaf, spec in zip(names, leaves, specs, strict=True)]


def _stack(name: str, shape: tuple[int, ...], spec: MuonDimensionNumbers | None) -> Stack:
    if spec is None and len(shape) != 2:
        raise ValueError(
            f"NuMuon is defined for matrices, got the shape {shape} at {name!r}; give vectors and scalars to another "
            "optimizer (numuon gives them to AdamW), and more than two axes a MuonDimensionNumbers in "
            "weight_dimension_numbers"
        )
    spec = spec or MuonDimensionNumbers()
    as_tuple = lambda axes: (axes,) if isinstance(axes, int) else tuple(axes)
    reduction, output = as_tuple(spec.reduction_axis), as_tuple(spec.output_axis)
    rank = len(shape)
    used = [axis % rank if -rank <= axis < rank else axis for axis in (*reduction, *output)]
    if len(shape) < 2 or len(set(used)) < len(used) or not set(used) <= set(range(rank)) or not (reduction and output):
        raise ValueError(
            f"{spec} does not name different axes of the shape {shape} at {name!r} for reduction and for output"
        )
    reduction, output = tuple(used[: len(reduction)]), tuple(used[len(reduction) :])
    batch = tuple(axis for axis in range(rank) if axis not in used)
    size = lambda axes: math.prod(shape[axis] for axis in axes)
    axes = batch + reduction + output
    return Stack(axes, tuple(shape[a] for a in axes), size(batch), size(reduction), size(output))


def equal_shapes(leaves: Sequence[Any], stacks: Sequence[Stack]) -> dict[tuple, list[int]]:
    """Indices of the leaves whose matrices have the same shape up to transposition, and the same type to compute in."""
    groups: dict[tuple, list[int]] = {}
    for index, (leaf, stack) in enumerate(zip(leaves, stacks, strict=True)):
        groups.setdefault((*stack.tall, jnp.dtype(compute_dtype(leaf.dtype))), []).append(index)
    return groups


def _constrain(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return (jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint)(x, sharding)


def whole(x: jax.Array) -> jax.Array:
    """A matrix is decomposed as a whole: one that is split over an explicit mesh is gathered."""
    sharding = jax.typeof(x).sharding
    if all(part is None for part in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def sharded_like(D: jax.Array, M: jax.Array) -> jax.Array:
    """D with the sharding of M. An elementwise operation between the two makes XLA choose it where axes are Auto."""
    sharding = jax.typeof(M).sharding
    D = D if jax.typeof(D).sharding == sharding else jax.sharding.reshard(D, sharding)
    return jnp.where(jnp.isfinite(M), D, M)


def place(x: jax.Array, mesh: jax.sharding.Mesh | None, axis_name: str) -> jax.Array:
    return x if mesh is None else jax.device_put(x, NamedSharding(mesh, PartitionSpec(axis_name)))


def distributed(one_group: Callable, mesh: jax.sharding.Mesh | None, axis_name: str) -> Callable:
    """The same function, with the matrices of its leading axis shared out over the mesh, and the steps gathered."""
    if mesh is None:
        return one_group
    split, everywhere = PartitionSpec(axis_name), PartitionSpec()

    def run(X: jax.Array, basis: jax.Array | None, noise: jax.Array | None, r: jax.Array) -> tuple[jax.Array, Any]:
        share_out = lambda tree: jax.tree.map(lambda x: _constrain(x, NamedSharding(mesh, split)), tree)
        D, basis = jax.shard_map(
            one_group, mesh=mesh, in_specs=(split, split, split, everywhere), out_specs=(split, split)
        )(*share_out((X, basis, noise)), r)
        return _constrain(D, NamedSharding(mesh, everywhere)), basis

    return run
