r"""Subspace networks: the residual stream moves in k of its d dimensions, so that k numbers a token cross a boundary.

Symbols: b batch, n sequence, d width, V vocabulary, k rank; U (d, k) with U^T U = I, P = U U^T; rows are vectors,
y = x W. A pre-norm block adds to the residual stream what two projections make, X_{l+1} = X_l + A_l W_p1 + H_l W_p2. If
all rows of all W_p1 and W_p2 are in span(U), and the token embedding is T_fixed[i] + E[i] U^T, then at every depth

    X - T_fixed[ids] - PE is in span(U):   C = (X - T_fixed[ids] - PE) U,   X = C U^T + T_fixed[ids] + PE,

exactly. T_fixed is drawn once and never trained, U and T_fixed come from a seed on every stage, and what crosses is
C (b, n, k) and the token ids; backwards G U (b, n, k), which is the transpose and so what autodiff gives.
The models of `jaxlib_methods.models` keep the condition by W = Z U^T (`GPTConfig.subspace`).

A codec forms C as X U - (T_fixed U)[ids] - PE U, with T_fixed U (V, k) made once: the gather then reads k numbers of a
token and not d, and nothing of size d is written. Encoding is one pass over X, which leaves nothing to win for a
kernel that fuses gather, difference and product.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods._core.linalg import haar
from jaxlib_methods.parallel.boundaries.grassmann import (
    times,
)
from jaxlib_methods.parallel.pipelines.stages import StageModel

__all__ = [
    "Subspace",
    "fixed_embedding",
    "random_subspace",
    "subspace_coordinates",
    "subspace_model",
    "subspace_reconstruct",
]


class Subspace(NamedTuple):
    """What all stages know beforehand; `random_subspace` draws it. Constants: nothing here is trained or sent.

    Args:
      U: (d, k), orthonormal columns.
      T_fixed: the frozen part of the token embedding: its rows (V, d), or typed keys (V,) from which each stage draws
        the rows of the tokens at hand, or None for none.
      PE: (n, d), an additive position encoding for the longest sequence, or None (rotary positions need none).
      embedding_std: of the rows that are drawn from keys.

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """

    U: jax.Array
    T_fixed: jax.Array | None = None
    PE: jax.Array | None = None
    embedding_std: float | int = 1.0


def random_subspace(
    *,
    key: jax.Array,
    vocab_size: int,
    width: int,
    rank: int,
    embedding_std: float | int = 1.0,
    dtype: str = "float32",
    stored: bool = True,
) -> Subspace:
    """U from the QR decomposition of a normal matrix and T_fixed normal: the same on every stage.

    Args:
      key: typed key, the same on every stage.
      vocab_size: V.
      width: d.
      rank: k, at most d.
      embedding_std: standard deviation of T_fixed; 1 is the official code's.
      dtype: of T_fixed; "bfloat16" halves its memory, and every stage rounds it alike. U is float32.
      stored: whether T_fixed is a table, which becomes a constant of the compiled program. False keeps a key for each
        token, 8 bytes in place of 4 d, and draws the rows of a micro-batch again wherever they are needed: the choice
        for a large V d. Both give the same rows.

    Returns:
      The subspace, without position encoding.

    Raises:
      ValueError: for a rank outside of 1..d.

    Example:
      >>> import numpy as np
      >>> subspace = random_subspace(key=jax.random.key(0), vocab_size=10, width=6, rank=2)
      >>> subspace.T_fixed.shape, bool(np.allclose(subspace.U.T @ subspace.U, np.eye(2), atol=1e-6))
      ((10, 6), True)

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260, official code [ramasinghe2025protocol].
    """
    checks.within(f"[1, {width}]", rank=rank, remedy="the basis has width rows")
    basis_key, table_key = jax.random.split(key)
    U = haar(basis_key, (width, rank))
    keys = Subspace(U, jax.random.split(table_key, vocab_size), embedding_std=embedding_std)
    return keys._replace(T_fixed=fixed_rows(jnp.arange(vocab_size), keys).astype(dtype)) if stored else keys


def fixed_embedding(ids: jax.Array, subspace: Subspace) -> jax.Array | None:
    """T_fixed[ids] + PE, what a stage computes for itself.

    Args:
      ids: integers (b, n).
      subspace: with T_fixed or PE or both.

    Returns:
      (b, n, d), or None where the subspace has neither.

    Raises:
      ValueError: for a sequence longer than PE.

    Example:
      >>> fixed_embedding(jnp.array([[1]]), Subspace(jnp.eye(2), jnp.array([[0.0, 1.0], [2.0, 3.0]]))).tolist()
      [[[2.0, 3.0]]]

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """
    fixed = None if subspace.T_fixed is None else fixed_rows(ids, subspace)
    if subspace.PE is None:
        return fixed
    n = ids.shape[-1]
    if n > len(subspace.PE):
        raise ValueError(f"the sequence has {n} tokens and PE {len(subspace.PE)} positions; pass a longer PE")
    PE = jnp.broadcast_to(subspace.PE[:n], (*ids.shape, subspace.PE.shape[-1]))
    return PE if fixed is None else fixed + PE


def subspace_coordinates(X: jax.Array, ids: jax.Array, subspace: Subspace) -> jax.Array:
    """C = (X - T_fixed[ids] - PE) U, what is sent.

    Args:
      X: (b, n, d), a residual stream.
      ids: integers (b, n), of its tokens.
      subspace: of the network.

    Returns:
      (b, n, k) in the dtype of X, summed in float32 at least.

    Example:
      >>> subspace = random_subspace(key=jax.random.key(0), vocab_size=10, width=6, rank=2)
      >>> ids, C = jnp.array([[4, 7]]), jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
      >>> bool(jnp.allclose(subspace_coordinates(subspace_reconstruct(C, ids, subspace), ids, subspace), C, atol=1e-5))
      True

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """
    fixed = fixed_embedding(ids, subspace)
    moved = X if fixed is None else X - jax.lax.stop_gradient(fixed).astype(X.dtype)
    return times(moved, jax.lax.stop_gradient(subspace.U))


def subspace_reconstruct(C: jax.Array, ids: jax.Array, subspace: Subspace) -> jax.Array:
    """X = C U^T + T_fixed[ids] + PE, what the receiver makes of it.

    Args:
      C: (b, n, k), from `subspace_coordinates`.
      ids: integers (b, n).
      subspace: of the network.

    Returns:
      (b, n, d) in the dtype of C.

    Example: see `subspace_coordinates`.

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """
    X, fixed = times(C, jax.lax.stop_gradient(subspace.U).T), fixed_embedding(ids, subspace)
    return X if fixed is None else X + jax.lax.stop_gradient(fixed).astype(X.dtype)


def subspace_model(
    embed: Callable[..., jax.Array], block: Callable[..., jax.Array], head: Callable[..., jax.Array], subspace: Subspace
) -> StageModel:
    """A subspace network for the pipelines: its activations are {"x": X, "ids": ids}, and every stage relays the ids.

    Args:
      embed: (parameters, ids, U, fixed) -> X, as that of `models.gpt_stages`.
      block: (parameters, X, U) -> X.
      head: (parameters, X, targets) -> loss.
      subspace: of the network.

    Returns:
      The model; use it with `subspace_codec` forwards and `subspace_gradient_codec` backwards, or with neither.

    Example:
      >>> subspace = random_subspace(key=jax.random.key(0), vocab_size=5, width=4, rank=2)
      >>> model = subspace_model(
      ...     embed=lambda E, ids, U, fixed: E[ids] @ U.T + fixed,
      ...     block=lambda Z, X, U: X + jnp.tanh(X) @ Z @ U.T,
      ...     head=lambda w, X, targets: jnp.mean((X @ w - targets) ** 2),
      ...     subspace=subspace,
      ... )
      >>> x = model.block(jnp.ones((4, 2)), model.embed(jnp.ones((5, 2)), jnp.array([[0, 3]])))
      >>> x["x"].shape, x["ids"].tolist()
      ((1, 2, 4), [[0, 3]])

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """
    return StageModel(
        lambda params, ids: {"x": embed(params, ids, subspace.U, fixed_embedding(ids, subspace)), "ids": ids},
        lambda params, x: {**x, "x": block(params, x["x"], subspace.U)},
        lambda params, x, targets: head(params, x["x"], targets),
    )


def fixed_rows(ids: jax.Array, subspace: Subspace) -> jax.Array:
    """T_fixed[ids], (..., d)."""
    rows = subspace.T_fixed[ids.astype(jnp.int32)]
    if not jnp.issubdtype(rows.dtype, jax.dtypes.prng_key):
        return rows
    width = len(subspace.U)
    drawn = jax.vmap(lambda key: jax.random.normal(key, (width,)))(rows.reshape(-1))
    return subspace.embedding_std * drawn.reshape(*ids.shape, width)
