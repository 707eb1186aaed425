r"""Lossy boundary codecs: the controls of the subspace networks, whose coding loses nothing.

int8     absmax blocks: q = round(127 x / max |x|)
top-k    the k largest of d entries; with error feedback e <- x + e - sent, added to the next message
delta    x - c with few bits, where c is what the receiver rebuilt at the sample's previous visit
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.parallel.boundaries.codecs import Codec, leafwise, smallest_unsigned
from jaxlib_methods.typing import PyTree

__all__ = [
    "DeltaState",
    "delta_codec",
    "int8_codec",
    "top_k_codec",
]


class DeltaState(NamedTuple):
    """State of one end of `delta_codec`."""

    cache: jax.Array  # [slots, ...], dtype of x: what the receiver rebuilt at the last visit of each slot
    count: jax.Array  # int32 []: messages so far


def int8_codec(block_size: int | None = None) -> Codec:
    r"""Blocks of the last axis in eight bits, $q = \mathrm{round}(127 x / s)$ with s = max |x| of the block.

    Args:
      block_size: entries that share s, a divisor of the last axis; None: all of it, which is one s per token.

    Returns:
      The codec; a token takes d + 4 d / block_size bytes.

    Raises:
      ValueError: for a size below 1 and, by its encode, for one that does not divide the last axis.

    Example:
      >>> codec, x = int8_codec(), jnp.array([[127.0, -2.2]])
      >>> message, _ = codec.encode(x, codec.init(x))
      >>> codec.decode(message, codec.init(x))[0].tolist()
      [[127.0, -2.0]]

    Source: Dettmers et al. (ICLR 2022), arXiv:2110.02861, with a linear in place of a dynamic code
    [dettmers2022eight].
    """
    checks.at_least(1, block_size=block_size)

    def encode(x: jax.Array, state: PyTree) -> tuple[dict[str, jax.Array], PyTree]:
        width = block_size or x.shape[-1]
        if x.shape[-1] % width:
            raise ValueError(f"block_size must divide the last axis, got {width} and {x.shape[-1]}")
        q, scale = _quantize(x.reshape(*x.shape[:-1], -1, width), 127)
        return {"q": q.reshape(x.shape), "scale": scale[..., 0]}, state

    def decode(arrays: dict[str, jax.Array], shape: tuple[int, ...], dtype: Any, state: PyTree):
        q, scale = arrays["q"], arrays["scale"]
        return _dequantize(q.reshape(*scale.shape, -1), scale[..., None], 127, dtype).reshape(shape), state

    return leafwise(lambda x: (), encode, decode)


def top_k_codec(k: int, *, error_feedback: bool = True) -> Codec:
    r"""The k entries of each token that are largest in magnitude, and where they stand.

    With error feedback, $e \leftarrow x + e_{-1} - \mathrm{sent}$ is added to the next message: in the mean nothing is
    lost. The memory belongs to a place in the micro-batch, whose next token is another one; activations, unlike
    gradients, are not summed over messages, so it is a control and not a remedy.

    Args:
      k: entries per token, at most the last axis.
      error_feedback: whether the sender keeps what it did not send.

    Returns:
      The codec; a token takes k (itemsize + 1, 2 or 4) bytes.

    Raises:
      ValueError: for a k below 1 and, by its encode, above the last axis.

    Example:
      >>> codec, x = top_k_codec(1), jnp.array([[3.0, -2.0]])
      >>> message, state = codec.encode(x, codec.init(x))
      >>> codec.decode(message, codec.init(x))[0].tolist(), state[0].tolist()
      ([[3.0, 0.0]], [[0.0, -2.0]])

    Source: Stich, Cordonnier, Jaggi (NeurIPS 2018), arXiv:1809.07599, Algorithm 1 [stich2018sparsified].
    """
    checks.at_least(1, k=k)

    def encode(x: jax.Array, state: PyTree) -> tuple[dict[str, jax.Array], PyTree]:
        if k > x.shape[-1]:
            raise ValueError(f"k must not exceed the last axis, got {k} and {x.shape[-1]}")
        wanted = x + state if error_feedback else x
        _, indices = jax.lax.top_k(jnp.abs(wanted), k)
        values = jnp.take_along_axis(wanted, indices, axis=-1)
        arrays = {"values": values, "indices": indices.astype(smallest_unsigned(x.shape[-1]))}
        return arrays, wanted - decode(arrays, x.shape, x.dtype, ())[0] if error_feedback else state

    def decode(arrays: dict[str, jax.Array], shape: tuple[int, ...], dtype: Any, state: PyTree):
        indices = arrays["indices"].astype(jnp.int32)
        return jnp.put_along_axis(jnp.zeros(shape, dtype), indices, arrays["values"], axis=-1, inplace=False), state

    return leafwise(lambda x: jnp.zeros(x.shape, x.dtype) if error_feedback else (), encode, decode)


def delta_codec(bits: int | None, num_slots: int) -> Codec:
    r"""The change of a sample's activations since its last visit, in few bits (AQ-SGD).

    Both ends keep what the receiver rebuilt, c; the message is Q(x - c) with one scale per token, and both add it:
    as training converges, the changes shrink and with them the error. Micro-batches must return in the same order,
    micro-batch m using slot m mod `num_slots`. The method starts with an epoch of `delta_codec(None, num_slots)`, whose
    messages are exact and whose state is the same.

    Args:
      bits: 2, 4 or 8 of each entry; None sends x itself and fills the caches.
      num_slots: micro-batches of an epoch.

    Returns:
      The codec; its state is `slots` times as large as x, at both ends.

    Raises:
      ValueError: for other bits, for slots below 1 and, by its encode, where 8 / bits does not divide the last axis.

    Example:
      >>> x = jnp.array([[1.0, 0.25]])
      >>> first, later = delta_codec(None, 1), delta_codec(4, 1)
      >>> message, sender = first.encode(x, first.init(x))
      >>> _, receiver = first.decode(message, first.init(x))
      >>> message, sender = later.encode(x + jnp.array([[0.07, -0.02]]), sender)
      >>> [round(float(value), 3) for value in later.decode(message, receiver)[0][0]]
      [1.07, 0.23]

    Source: Wang et al. (NeurIPS 2022), arXiv:2206.01299, Algorithm 1, rounding to the nearest [wang2022fine].
    """
    checks.one_of((2, 4, 8, None), bits=bits)
    checks.at_least(1, num_slots=num_slots)
    levels = 2 ** (bits - 1) - 1 if bits else 0

    def init(x: jax.Array | jax.ShapeDtypeStruct) -> DeltaState:
        return DeltaState(jnp.zeros((num_slots, *x.shape), x.dtype), jnp.zeros((), jnp.int32))

    def rebuild(arrays: dict[str, jax.Array], cached: jax.Array) -> jax.Array:
        if bits is None:
            return arrays["x"]
        q = _unpack(arrays["q"], bits) - levels
        return cached + _dequantize(q, arrays["scale"], levels, cached.dtype)

    def update(state: DeltaState, arrays: dict[str, jax.Array]) -> tuple[jax.Array, DeltaState]:
        slot = state.count % num_slots
        x = rebuild(arrays, state.cache[slot])
        return x, DeltaState(state.cache.at[slot].set(x), state.count + 1)

    def encode(x: jax.Array, state: DeltaState) -> tuple[dict[str, jax.Array], DeltaState]:
        if bits is None:
            arrays = {"x": x}
        else:
            q, scale = _quantize(x - state.cache[state.count % num_slots], levels)
            arrays = {"q": _pack((q.astype(jnp.int32) + levels).astype(jnp.uint8), bits), "scale": scale}
        return arrays, update(state, arrays)[1]

    def decode(arrays: dict[str, jax.Array], shape: tuple[int, ...], dtype: Any, state: DeltaState):
        return update(state, arrays)

    return leafwise(init, encode, decode)


def _quantize(x: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """Integers in [-levels, levels] and the largest magnitude of the last axis, [..., 1] in float32."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.round(x * (levels / jnp.where(scale > 0, scale, 1))).astype(jnp.int8), scale


def _dequantize(q: jax.Array, scale: jax.Array, levels: int, dtype: Any) -> jax.Array:
    return (q.astype(jnp.float32) * (scale / levels)).astype(dtype)


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 [..., d] of small numbers to uint8 [..., d bits / 8]."""
    per_byte = 8 // bits
    if codes.shape[-1] % per_byte:
        raise ValueError(f"{bits} bits need a last axis that is a multiple of {per_byte}, got {codes.shape[-1]}")
    groups = codes.reshape(*codes.shape[:-1], -1, per_byte)
    shifted = [groups[..., i] << jnp.uint8(i * bits) for i in range(per_byte)]
    return functools.reduce(jnp.bitwise_or, shifted)


def _unpack(packed: jax.Array, bits: int) -> jax.Array:
    parts = [(packed >> jnp.uint8(i * bits)) & jnp.uint8(2**bits - 1) for i in range(8 // bits)]
    return jnp.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1).astype(jnp.int32)
