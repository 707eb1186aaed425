"""Messages along the boundaries of a slot: what hooks make of them, and the permutation that carries them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, EndStates, HookInfo
from jaxlib_methods.parallel.pipelines.mesh import AXES
from jaxlib_methods.typing import PyTree


def vary(tree: PyTree) -> PyTree:
    """Marks arrays as different on every device: branches of a switch and carries of a scan must agree on it."""

    def mark(leaf: Any) -> jax.Array:
        missing = tuple(name for name in AXES if name not in jax.typeof(leaf).manual_axis_type.varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def transfer(
    hook: BoundaryHook | None,
    states: EndStates | None,
    value: PyTree,
    inbox: PyTree,
    pairs: list[tuple[int, int]],
    info: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[PyTree, EndStates | None]:
    """Sends `value` along the pairs; (what has arrived, states of the hook)."""
    if not pairs:
        return inbox, states
    cross = lambda tree: jax.tree.map(lambda leaf: _permute(leaf, pairs), tree)
    if hook is None:
        return vary(cross(value)), states
    stage, microbatches, exist = info
    source = np.arange(len(microbatches))
    sends, receives = np.zeros(len(microbatches), bool), np.zeros(len(microbatches), bool)
    for a, b in pairs:
        source[b], sends[a], receives[b] = a, True, True
    origin = jnp.asarray(source)[stage]
    sending = HookInfo(stage, microbatches[stage], exist[stage] & jnp.asarray(sends)[stage])
    receiving = HookInfo(stage, microbatches[origin], exist[origin] & jnp.asarray(receives)[stage])
    message, sender = hook.send(value, states.sending, sending)
    arrived, receiver = hook.receive(cross(message), states.receiving, receiving)
    arrived = jax.tree.map(lambda new, like: new.astype(like.dtype), arrived, inbox)
    ends = select(sending.active, sender, states.sending), select(receiving.active, receiver, states.receiving)
    return vary(arrived), EndStates(*ends)


def _permute(leaf: jax.Array, pairs: list[tuple[int, int]]) -> jax.Array:
    """`ppermute` over the stages. Short floating types cross as integers: XLA on a CPU sends bfloat16 as float32."""
    bits = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize)
    if bits is None or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.lax.ppermute(leaf, "stage", pairs)
    sent = jax.lax.bitcast_convert_type(leaf, bits)
    return jax.lax.bitcast_convert_type(jax.lax.ppermute(sent, "stage", pairs), leaf.dtype)


def select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`jnp.where` on trees; what a hook has passed on as it was costs nothing."""
    return jax.tree.map(lambda a, b: b if a is b else jnp.where(condition, a, b), new, old)
