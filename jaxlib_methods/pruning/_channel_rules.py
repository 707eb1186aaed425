"""What each primitive does to the channels of its operands, as a table of rules by the primitive's name."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxlib_methods.pruning._channels import CONSTANT, SPATIAL, Axis, Channels, Product, Value


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _words(
    """abs add add_any and asin atan atan2 cbrt ceil clamp convert_element_type copy copy_p cos cosh div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or
    pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor"""
)
WINDOWS = _words("reduce_window reduce_window_max reduce_window_min reduce_window_sum")
_REDUCTIONS = _words("argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum")

_Rule = Callable[[Channels, Any, list[Value]], list[tuple[Axis, ...]]]
RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def opaque(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    for value in inputs:
        for axis in value.axes:
            channels.block(axis, f"they enter {eqn.primitive.name}, for which there is no rule")
    return [(SPATIAL,) * len(getattr(var.aval, "shape", ())) for var in eqn.outvars]


def _kept_or_blocked(channels: Channels, name: str, axis: Axis, kept: bool) -> Axis:
    """An axis that an operation leaves as it is, or one that it cuts, pads or mixes."""
    if kept or axis is None:
        return axis
    channels.block(axis, f"{name} works along their axis")
    return SPATIAL if isinstance(axis, np.ndarray) else axis


@_rule(*ELEMENTWISE)
def _elementwise(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    shape = eqn.outvars[0].aval.shape
    axes: list[Axis] = [None] * len(shape)
    for atom, value in zip(eqn.invars, inputs, strict=True):
        if len(value.axes) == len(shape):  # the others are scalars
            for d, axis in enumerate(value.axes):
                if atom.aval.shape[d] == shape[d]:
                    axes[d] = channels.unite(axes[d], axis, eqn.primitive.name)
    return [tuple(axes)]


@_rule("optimization_barrier", "sharding_constraint")
def _same(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    return [value.axes for value in inputs]


@_rule("iota")
def _iota(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    return [tuple(CONSTANT if d == eqn.params["dimension"] else None for d in range(len(eqn.params["shape"])))]


@_rule("broadcast_in_dim")
def _broadcast(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    axes: list[Axis] = [None] * len(eqn.params["shape"])
    for source, d in enumerate(eqn.params["broadcast_dimensions"]):
        if eqn.invars[0].aval.shape[source] == eqn.params["shape"][d]:
            axes[d] = inputs[0].axes[source]
    return [tuple(axes)]


@_rule("transpose")
def _transpose(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    return [tuple(inputs[0].axes[d] for d in eqn.params["permutation"])]


@_rule("squeeze")
def _squeeze(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    return [tuple(axis for d, axis in enumerate(inputs[0].axes) if d not in eqn.params["dimensions"])]


@_rule("rev")
def _rev(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    turned = lambda axis: axis[::-1] if isinstance(axis, np.ndarray) else axis
    return [tuple(turned(a) if d in eqn.params["dimensions"] else a for d, a in enumerate(inputs[0].axes))]


@_rule(*_REDUCTIONS)
def _reduce(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    reduced, size = eqn.params["axes"], eqn.invars[0].aval.shape
    for d in reduced:
        _kept_or_blocked(channels, eqn.primitive.name, inputs[0].axes[d], size[d] == 1)
    return [tuple(axis for d, axis in enumerate(inputs[0].axes) if d not in reduced)]


@_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    along = eqn.params["axis"]
    return [tuple(_kept_or_blocked(channels, eqn.primitive.name, a, d != along) for d, a in enumerate(inputs[0].axes))]


@_rule(*WINDOWS)
def _window(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    window = eqn.params["window_dimensions"]
    kept = [w == 1 and m == n for w, m, n in zip(window, before, after, strict=True)]
    axes = zip(inputs[0].axes, kept, strict=True)
    return [tuple(_kept_or_blocked(channels, eqn.primitive.name, axis, keep) for axis, keep in axes)]


@_rule("pad", "slice", "dynamic_slice", "split")
def _cut(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    before, name = eqn.invars[0].aval.shape, eqn.primitive.name
    return [
        tuple(
            _kept_or_blocked(channels, name, axis, m == n)
            for axis, m, n in zip(inputs[0].axes, before, var.aval.shape, strict=True)
        )
        for var in eqn.outvars
    ]


@_rule("gather")
def _gather(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    before = eqn.invars[0].aval.shape
    axes: list[Axis] = [SPATIAL] * len(eqn.outvars[0].aval.shape)
    left = [d for d in range(len(before)) if d not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    for d, axis in enumerate(inputs[0].axes):
        kept = _kept_or_blocked(channels, "gather", axis, d in left and sizes[d] == before[d])
        if d in left:
            axes[numbers.offset_dims[left.index(d)]] = kept
    for axis in inputs[1].axes:
        channels.block(axis, "they are indices of gather")
    return [tuple(axes)]


@_rule("concatenate")
def _concatenate(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    along = eqn.params["dimension"]
    axes: list[Axis] = []
    for d in range(len(eqn.outvars[0].aval.shape)):
        parts = [value.axes[d] for value in inputs]
        if d != along:
            axis = None
            for part in parts:
                axis = channels.unite(axis, part, "concatenate")
            axes.append(axis)
        elif any(isinstance(part, np.ndarray) for part in parts):
            strung = []
            for atom, part in zip(eqn.invars, parts, strict=True):
                if not isinstance(part, np.ndarray):
                    other, part = part or CONSTANT, channels.fresh(atom.aval.shape[d])
                    channels.block(part, other, "concatenate")
                strung.append(part)
            axes.append(np.concatenate(strung))
        else:
            axes.append(parts[0])
    return [tuple(axes)]


@_rule("reshape")
def _reshape(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    axes: list[Axis] = [None] * len(after)
    for old, new in _groups(before, after):
        parts = [inputs[0].axes[d] for d in old]
        held = [i for i, part in enumerate(parts) if isinstance(part, np.ndarray)]
        if len(old) == len(new) == 1:
            axes[new[0]] = parts[0]
        elif len(held) == 1:
            shape = [1] * len(old)
            shape[held[0]] = -1
            full = np.broadcast_to(parts[held[0]].reshape(shape), [before[d] for d in old])
            for d, axis in zip(new, _split(full.reshape([after[d] for d in new])), strict=True):
                axes[d] = axis
            if all(isinstance(axes[d], str) for d in new):
                channels.block(parts[held[0]], "reshape splits their axis")
        else:
            for part in parts:
                channels.block(part, "reshape mixes several axes of channels")
            other = next((part for part in parts if isinstance(part, str)), SPATIAL if held else None)
            for d in new:
                axes[d] = other
    return [tuple(axes)]


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes of a reshape that hold the same elements; axes of length 1 are left out."""
    old = [d for d, n in enumerate(before) if n != 1]
    new = [d for d, n in enumerate(after) if n != 1]
    groups = []
    while old:
        a, b = [old.pop(0)], [new.pop(0)]
        while (m := math.prod(before[d] for d in a)) != (n := math.prod(after[d] for d in b)):
            a, b = ([*a, old.pop(0)], b) if m < n else (a, [*b, new.pop(0)])
        groups.append((a, b))
    return groups


def _split(full: np.ndarray) -> list[Axis]:
    """The identities along each axis of an array of them, where they do not depend on the other axes."""
    axes: list[Axis] = []
    for d in range(full.ndim):
        rows = np.moveaxis(full, d, 0).reshape(full.shape[d], -1)
        same = (rows == rows[:, :1]).all() and (full.ndim == 1 or len(np.unique(rows[:, 0])) > 1)
        axes.append(rows[:, 0].copy() if same else SPATIAL)
    return axes


# ------------------------------------------------------------------------------------------------------------- products


def _kernel_of(inputs: list[Value]) -> int | None:
    """Which operand is a kernel: computed from parameters alone, where the other depends on the network's input."""
    kernels = [i for i, value in enumerate(inputs) if value.leaves and not value.live and inputs[1 - i].live]
    return kernels[0] if kernels else None


@_rule("dot_general")
def _dot_general(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    contracted, batched = eqn.params["dimension_numbers"]
    free = [
        [d for d in range(len(v.axes)) if d not in (*c, *b)]
        for v, c, b in zip(inputs, contracted, batched, strict=True)
    ]
    both_live = inputs[0].live and inputs[1].live
    read: list[Axis] = []
    for l, r in zip(*contracted, strict=True):
        read.append(channels.unite(inputs[0].axes[l], inputs[1].axes[r], "dot_general"))
        if both_live:
            channels.block(read[-1], "they are summed over in a product of two arrays of features")
    axes = [channels.unite(inputs[0].axes[l], inputs[1].axes[r], "dot_general") for l, r in zip(*batched, strict=True)]
    axes += [v.axes[d] for v, ds in zip(inputs, free, strict=True) for d in ds]
    kernel = _kernel_of(inputs)
    if kernel is not None:
        out = [inputs[kernel].axes[d] for d in free[kernel]]
        outputs = out[0] if len(out) == 1 and not batched[0] and isinstance(out[0], np.ndarray) else None
        shape = eqn.invars[kernel].aval.shape
        macs = math.prod(shape[d] for d in contracted[kernel])
        size = math.prod(eqn.outvars[0].aval.shape)
        read_axis = np.concatenate([axis for axis in read if isinstance(axis, np.ndarray)] or [np.zeros(0, np.int64)])
        channels.products.append(Product(inputs[kernel].leaves, outputs, read_axis, 1, size, macs, True))
        channels.events.append(channels.products[-1])
    return [tuple(axes)]


@_rule("conv_general_dilated")
def _convolution(channels: Channels, eqn: Any, inputs: list[Value]) -> list[tuple[Axis, ...]]:
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    if eqn.params["batch_group_count"] != 1 or inputs[1].live:
        return opaque(channels, eqn, inputs)
    read, into = inputs[0].axes[numbers.lhs_spec[1]], inputs[1].axes[numbers.rhs_spec[1]]
    out = inputs[1].axes[numbers.rhs_spec[0]]
    if groups == 1:
        read = channels.unite(read, into, "conv_general_dilated")
    elif isinstance(out, np.ndarray):  # a group is removed whole
        members = out.reshape(groups, -1)
        if isinstance(read, np.ndarray):
            members = np.concatenate([read.reshape(groups, -1), members], axis=1)
        else:
            channels.block(out, read or CONSTANT, "a grouped convolution")
        channels.unite(members[:, :-1].ravel(), members[:, 1:].ravel())
    axes: list[Axis] = [SPATIAL] * len(inputs[0].axes)
    axes[numbers.out_spec[0]], axes[numbers.out_spec[1]] = inputs[0].axes[numbers.lhs_spec[0]], out
    if _kernel_of(inputs) == 1:
        shape, size = eqn.invars[1].aval.shape, math.prod(eqn.outvars[0].aval.shape)
        macs = math.prod(shape) // shape[numbers.rhs_spec[0]]
        outputs = out if isinstance(out, np.ndarray) else None
        channels.products.append(Product(inputs[1].leaves, outputs, read, groups, size, macs, False))
        channels.events.append(channels.products[-1])
    return [tuple(axes)]
