r"""Moving the subspace of a subspace network towards its gradients, between optimizer steps; off in all released code.

Symbols as in `subspaces`. Sigma (d, d) is the mean over tokens of g^T g for gradients g of the residual stream. The
codec of gradients sums up Y = Sigma U (`subspace_gradient_codec(track=True)`), all stages average it, take the same
`grassmann_step`, and express their weights and first moments in the new basis with `change_basis`. U and T_fixed are
constants of a compiled pipeline, so that a move builds it anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods._core.linalg import orthonormal
from jaxlib_methods.typing import PyTree

__all__ = [
    "MomentState",
    "change_basis",
    "gradient_moment",
    "grassmann_step",
]


class MomentState(NamedTuple):
    """What the sender of gradients sums up between two moves of the subspace."""

    Y: jax.Array  # float32 (d, k): sum over the messages of Sigma U
    count: jax.Array  # int32 []: messages


def gradient_moment(G: jax.Array, U: jax.Array) -> jax.Array:
    r"""Y = Sigma U for $\Sigma$ = mean over tokens of g^T g, without forming Sigma; average it over a window.

    Args:
      G: (..., d), gradients of the residual stream before they are coded.
      U: (d, k).

    Returns:
      (d, k), in float32 at least.

    Example:
      >>> gradient_moment(jnp.array([[1.0, 1.0]]), jnp.array([[1.0], [0.0]])).tolist()
      [[1.0], [1.0]]

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260; our reading
    [ramasinghe2025protocol].
    """
    g = G.reshape(-1, G.shape[-1])
    g = g.astype(compute_dtype(g.dtype))
    return times(g.T, times(g, U.astype(g.dtype))) / len(g)


def grassmann_step(U: jax.Array, Y: jax.Array, step_size: jax.typing.ArrayLike) -> jax.Array:
    r"""One step of gradient descent on $\operatorname{tr}((I - U U^T) \Sigma)$ over the Grassmann manifold.

    $$D = -2 (I - U U^T) \Sigma U, \qquad U \leftarrow \mathrm{qf}(U - \eta D),$$

    with the Q factor whose R has a positive diagonal. Every eigenspace of Sigma is stationary, the worst one too.

    Args:
      U: (d, k), orthonormal columns.
      Y: Sigma U, (d, k): the Y of a `MomentState`, averaged over messages and stages.
      step_size: eta.

    Returns:
      The next U. All stages must take it between the same two optimizer steps, with `change_basis`.

    Example:
      >>> U = jnp.array([[1.0], [0.0]])
      >>> [round(float(u), 6) for u in grassmann_step(U, jnp.array([[1.0], [1.0]]), 0.1)[:, 0]]
      [0.980581, 0.196116]

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260; our reading
    [ramasinghe2025protocol].
    """
    D = -2 * (Y - times(U, times(U.T, Y)))
    return orthonormal(U - jnp.asarray(step_size, U.dtype) * D)


def change_basis(tree: PyTree, U_old: jax.Array, U_new: jax.Array, constrained: PyTree) -> PyTree:
    """Z (U_old^T U_new) for all coordinates of a tree: parameters, or first moments of an optimizer.

    It is the projection of Z U_old^T onto the new subspace: lossless only where the two span the same.

    Args:
      tree: parameters, or a tree of the same structure.
      U_old: (d, k).
      U_new: (d, k).
      constrained: bools of that structure: which leaves (..., k) are coordinates. Second moments that are shared by
        rows stay as they are.

    Returns:
      The tree.

    Example:
      >>> U_old, U_new = jnp.eye(2), jnp.array([[0.0, 1.0], [1.0, 0.0]])
      >>> change_basis({"z": jnp.array([[1.0, 2.0]])}, U_old, U_new, {"z": True})["z"].tolist()
      [[2.0, 1.0]]

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260; our reading
    [ramasinghe2025protocol].
    """
    R = times(U_old.T, U_new)
    return jax.tree.map(lambda leaf, moves: times(leaf, R) if moves else leaf, tree, constrained)


# -------------------------------------------------------------------------------------- linear algebra


def times(a: jax.Array, B: jax.Array) -> jax.Array:
    return product(a, B).astype(a.dtype)


def product(a: jax.Array, B: jax.Array) -> jax.Array:
    """a @ B in float32 at least; in full precision, since a default of bfloat16 or TF32 passes would leave span(U)."""
    return jnp.matmul(a, B.astype(a.dtype), precision="highest", preferred_element_type=compute_dtype(a.dtype))
