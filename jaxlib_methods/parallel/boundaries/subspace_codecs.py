"""The codecs of a subspace network: k values of a token and its id forwards, k values backwards."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods.parallel.boundaries.codecs import Codec, Payload, linear_codec, smallest_unsigned
from jaxlib_methods.parallel.boundaries.grassmann import (
    MomentState,
    gradient_moment,
    product,
    times,
)
from jaxlib_methods.parallel.boundaries.subspaces import Subspace, fixed_embedding, fixed_rows, subspace_reconstruct
from jaxlib_methods.typing import PyTree

__all__ = [
    "subspace_codec",
    "subspace_gradient_codec",
]


def subspace_codec(subspace: Subspace, dtype: str | None = None, *, activation_dtype: str = "float32") -> Codec:
    """Forward boundaries of a subspace network: k values of a token and its id. Lossless to rounding.

    Args:
      subspace: of the network.
      dtype: of the coordinates on the link; None: that of the activations.
      activation_dtype: of the residual stream; T_fixed U is made with U rounded to it.

    Returns:
      A codec of {"x": residual stream (b, n, d), "ids": integers (b, n)}, as `subspace_model` makes it; whatever else
      the dictionary holds is sent as it is. The ids travel in the smallest unsigned type that holds all V of them.

    Raises:
      TypeError: by its init, for anything else, and for a residual stream of another dtype.

    Example:
      >>> from jaxlib_methods.parallel.boundaries import random_subspace
      >>> subspace = random_subspace(key=jax.random.key(0), vocab_size=300, width=64, rank=10)
      >>> x = {"x": jnp.ones((1, 8, 64)), "ids": jnp.ones((1, 8), jnp.int32)}
      >>> message, _ = subspace_codec(subspace, "bfloat16").encode(x, ())
      >>> message["x"].arrays["C"].shape, message["ids"].arrays["ids"].dtype.name
      ((1, 8, 10), 'uint16')

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """
    U, like = subspace.U, jnp.dtype(activation_dtype)
    project = lambda rows: product(rows.astype(like), U)
    ids_dtype, table, PE = jnp.uint32, None, None if subspace.PE is None else project(subspace.PE)
    if subspace.T_fixed is not None:
        ids = jnp.arange(len(subspace.T_fixed))
        ids_dtype = smallest_unsigned(len(ids))
        table = jax.lax.map(lambda i: project(fixed_rows(i, subspace)), ids, batch_size=1024)
    projected = Subspace(jnp.zeros((0, 0)), table, PE)  # T_fixed U and PE U, in float32 at least

    def init(x: PyTree) -> tuple[()]:
        if not isinstance(x, dict) or not {"x", "ids"} <= x.keys():
            got = f"a dictionary of {sorted(x)}" if isinstance(x, dict) else type(x).__name__
            raise TypeError(
                f"the subspace codec sends token ids along and takes a dictionary with 'x' and 'ids', got {got}; "
                "build the model with subspace_model"
            )
        if x["x"].dtype != like:
            raise TypeError(f"the codec is made for activations of {like}, got {x['x'].dtype}; pass activation_dtype=")
        return ()

    def encode(x: dict[str, Any], state: PyTree) -> tuple[dict[str, Any], PyTree]:
        X, ids = x["x"], x["ids"]
        C, fixed = product(X, U), fixed_embedding(ids, projected)
        C = C if fixed is None else C - fixed
        coded = Payload({"C": C.astype(dtype or X.dtype)}, X.shape, X.dtype)
        return {**x, "x": coded, "ids": Payload({"ids": ids.astype(ids_dtype)}, ids.shape, ids.dtype)}, state

    def decode(message: dict[str, Any], state: PyTree) -> tuple[dict[str, Any], PyTree]:
        C, ids = message["x"], message["ids"].arrays["ids"].astype(message["ids"].dtype)
        return {**message, "x": subspace_reconstruct(C.arrays["C"].astype(C.dtype), ids, subspace), "ids": ids}, state

    return Codec(init, encode, decode)


def subspace_gradient_codec(subspace: Subspace, dtype: str | None = None, *, track: bool = False) -> Codec:
    """Backward boundaries of a subspace network: G U, without ids; the receiver continues with G P.

    The part of G outside of span(U) is legitimately lost: no parameter before the boundary depends on it.

    Args:
      subspace: of the network.
      dtype: of the coordinates on the link; None: that of the gradients.
      track: whether the sender sums up what `grassmann_step` needs; its state is then a `MomentState`.

    Returns:
      A codec of any tree of gradients: the leaves (..., d) are coded and others are sent as they are.

    Example:
      >>> subspace = Subspace(jnp.array([[0.6], [0.8]]))
      >>> codec = subspace_gradient_codec(subspace)
      >>> message, _ = codec.encode(jnp.array([[1.0, 2.0]]), codec.init(jnp.zeros((1, 2))))
      >>> round(float(message.arrays["x"][0, 0]), 3)
      2.2

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """
    U = subspace.U
    codec = linear_codec(lambda G: times(G, U), lambda C: times(C, U.T), dtype, width=len(U))
    if not track:
        return codec

    def init(G: PyTree) -> MomentState:
        return MomentState(jnp.zeros(U.shape, compute_dtype(U.dtype)), jnp.zeros((), jnp.int32))

    def encode(G: PyTree, state: MomentState) -> tuple[PyTree, MomentState]:
        coded = [leaf for leaf in jax.tree.leaves(G) if leaf.shape[-1:] == (len(U),)]
        Y = state.Y + sum(gradient_moment(leaf, U).astype(state.Y.dtype) for leaf in coded)
        return codec.encode(G, codec.init(G))[0], MomentState(Y, state.count + 1)

    def decode(message: PyTree, state: MomentState) -> tuple[PyTree, MomentState]:
        return codec.decode(message, codec.init(message))[0], state

    return Codec(init, encode, decode)
