r"""Codecs of the boundaries between stages: what crosses a link in place of activations and of their gradients.

A codec is a triple of pure functions with explicit state, `init(x) -> state`, `encode(x, state) -> (message, state)`,
`decode(message, state) -> (x, state)`, where the sender and the receiver each hold a state of their own. x is any tree;
its floating leaves (..., d) are coded, integers are sent as they are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook
from jaxlib_methods.parallel.pipelines.stages import differentiable
from jaxlib_methods.typing import PyTree

__all__ = [
    "Codec",
    "Payload",
    "cast_codec",
    "codec_hook",
    "coded_boundary",
    "identity_codec",
    "payload_bytes",
]


class Codec(NamedTuple):
    """A code for what crosses a boundary in one direction.

    Args:
      init: x, or its shapes -> state of one end, a tree of arrays.
      encode: (x, state of the sender) -> (message, state).
      decode: (message, state of the receiver) -> (x, state); x has the shapes and dtypes that were encoded.

    Example:
      >>> codec = cast_codec("bfloat16")
      >>> x = jnp.array([1 / 3])
      >>> message, _ = codec.encode(x, codec.init(x))
      >>> float(codec.decode(message, codec.init(x))[0][0])
      0.333984375
    """

    init: Callable[[PyTree], PyTree]
    encode: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
    decode: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("shape", "dtype"))
@dataclasses.dataclass(frozen=True)
class Payload:
    """One coded array: what is sent, and what both ends know without sending it.

    Args:
      arrays: name -> array.
      shape: of the array that was encoded.
      dtype: of the array that was encoded.
    """

    arrays: dict[str, Any]
    shape: tuple[int, ...]
    dtype: Any


def codec_hook(codec: Codec) -> BoundaryHook:
    """A codec as the hook of a pipeline's boundaries.

    Args:
      codec: of one direction; for `backward_hook` a codec of gradients.

    Returns:
      The hook. The payload is what the compiled program sends, to the byte (`link_bytes`).

    Example:
      >>> from jaxlib_methods.parallel.boundaries import int8_codec
      >>> hook = codec_hook(int8_codec())
      >>> message, _ = hook.send(jnp.ones((2, 4)), hook.init(jnp.ones((2, 4))), None)
      >>> message.arrays["q"].dtype.name
      'int8'
    """
    return BoundaryHook(
        codec.init,
        lambda x, state, info: codec.encode(x, state),
        lambda message, state, info: codec.decode(message, state),
    )


def payload_bytes(codec: Codec, x: PyTree) -> int:
    """Bytes that a message takes on the link, from shapes alone.

    Args:
      codec: of either direction.
      x: what would be sent, or its shapes.

    Returns:
      The bytes; divide by the tokens of x.

    Example:
      >>> from jaxlib_methods.parallel.boundaries import int8_codec
      >>> x = jax.ShapeDtypeStruct((2, 128, 1024), "float32")
      >>> payload_bytes(cast_codec("bfloat16"), x) // 256, payload_bytes(int8_codec(), x) // 256
      (2048, 1028)
    """
    message = jax.eval_shape(lambda x: codec.encode(x, codec.init(x))[0], x)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(message))


def coded_boundary(forward: Codec, backward: Codec) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
    """A boundary inside one differentiable program: what a pipeline would compute, without its links.

    Activations pass through the forward codec, and their cotangents through the backward codec in place of its
    derivative, as between two processes. The backward codec starts from a fresh state at every call.

    Args:
      forward: of the activations.
      backward: of the cotangents, a list of the floating leaves as in a pipeline.

    Returns:
      (x, (sender, receiver)) -> (x, (sender, receiver)), where both states begin as `forward.init(x)`.

    Example:
      >>> transmit, codec = coded_boundary(cast_codec("bfloat16"), cast_codec("bfloat16")), cast_codec("bfloat16")
      >>> loss = lambda x: 3.1 * transmit(x, (codec.init(x), codec.init(x)))[0]
      >>> float(jax.grad(loss)(jnp.float32(1.0)))  # 3.1 in bfloat16
      3.09375
    """

    @jax.custom_vjp
    def transmit(x: PyTree, states: PyTree) -> tuple[PyTree, PyTree]:
        message, sender = forward.encode(x, states[0])
        x, receiver = forward.decode(message, states[1])
        return x, (sender, receiver)

    def transmit_fwd(x: PyTree, states: PyTree) -> tuple[PyTree, None]:
        return transmit(x, states), None

    def transmit_bwd(_: None, cotangents: PyTree) -> tuple[PyTree, None]:
        leaves, structure = jax.tree.flatten(cotangents[0])
        moving = [i for i, leaf in enumerate(leaves) if differentiable(leaf)]
        sent = [leaves[i] for i in moving]
        message, _ = backward.encode(sent, backward.init(sent))
        received, _ = backward.decode(message, backward.init(sent))
        for i, leaf in zip(moving, received, strict=True):
            leaves[i] = leaf
        return structure.unflatten(leaves), None

    transmit.defvjp(transmit_fwd, transmit_bwd)
    return transmit


# ------------------------------------------------------------------------------------------------- the codecs


def identity_codec() -> Codec:
    """Sends everything as it is.

    Returns:
      The codec.

    Example:
      >>> payload_bytes(identity_codec(), jnp.ones((3, 5)))
      60
    """
    return Codec(lambda x: (), lambda x, state: (x, state), lambda message, state: (message, state))


def cast_codec(dtype: str = "bfloat16") -> Codec:
    """Rounds to a shorter floating type.

    Args:
      dtype: on the link.

    Returns:
      The codec.

    Raises:
      ValueError: for a type that is not floating.

    Example: see `Codec`.
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(f"dtype must be floating, such as 'bfloat16', got {dtype!r}")
    return linear_codec(lambda x: x, lambda x: x, dtype)


# ------------------------------------------------------------------------------------------------ building blocks


def linear_codec(
    compress: Callable[[jax.Array], jax.Array],
    expand: Callable[[jax.Array], jax.Array],
    dtype: str | None = None,
    width: int | None = None,
) -> Codec:
    """A codec without state from two maps of arrays and the type in between; None keeps that of the array.

    With a width, arrays whose last axis is another are sent as they are.
    """
    whole = lambda shape: width is not None and shape[-1:] != (width,)

    def encode(x: jax.Array, state: PyTree) -> tuple[dict[str, jax.Array], PyTree]:
        if whole(x.shape):
            return {"x": x}, state
        coded = compress(x)
        return {"x": coded.astype(dtype or coded.dtype)}, state

    def decode(arrays: dict[str, jax.Array], shape: tuple[int, ...], dtype: Any, state: PyTree):
        return arrays["x"] if whole(shape) else expand(arrays["x"].astype(dtype)), state

    return leafwise(lambda x: (), encode, decode)


def smallest_unsigned(count: int) -> Any:
    """The unsigned type that holds 0 .. count - 1."""
    return jnp.uint8 if count <= 1 << 8 else jnp.uint16 if count <= 1 << 16 else jnp.uint32


def leafwise(init_leaf: Callable, encode_leaf: Callable, decode_leaf: Callable) -> Codec:
    """A codec of trees from one of arrays; a state is the list of those of the floating leaves."""

    def init(x: PyTree) -> list[PyTree]:
        return [init_leaf(leaf) for leaf in jax.tree.leaves(x) if differentiable(leaf)]

    def encode(x: PyTree, states: list[PyTree]) -> tuple[PyTree, list[PyTree]]:
        leaves, structure = jax.tree.flatten(x)
        old, new = iter(states), []
        for i, leaf in enumerate(leaves):
            if differentiable(leaf):
                arrays, state = encode_leaf(leaf, next(old))
                leaves[i] = Payload(arrays, leaf.shape, leaf.dtype)
                new.append(state)
        return structure.unflatten(leaves), new

    def decode(message: PyTree, states: list[PyTree]) -> tuple[PyTree, list[PyTree]]:
        leaves, structure = jax.tree.flatten(message, is_leaf=lambda node: isinstance(node, Payload))
        old, new = iter(states), []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Payload):
                leaves[i], state = decode_leaf(leaf.arrays, leaf.shape, leaf.dtype, next(old))
                new.append(state)
        return structure.unflatten(leaves), new

    return Codec(init, encode, decode)
