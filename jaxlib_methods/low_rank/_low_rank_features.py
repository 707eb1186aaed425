r"""Features of low rank: a layer's activations are pulled into one affine subspace while the network trains.

A virtual layer (W, b) with rank(W) = r, which exists in training alone, reconstructs the activations a of a layer. The
task's loss gets two terms more,

.. math:: L_c = \frac1n \sum_i \|W^T (a_i + b) - (a_i + b)\|_2^2, \qquad L_n = \frac1n \sum_i |1 - \|a_i\|_2|,

the second against the trivial solution a = b = 0. W and b are trained like the network, W starts as a projection of the
identity, and every few steps it is replaced by its best approximation of rank r:

    penalty = low_rank_penalty(features, extra["W"], extra["b"])
    loss = task_loss + jnp.mean(penalty.projection + penalty.norm)
    optimizer = optax.chain(optax.adam(1e-3), optax.masked(keep_rank(5, every=10), is_W))
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import widen
from jaxlib_methods._core.linalg import matmul, on_whole_matrices
from jaxlib_methods.typing import PyTree


class LowRankPenalty(NamedTuple):
    """The two terms of each example."""

    projection: jax.Array  # [...], ||W^T (a + b) - (a + b)||^2
    norm: jax.Array  # [...], |1 - ||a|||


def low_rank_penalty(features: jax.Array, W: jax.Array, b: jax.Array) -> LowRankPenalty:
    r"""How far each example's features are from the subspace that W keeps, and from the unit sphere.

    For an orthogonal projector W the gradient of the first term, :math:`2 (a + b)(I - W)`, has no part inside of the
    subspace. The second has gradient 0 where a = 0.

    Args:
      features: the activations a, [..., m].
      W: of the virtual layer, [m, m].
      b: of the virtual layer, [m].

    Returns:
      The two terms, each [...].

    Raises:
      ValueError: W or b does not fit the features.

    Example:
      >>> penalty = low_rank_penalty(jnp.array([[3.0, 4.0]]), jnp.diag(jnp.array([1.0, 0.0])), jnp.zeros(2))
      >>> float(penalty.projection[0]), float(penalty.norm[0])
      (16.0, 4.0)

    Source: Sanyal, Kanade, Torr, Dokania (2018), arXiv:1804.07090 [sanyal2018robustness].
    """
    m = features.shape[-1]
    if W.shape != (m, m) or b.shape != (m,):
        raise ValueError(f"W must be [{m}, {m}] and b [{m}] for features of width {m}, got {W.shape} and {b.shape}")
    shifted = features + jnp.broadcast_to(b, features.shape)
    residual = matmul(shifted, W) - shifted
    squares = jnp.sum(features * features, axis=-1)
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return LowRankPenalty(jnp.sum(residual * residual, axis=-1), jnp.abs(1 - norm))


def project_rank(W: jax.Array, rank: int) -> jax.Array:
    """The nearest matrix of at most this rank, in the Frobenius and the spectral norm: the truncated SVD.

    The paper approximates it by an average of column-sampled Nystroem approximations, for widths where an SVD every few
    steps is too dear; to 4096 columns it is not.

    Args:
      W: [..., m, n].
      rank: at least 1.

    Returns:
      [..., m, n], in W's dtype.

    Raises:
      ValueError: the rank is below 1.

    Example:
      >>> project_rank(jnp.diag(jnp.array([3.0, 1.0])), 1).tolist()
      [[3.0, 0.0], [0.0, 0.0]]

    Source: Sanyal, Kanade, Torr, Dokania (2018), arXiv:1804.07090 [sanyal2018robustness].
    """
    checks.at_least(1, rank=rank)

    def truncated(W: jax.Array) -> jax.Array:
        U, s, Vt = jnp.linalg.svd(widen(W), full_matrices=False)
        return matmul(U[..., :rank] * s[..., None, :rank], Vt[..., :rank, :]).astype(W.dtype)

    return on_whole_matrices(truncated, W)


class KeepRankState(NamedTuple):
    """State of `keep_rank`."""

    count: jax.Array  # int32 []: updates done


def keep_rank(rank: int, *, every: int = 10) -> optax.GradientTransformationExtraArgs:
    """Last in a chain: every few updates the parameters that come of it are replaced by `project_rank` of them.

    Args:
      rank: of every leaf, which must be a matrix; mask the others out with `optax.masked`.
      every: updates from one projection to the next, the first one included: 10 in the paper.

    Returns:
      A transformation whose `update` needs the parameters.

    Raises:
      ValueError: rank or every is below 1, or `update` is called without parameters.

    Example:
      >>> tx = keep_rank(1, every=1)
      >>> W = jnp.diag(jnp.array([3.0, 1.0]))
      >>> optax.apply_updates(W, tx.update(jnp.zeros((2, 2)), tx.init(W), W)[0]).tolist()
      [[3.0, 0.0], [0.0, 0.0]]

    Source: Sanyal, Kanade, Torr, Dokania (2018), arXiv:1804.07090 [sanyal2018robustness].
    """
    checks.at_least(1, rank=rank, every=every)

    def init(params: PyTree) -> KeepRankState:
        del params
        return KeepRankState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: KeepRankState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, KeepRankState]:
        del extra_args
        if params is None:
            raise ValueError("keep_rank needs the parameters; call update(updates, state, params)")
        projected = lambda: jax.tree.map(lambda u, p: project_rank(p + u, rank) - p, updates, params)
        updates = jax.lax.cond(state.count % every == 0, projected, lambda: updates)
        return updates, KeepRankState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
