"""Follows the jaxpr of a network, equation by equation and into the functions it calls."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxlib_methods.pruning._channel_rules import ELEMENTWISE, RULES, WINDOWS, opaque
from jaxlib_methods.pruning._channels import CONSTANT, INPUT, Applied, Channels, Value

_ACTIVATIONS = (
    "celu", "elu", "gelu", "glu", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh", "leaky_relu", "log_sigmoid",
    "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus", "swish",
)  # fmt: skip


def follow(forward: Callable[..., Any], leaves: Sequence[Any], inputs: Sequence[Any]) -> tuple[Channels, list, Any]:
    """Traces `forward(leaves, *inputs)`; returns the channels, the axes of every leaf, and the output's shapes."""
    closed, shape = jax.make_jaxpr(forward, return_shape=True)(list(leaves), *inputs)
    channels = Channels()
    of_leaves = [tuple(channels.fresh(n) for n in leaf.shape) for leaf in leaves]
    values = [Value(axes, frozenset([i])) for i, axes in enumerate(of_leaves)]
    values += [Value((INPUT,) * len(x.shape), live=True) for x in jax.tree.leaves(list(inputs))]
    for value in _follow(channels, closed.jaxpr, closed.consts, values):
        channels.fixed += [axis for axis in value.axes if isinstance(axis, np.ndarray)]
    return channels, of_leaves, shape


def _follow(
    channels: Channels, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value], counted: bool = True
) -> list[Value]:
    """Follows an (open) jaxpr; `counted`: whether its operations are not part of one that is counted as a whole."""
    known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
        known[var] = Value((CONSTANT,) * np.ndim(const))

    def read(atom: Any) -> Value:
        return Value((None,) * len(atom.aval.shape)) if hasattr(atom, "val") else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _apply(channels, eqn, inputs, counted)
        for var, value in zip(eqn.outvars, outputs, strict=True):
            known[var] = value
    return [read(atom) for atom in jaxpr.outvars]


def _apply(channels: Channels, eqn: Any, inputs: list[Value], counted: bool) -> list[Value]:
    name, params = eqn.primitive.name, eqn.params
    inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
    if name == "cond" and "branches_platforms" in params:  # all branches compute the same; the last is XLA's own
        inner, inputs = params["branches"][-1], inputs[1:]
    if inner is not None and name not in ("scan", "while") and len(_open(inner).invars) == len(inputs):
        activation = params.get("name") in _ACTIVATIONS
        outputs = _follow(channels, _open(inner), getattr(inner, "consts", ()), inputs, counted and not activation)
        if activation and counted and outputs[0].live:
            channels.events.append(Applied("activation", frozenset(), math.prod(eqn.outvars[0].aval.shape)))
        return outputs
    rule = RULES.get(name, opaque)
    axes, extra = rule(channels, eqn, inputs), {}
    leaves = frozenset().union(*(value.leaves for value in inputs))
    live = any(value.live for value in inputs)
    if name == "reduce_sum":
        extra["total_of"] = eqn.invars[0]
    elif name in ("broadcast_in_dim", "reshape"):
        extra["total_of"] = inputs[0].total_of
    outputs = [Value(out_axes, leaves, live, **extra) for out_axes in axes]
    if counted and live and eqn.outvars:
        _count(channels, eqn, inputs)
    return outputs


def _count(channels: Channels, eqn: Any, inputs: list[Value]) -> None:
    name, size = eqn.primitive.name, math.prod(eqn.outvars[0].aval.shape)
    if name in WINDOWS:
        kind = "mean pool" if name == "reduce_window_sum" else "pool"
        channels.events.append(Applied(kind, frozenset(), size, math.prod(eqn.params["window_dimensions"])))
    elif name == "div" and inputs[1].total_of is eqn.invars[0]:
        channels.events.append(Applied("softmax", frozenset(), size))
    elif name in ("tanh", "logistic") or (name == "max" and getattr(eqn.invars[1], "val", None) == 0):
        channels.events.append(Applied("activation", frozenset(), size))
    elif name in ELEMENTWISE:
        leaves = [value.leaves for value in inputs if value.leaves and not value.live]
        if leaves:
            channels.events.append(Applied("norm", frozenset().union(*leaves), size))


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)
