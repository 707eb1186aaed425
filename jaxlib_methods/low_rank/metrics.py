"""How low the rank of a weight is: counts that do not need a threshold."""

import jax
import jax.numpy as jnp

from jaxlib_methods._core.dtypes import widen

__all__ = [
    "effective_rank",
    "stable_rank",
]


def _singular_values(W: jax.Array) -> jax.Array:
    if W.ndim < 2 or not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(f"W must be a real matrix (..., m, n), got shape {W.shape} of {W.dtype}")
    return jnp.linalg.svd(widen(W), compute_uv=False)


def stable_rank(W: jax.Array) -> jax.Array:
    """||W||_F^2 / ||W||_2^2: how many singular values as large as the largest would have the same Frobenius norm.

    Args:
      W: (..., m, n), real.

    Returns:
      Between 1 and the rank, shape (...), float32 or float64; 0 for a zero matrix.

    Raises:
      ValueError: W is not a real matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> float(stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))))
      1.5

    Source: Dolatabadi et al. (2026), arXiv:2603.03597 [dolatabadi2026numuon].
    """
    s = _singular_values(W)
    s = s / jnp.where(s[..., :1] > 0, s[..., :1], 1)
    return jnp.sum(s * s, axis=-1)


def effective_rank(W: jax.Array) -> jax.Array:
    """exp(H(p)) with p = sigma / sum sigma, the singular values taken as probabilities.

    Args:
      W: (..., m, n), real.

    Returns:
      Between 1 and the rank, shape (...), float32 or float64; 0 for a zero matrix.

    Raises:
      ValueError: W is not a real matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(effective_rank(jnp.diag(jnp.array([1.0, 1.0, 0.0])))), 4)
      2.0

    Source: Roy, Vetterli (EUSIPCO 2007) [roy2007effective].
    """
    s = _singular_values(W)
    total = jnp.sum(s, axis=-1, keepdims=True)
    p = s / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)
