"""Geometry of the simplex equiangular tight frame (ETF): K unit vectors with all pairwise cosines -1/(K-1).

Symbols: K classes, d features, M = I - (1/K) 1 1^T (K x K, rank K-1), q = 1/sqrt(K) the null direction of M,
H the Helmert basis (K x (K-1)) with H H^T = M and H^T H = I.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import widen
from jaxlib_methods._core.linalg import haar, matmul

__all__ = [
    "centering_matrix",
    "distance_to_nearest_etf",
    "etf_weights",
    "helmert_basis",
    "simplex_etf",
]


def check_frame_size(num_classes: int, num_features: int) -> None:
    """Raises ValueError unless K >= 2 and d >= K - 1 (the ETF spans K - 1 dimensions)."""
    checks.at_least(2, num_classes=num_classes, remedy="a simplex needs two vertices")
    if num_features < num_classes - 1:
        raise ValueError(
            f"a simplex ETF of {num_classes} classes spans {num_classes - 1} dimensions, "
            f"got num_features={num_features}; widen the features or use fewer classes"
        )


def centering_matrix(num_classes: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The projection M = I - (1/K) 1 1^T onto vectors that sum to zero.

    Args:
      num_classes: K.
      dtype: floating type of the result.

    Returns:
      M, shape (K, K), symmetric, idempotent, rank K - 1.

    Example:
      >>> M = centering_matrix(3)
      >>> bool(abs(M @ M - M).max() < 1e-6)
      True
    """
    return jnp.asarray(np.eye(num_classes) - 1.0 / num_classes, dtype)


def helmert_basis(num_classes: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """An orthonormal basis H of the vectors that sum to zero: H H^T = M, H^T H = I.

    Column k (k = 1..K-1) is (1, ..., 1, -k, 0, ..., 0) / sqrt(k (k+1)) with k ones. It replaces the K-th direction of a
    frame where there are only d = K - 1 features.

    Args:
      num_classes: K.
      dtype: floating type of the result.

    Returns:
      H, shape (K, K - 1).

    Example:
      >>> H = helmert_basis(4)
      >>> bool(abs(H @ H.T - centering_matrix(4)).max() < 1e-6)
      True
    """
    k = np.arange(1, num_classes)
    columns = np.triu(np.ones((num_classes, num_classes - 1)))
    columns[k, k - 1] = -k
    return jnp.asarray(columns / np.sqrt(k * (k + 1.0)), dtype)


def etf_weights(frame: jax.Array) -> jax.Array:
    """Classifier weights W = sqrt(K/(K-1)) M U^T of the simplex ETF that the frame U spans.

    Args:
      frame: U, shape (..., d, K), with U^T U = I (or U M = U with orthonormal rows of U H when d = K - 1).

    Returns:
      W, shape (..., K, d): unit rows, W W^T = K/(K-1) M, 1^T W = 0.

    Example:
      >>> import jax.numpy as jnp
      >>> W = etf_weights(jnp.eye(5, 3))
      >>> [round(float(x), 4) for x in (W @ W.T)[0]]
      [1.0, -0.5, -0.5]

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """
    K = frame.shape[-1]
    W = jnp.swapaxes(frame, -1, -2)
    return math.sqrt(K / (K - 1)) * (W - jnp.mean(W, axis=-2, keepdims=True))


def simplex_etf(
    num_classes: int,
    num_features: int,
    *,
    key: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """A simplex ETF with unit rows: the canonical one, or a uniformly random rotation of it.

    W = sqrt(K/(K-1)) M U^T with U = I_{d x K}; U = I_{d x (K-1)} H^T when d = K - 1.

    Args:
      num_classes: K >= 2.
      num_features: d >= K - 1.
      key: a typed key draws U uniformly; None gives the canonical frame.
      dtype: floating type of the result.

    Returns:
      W, shape (K, d).

    Raises:
      ValueError: K < 2 or d < K - 1.

    Example:
      >>> W = simplex_etf(10, 64)
      >>> W.shape, round(float(W[0] @ W[1]), 4)
      ((10, 64), -0.1111)

    Source: Papyan, Han, Donoho (PNAS 2020), arXiv:2008.08186 [papyan2020prevalence].
    """
    check_frame_size(num_classes, num_features)
    thin = min(num_classes, num_features)
    U = jnp.eye(num_features, thin, dtype=dtype) if key is None else haar(key, (num_features, thin), dtype)
    if num_features == num_classes - 1:
        U = matmul(U, helmert_basis(num_classes, dtype).T)
    return etf_weights(U)


def distance_to_nearest_etf(vectors: jax.Array) -> jax.Array:
    """Squared Frobenius distance from K vectors, scaled to ||Y||_F = 1, to the closest unit-Frobenius simplex ETF.

    min_U ||Y - U M / sqrt(K-1)||_F^2 = 2 - 2/sqrt(K-1) ||Y M||_* (nuclear norm): the minimum over rotations is an
    orthogonal Procrustes problem whose optimal inner product is the sum of singular values.

    Args:
      vectors: (..., d, K), one vector a column (centred class means, or transposed classifier weights), d >= K - 1.

    Returns:
      The distance, shape (...), in [0, 2]; zero exactly at a simplex ETF.

    Raises:
      ValueError: K < 2 or d < K - 1.

    Example:
      >>> W = simplex_etf(4, 6)
      >>> bool(abs(distance_to_nearest_etf(W.T)) < 1e-6)
      True

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248; the closed form is this library's
    [markou2024guiding].
    """
    d, K = vectors.shape[-2:]
    check_frame_size(K, d)
    checks.floating(vectors=vectors)
    Y = widen(vectors)
    norm = jnp.sqrt(jnp.sum(Y * Y, axis=(-2, -1), keepdims=True))
    YM = (Y - jnp.mean(Y, axis=-1, keepdims=True)) / jnp.maximum(norm, 1e-12)
    nuclear = jnp.sum(jnp.linalg.svd(YM, compute_uv=False), axis=-1)
    return 2.0 - 2.0 / math.sqrt(K - 1) * nuclear
