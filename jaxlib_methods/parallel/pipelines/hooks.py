"""What may be called at the boundaries between stages and on the data axis: codecs, monitors, averaging.

A boundary has two ends. The sender's hook turns activations (forward) or their cotangents (backward) into a message,
the message crosses the link, and the receiver's hook turns it back. A codec makes the message smaller; a monitor leaves
it as it is and keeps statistics in its state, or replaces what it does not trust.

The hooks of all stages run in every slot, in one program, outside of any branch: they may use collectives over the axis
"data". Where a stage has nothing to send or to receive in a slot, what its hook returns is dropped.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.typing import PyTree

__all__ = [
    "BoundaryHook",
    "DataHook",
    "EndStates",
    "HookInfo",
    "HookStates",
    "chain_hooks",
]


class HookInfo(NamedTuple):
    """Where and when a hook is called; scalars, different on every device."""

    stage: jax.Array  # int32 []: j, of the device that runs the hook
    microbatch: jax.Array  # int32 []: m since the pipe was filled
    active: jax.Array  # bool []: whether the stage really sends, receives or has updated in this slot


class EndStates(NamedTuple):
    """States of a hook at the two ends that a device has, of boundaries in one direction."""

    sending: PyTree
    receiving: PyTree


class HookStates(NamedTuple):
    """States of the hooks at a pipeline's boundaries, on one device; None where there is no hook."""

    forward: EndStates | None
    backward: EndStates | None


class BoundaryHook(NamedTuple):
    """A codec or a monitor: pure functions with explicit state, called at the two ends of a boundary.

    Args:
      init: tree of `jax.ShapeDtypeStruct` of what crosses -> state of one end on one device (any tree of arrays; each
        device has one for sending and one for receiving).
      send: (x, state, info) -> (message, state); the message is any tree of arrays of fixed shapes.
      receive: (message, state, info) -> (x, state), x of the shapes and dtypes that entered `send`.
      transform: (state, matrix (d, d)) -> state, when what crosses has become x @ matrix for good; None: the state does
        not depend on it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> half = BoundaryHook(
      ...     init=lambda x: (),
      ...     send=lambda x, state, info: (jax.tree.map(lambda a: a.astype(jnp.bfloat16), x), state),
      ...     receive=lambda m, state, info: (jax.tree.map(lambda a: a.astype(jnp.float32), m), state),
      ... )
      >>> info = HookInfo(stage=0, microbatch=0, active=True)
      >>> message, _ = half.send(jnp.array([1 / 3]), (), info)
      >>> float(half.receive(message, (), info)[0][0])
      0.333984375
    """

    init: Callable[[PyTree], PyTree]
    send: Callable[[PyTree, PyTree, HookInfo], tuple[PyTree, PyTree]]
    receive: Callable[[PyTree, PyTree, HookInfo], tuple[PyTree, PyTree]]
    transform: Callable[[PyTree, jax.Array], PyTree] | None = None


class DataHook(NamedTuple):
    """What replicas exchange after the optimizer step: sparse averaging, local steps with an outer optimizer.

    Args:
      init: packed parameters of one device (`Packed`: a tree of arrays, the same for all stages) -> state.
      apply: (packed parameters, state, info) -> (packed parameters, state); may use collectives over "data".
      restart: state -> state, when the parameters of all replicas and every `Packed` in the state are transformed:
        forgets what else it keeps of the old ones. None: the hook cannot.

    Example:
      >>> import jax
      >>> average = DataHook(
      ...     init=lambda params: (),
      ...     apply=lambda params, state, info: (jax.tree.map(lambda p: jax.lax.pmean(p, "data"), params), state),
      ... )
      >>> average.init({"w": 1.0})
      ()
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[[PyTree, PyTree, HookInfo], tuple[PyTree, PyTree]]
    restart: Callable[[PyTree], PyTree] | None = None


def chain_hooks(*hooks: BoundaryHook) -> BoundaryHook:
    """One hook out of several: sending runs them in order, receiving in the opposite order.

    `init` of each is called with what the one before it sends, so that a monitor after a codec sees messages, and one
    before it what the stage sends and what arrives there.

    Args:
      *hooks: from the stage outward to the link.

    Returns:
      The hook; its state is the tuple of theirs.

    Example:
      >>> plus = lambda c: BoundaryHook(lambda x: (), lambda x, s, i: (x + c, s), lambda m, s, i: (m - c, s))
      >>> hook, info = chain_hooks(plus(1), plus(2)), HookInfo(stage=0, microbatch=0, active=True)
      >>> hook.send(5, ((), ()), info), hook.receive(8, ((), ()), info)
      ((8, ((), ())), (5, ((), ())))
    """

    def init(x: PyTree) -> PyTree:
        states = []
        for hook in hooks:
            states.append(hook.init(x))
            x = jax.eval_shape(lambda x, hook=hook: hook.send(zeros(x), hook.init(x), _no_info())[0], x)
        return tuple(states)

    def send(x: PyTree, states: PyTree, info: HookInfo) -> tuple[PyTree, PyTree]:
        out = []
        for hook, state in zip(hooks, states, strict=True):
            x, state = hook.send(x, state, info)
            out.append(state)
        return x, tuple(out)

    def receive(message: PyTree, states: PyTree, info: HookInfo) -> tuple[PyTree, PyTree]:
        out = []
        for hook, state in reversed(list(zip(hooks, states, strict=True))):
            message, state = hook.receive(message, state, info)
            out.append(state)
        return message, tuple(reversed(out))

    def transform(states: PyTree, matrix: jax.Array) -> PyTree:
        return tuple(transformed(hook, state, matrix) for hook, state in zip(hooks, states, strict=True))

    return BoundaryHook(init, send, receive, transform)


def transformed(hook: BoundaryHook | None, state: PyTree, matrix: jax.Array) -> PyTree:
    """The state of a hook after what crosses has become x @ matrix."""
    return state if hook is None or hook.transform is None else hook.transform(state, matrix)


def zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _no_info() -> HookInfo:
    return HookInfo(jnp.int32(0), jnp.int32(0), jnp.bool_(False))
