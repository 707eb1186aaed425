"""Linear algebra of stacks of matrices (..., m, n): products in full precision, orthonormal factors, Newton-Schulz."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_methods._core.dtypes import compute_dtype

# The default of accelerators rounds the factors to bfloat16 or TF32, after which no product is orthogonal.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def transpose(X: jax.Array) -> jax.Array:
    """X^T of each matrix of the stack."""
    return jnp.swapaxes(X, -1, -2)


def eye_like(X: jax.Array) -> jax.Array:
    """The identity in the last axis' size, X's type and rank."""
    return jnp.eye(X.shape[-1], dtype=X.dtype)[(None,) * (X.ndim - 2)]


def on_whole_matrices(f: Callable[..., jax.Array], *matrices: jax.Array) -> jax.Array:
    """f of arrays of one shape (..., m, n): matrices that are split over an explicit mesh are gathered for it.

    A decomposition is of a matrix as a whole. Stacks stay split over their leading axes, and the result is split as the
    arguments were.
    """
    sharding = jax.typeof(matrices[-1]).sharding
    if all(axis is None for axis in sharding.spec[-2:]):
        return f(*matrices)
    whole = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-2], None, None))
    return jax.sharding.reshard(f(*(jax.sharding.reshard(X, whole) for X in matrices)), sharding)


def orthonormal(A: jax.Array) -> jax.Array:
    """The Q of A = Q R whose R has a positive diagonal: the one that varies smoothly with A.

    Args:
      A: (..., m, n) with m >= n, float32 or float64.

    Returns:
      (..., m, n), Q^T Q = I.

    Example:
      >>> orthonormal(jnp.array([[-2.0], [0.0]])).tolist()
      [[-1.0], [0.0]]
    """
    Q, R = jnp.linalg.qr(A)
    signs = jnp.where(jnp.diagonal(R, axis1=-2, axis2=-1) < 0, -1, 1)
    return Q * signs.astype(Q.dtype)[..., None, :]


def haar(key: jax.Array, shape: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Matrices uniform on the (semi-)orthogonal ones: the orthonormal factor of a normal matrix.

    Args:
      key: typed key.
      shape: (..., m, n); orthonormal columns, or rows where m < n.
      dtype: of the result; drawn in float32 (float64).

    Returns:
      Matrices of that shape.

    Example:
      >>> W = haar(jax.random.key(0), (2, 5))
      >>> bool(jnp.allclose(W @ W.T, jnp.eye(2), atol=1e-6))
      True
    """
    *batch, m, n = shape
    Q = orthonormal(jax.random.normal(key, (*batch, max(m, n), min(m, n)), compute_dtype(dtype)))
    return (transpose(Q) if m < n else Q).astype(dtype)


def newton_schulz_step(X: jax.Array, gram: jax.Array, coefficients: Sequence[float | jax.Array]) -> jax.Array:
    """One step of Newton-Schulz: X (a + b G + c G^2), which maps each singular value s to a s + b s^3 + c s^5.

    Args:
      X: (..., m, n).
      gram: G = X^T X, (..., n, n).
      coefficients: (a, b) or (a, b, c); (3/2, -1/2) converges quadratically to the polar factor.

    Returns:
      Like X.

    Example:
      >>> X = jnp.diag(jnp.array([0.5, 1.0]))
      >>> jnp.diagonal(newton_schulz_step(X, X.T @ X, (1.5, -0.5))).tolist()
      [0.6875, 1.0]
    """
    a, b, *c = coefficients
    if not c:
        return a * X + b * matmul(X, gram)
    return a * X + matmul(X, b * gram + c[0] * matmul(gram, gram))
