"""The simplex ETF nearest to given class means, in closed form.

Symbols: Y (d x K) class means scaled to ||Y||_F = 1, M = I - 1 1^T / K, U (d x K) with U^T U = I, U_prox the frame
of the previous step. The inner problem of the paper,

  U* = argmin_{U^T U = I} ||Y - U M / sqrt(K-1)||_F^2 + delta/2 ||U - U_prox||_F^2,

is solved there by Riemannian trust regions. On the manifold ||U M||_F^2 = K-1 and ||U||_F^2 = K are constants, which
leaves an orthogonal Procrustes problem:

  A = 2/sqrt(K-1) Y M + delta U_prox,   U* = polar(A).

The minimiser is unique when rank(A) = K, which delta > 0 ensures: M q = 0 for q = 1/sqrt(K), so A q = delta U_prox q.
"""

import math

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import widen
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.classifiers._polar import polar
from jaxlib_methods.classifiers.simplex import check_frame_size, helmert_basis
from jaxlib_methods.typing import PolarMethod

FIRST_DELTA = 1e-6


def _target(Y: jax.Array, prox: jax.Array, delta: float) -> jax.Array:
    """A = 2/sqrt(K-1) Y M + delta U_prox, d x K; multiplied by H from the right, d x (K-1), when d = K - 1."""
    d, K = Y.shape[-2:]
    YM = Y - jnp.mean(Y, axis=-1, keepdims=True)
    A = 2.0 / math.sqrt(K - 1) * YM + delta * prox
    return matmul(A, helmert_basis(K, A.dtype)) if d == K - 1 else A


def _frame(A: jax.Array, K: int, method: PolarMethod | None, condition: float | None) -> jax.Array:
    U = polar(A, method=method, condition=condition)
    return matmul(U, helmert_basis(K, A.dtype).T) if A.shape[-1] == K - 1 else U


def scale_to_unit_norm(class_means: jax.Array) -> jax.Array:
    """Y = Z / ||Z||_F with a finite derivative at Z = 0."""
    square = jnp.sum(class_means * class_means, axis=(-2, -1), keepdims=True)
    return class_means / jnp.sqrt(jnp.maximum(square, 1e-24))


def first_prox(Y: jax.Array) -> jax.Array:
    """U_prox of the very first step: the solution without proximal term, completed from eye(d, K).

    The limit delta -> 0 of polar(2/sqrt(K-1) Y M + delta eye): R = polar(Y H) on the sum-zero directions and, along
    q, what R leaves of eye q. A small delta instead would leave that direction to round-off.
    """
    d, K = Y.shape[-2:]
    H = helmert_basis(K, Y.dtype)
    eye = jnp.eye(d, K, dtype=Y.dtype)
    # Means of rank below K - 1 are completed from eye as well, hence the tiny weight, and only an SVD bears that rank.
    B = 2.0 / math.sqrt(K - 1) * matmul(Y, H) + FIRST_DELTA * jnp.broadcast_to(matmul(eye, H), (*Y.shape[:-1], K - 1))
    R = polar(B, method="svd")
    U = matmul(R, H.T)
    if d >= K:
        outside = lambda x: x - matmul(R, matmul(jnp.swapaxes(R, -1, -2), x))
        norm = lambda x: jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))
        e = jnp.broadcast_to(jnp.sum(eye, axis=1, keepdims=True) / math.sqrt(K), (*Y.shape[:-1], 1))
        # Where R holds that direction already: the coordinate axis that R holds least of.
        axis = jax.nn.one_hot(jnp.argmin(jnp.sum(R * R, axis=-1), axis=-1), d, dtype=Y.dtype)[..., None]
        u = outside(jnp.where(norm(outside(e)) < 1e-3, axis, e))
        u = outside(u / norm(u))  # twice is enough
        U = U + u / norm(u) / math.sqrt(K)  # u q^T
    return jax.lax.stop_gradient(U)


def nearest_etf(
    class_means: jax.Array,
    prox: jax.Array | None = None,
    *,
    proximal_weight: float = 1e-3,
    normalize: bool = True,
    method: PolarMethod | None = None,
) -> jax.Array:
    """The frame U* of the simplex ETF nearest to the class means; differentiable, exact, O(dK + K^2) memory.

    U* = polar(2/sqrt(K-1) Y M + delta U_prox). For d = K - 1 features, U* = R H^T with R = polar(A H), H the Helmert
    basis.

    Args:
      class_means: Z, shape (..., d, K), one (centred) class mean a column.
      prox: U_prox, shape (..., d, K), the frame to stay close to; no gradient flows to it. None stands for the first
        step of a training run: U_prox is then itself the nearest frame, its free direction completed from eye(d, K).
      proximal_weight: delta > 0. Smaller follows the means more closely and conditions the problem worse:
        kappa(A) ~ 2 / (sqrt(K-1) delta).
      normalize: scale Z to unit Frobenius norm first (gradient flows through the norm), as training does.
      method: see `polar`.

    Returns:
      U*, shape (..., d, K): U*^T U* = I for d >= K; orthonormal on the sum-zero directions for d = K - 1.
      `etf_weights(U*)` are the classifier's weights.

    Raises:
      ValueError: d < K - 1, proximal_weight <= 0, shapes that disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> Z = jnp.array([[1.0, -1.0], [0.0, 0.0]])
      >>> U = nearest_etf(Z, jnp.eye(2))
      >>> round(float(jnp.degrees(jnp.arctan2(U[1, 0], U[0, 0]))), 3)
      44.96

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248; the closed form is this library's
    [markou2024guiding].
    """
    if class_means.ndim < 2 or not jnp.issubdtype(class_means.dtype, jnp.floating):
        raise ValueError(f"class_means must be floating (..., d, K), got {class_means.shape} of {class_means.dtype}")
    d, K = class_means.shape[-2:]
    check_frame_size(K, d)
    checks.positive(proximal_weight=proximal_weight, remedy="without the proximal term the frame is not unique")
    if prox is not None and prox.shape != class_means.shape:
        raise ValueError(f"prox must have the shape of class_means, got {prox.shape} and {class_means.shape}")
    Y = widen(class_means)
    if normalize:
        Y = scale_to_unit_norm(Y)
    U_prox = first_prox(Y) if prox is None else jax.lax.stop_gradient(prox.astype(Y.dtype))
    condition = 2.0 / (math.sqrt(K - 1) * proximal_weight) + 1.0
    return _frame(_target(Y, U_prox, proximal_weight), K, method, condition).astype(class_means.dtype)


def nearest_etf_objective(
    frame: jax.Array, class_means: jax.Array, prox: jax.Array, *, proximal_weight: float = 1e-3, normalize: bool = True
) -> jax.Array:
    """The objective that `nearest_etf` minimises: ||Y - U M/sqrt(K-1)||_F^2 + delta/2 ||U - U_prox||_F^2.

    Args:
      frame: U, shape (..., d, K).
      class_means: Z, shape (..., d, K).
      prox: U_prox, shape (..., d, K).
      proximal_weight: delta.
      normalize: scale Z to unit Frobenius norm first.

    Returns:
      The objective, shape (...).

    Example:
      >>> import jax.numpy as jnp
      >>> Z = jnp.diag(jnp.array([3.0, 2.0, 1.0])) @ (jnp.eye(3) - 1 / 3)
      >>> round(float(nearest_etf_objective(nearest_etf(Z, jnp.eye(3)), Z, jnp.eye(3))), 4)
      0.0683

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """
    K = frame.shape[-1]
    Y = scale_to_unit_norm(class_means) if normalize else class_means
    UM = frame - jnp.mean(frame, axis=-1, keepdims=True)
    fit = jnp.sum((Y - UM / math.sqrt(K - 1)) ** 2, axis=(-2, -1))
    return fit + proximal_weight / 2 * jnp.sum((frame - prox) ** 2, axis=(-2, -1))
