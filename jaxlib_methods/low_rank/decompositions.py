"""Low-rank factors of one linear layer y = x W: plain, scaled by the activations, whitened by the activations.

Symbols, for a kernel W (fan_in x fan_out) and inputs X (tokens x fan_in); the papers write the transpose, W^T X^T:
  plain SVD   W          = U Sigma V^T          W_k = U_k Sigma_k V_k^T            least ||W - W_k||_F
  ASVD        diag(s) W  = U Sigma V^T          W_k = diag(s)^-1 U_k Sigma_k V_k^T with s_j = (mean |X_j|)^alpha
  SVD-LLM     S^T W      = U Sigma V^T          W_k = S^-T U_k Sigma_k V_k^T       least ||X W - X W_k||_F
where S S^T = X^T X, so that ||X (W - W_k)||_F^2 = ||S^T (W - W_k)||_F^2 = sum of the squared singular values left out.

The layer is stored as A = (...) U_k Sigma_k^1/2 (fan_in x k) and B = Sigma_k^1/2 V_k^T (k x fan_out). All of it is
computed in float64 on the host, by LAPACK: it is done once per layer, and X^T X is often close to singular.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core import checks

__all__ = [
    "LowRank",
    "asvd",
    "rank_for_keep",
    "svd_llm",
    "truncated_svd",
    "whitening_factor",
]

_SHIFT = 1e-6  # what an indefinite Gram matrix is lifted above zero by, relative to its mean eigenvalue


class LowRank(NamedTuple):
    """A linear layer as two, x A B."""

    A: jax.Array  # [fan_in, k], in the type of the kernel
    B: jax.Array  # [k, fan_out]

    @property
    def kernel(self) -> jax.Array:
        """A B, [fan_in, fan_out], multiplied in float64."""
        return jnp.asarray(np.asarray(self.A, np.float64) @ np.asarray(self.B, np.float64), self.A.dtype)


def rank_for_keep(fan_in: int, fan_out: int, keep: float) -> int:
    """The rank whose factors have a share `keep` of the kernel's entries: floor(m n keep / (m + n)).

    Args:
      fan_in: m.
      fan_out: n.
      keep: share of the parameters that remains, in (0, 1]; SVD-LLM's command line takes 1 - keep.

    Returns:
      k, at least 1.

    Raises:
      ValueError: a share outside (0, 1].

    Example:
      >>> rank_for_keep(768, 3072, 0.8)
      491

    Source: Wang, Zheng, Wan, Zhang (ICLR 2025), arXiv:2403.07378, official code [wang2025svdllm].
    """
    checks.within("(0, 1]", remedy="the share of the parameters that remains", keep=keep)
    # 0.8 * 768 * 3072 / 3840 is an integer plus round-off for many sizes: that integer is meant.
    return max(1, math.floor(fan_in * fan_out * keep / (fan_in + fan_out) + 1e-9))


def truncated_svd(W: jax.typing.ArrayLike, rank: int) -> LowRank:
    """The closest kernel of a given rank: U_k Sigma_k V_k^T of W.

    Args:
      W: kernel [fan_in, fan_out].
      rank: k, 1 to min(fan_in, fan_out).

    Returns:
      A and B with ||W - A B||_F^2 = the sum of the squared singular values left out.

    Raises:
      ValueError: W is not a matrix, or a rank out of range.

    Example:
      >>> [round(float(entry), 3) for entry in np.diagonal(truncated_svd(np.diag([3.0, 2.0, 1.0]), 2).kernel)]
      [3.0, 2.0, 0.0]

    Source: Eckart, Young (Psychometrika 1936) [eckart1936approximation].
    """
    W64 = _kernel(W, rank)
    return _factors(W64, rank, lambda U: U, W)


def asvd(W: jax.typing.ArrayLike, mean_abs: jax.typing.ArrayLike, rank: int, *, exponent: float = 0.5) -> LowRank:
    """Activation-aware SVD: input channels with large activations are fitted better.

    Args:
      W: kernel [fan_in, fan_out].
      mean_abs: [fan_in], mean |X_j| over the calibration tokens.
      rank: k.
      exponent: alpha; 0 is the plain SVD. Channels without activation count as the smallest one that has some.

    Returns:
      A and B, the scaling folded into A.

    Raises:
      ValueError: W is not a matrix, a rank out of range, means of the wrong shape or negative.

    Example:
      >>> W = np.array([[1.0, 0.0], [0.0, 1.1]])
      >>> asvd(W, np.array([9.0, 1.0]), 1).kernel.round(3).tolist()
      [[1.0, 0.0], [0.0, 0.0]]

    Source: Yuan et al. (2023), arXiv:2312.05821 [yuan2023asvd].
    """
    W64 = _kernel(W, rank)
    means = np.asarray(mean_abs, np.float64)
    if means.shape != W64.shape[:1] or not (means >= 0).all():
        raise ValueError(f"mean_abs must be {W64.shape[0]} means of absolute values, got shape {means.shape}")
    if not means.any():
        means = np.ones_like(means)
    s = np.where(means > 0, means, means[means > 0].min())[:, None] ** exponent
    return _factors(s * W64, rank, lambda U: U / s, W)


def whitening_factor(gram: jax.typing.ArrayLike) -> np.ndarray:
    """S with S S^T = X^T X, lower triangular, in float64.

    A Gram matrix that is not positive definite in floating point is shifted by -lambda_min + 1e-6 (times its mean
    eigenvalue, so that the shift does not depend on the units of the activations).

    Args:
      gram: X^T X [fan_in, fan_in].

    Returns:
      S [fan_in, fan_in].

    Raises:
      ValueError: not a square matrix, or not finite.

    Example:
      >>> whitening_factor(np.array([[4.0, 2.0], [2.0, 2.0]])).tolist()
      [[2.0, 0.0], [1.0, 1.0]]

    Source: Wang, Zheng, Wan, Zhang (ICLR 2025), arXiv:2403.07378, official code [wang2025svdllm].
    """
    gram = np.asarray(gram, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not np.isfinite(gram).all():
        raise ValueError(f"gram must be a finite square matrix X^T X, got shape {gram.shape}")
    gram = (gram + gram.T) / 2
    scale = np.trace(gram) / len(gram) or 1.0
    shift = 0.0
    try:
        S = np.linalg.cholesky(gram)
        # A factorisation that barely succeeds has a pivot of round-off: dividing by it would amplify noise.
        if np.diagonal(S).min() ** 2 > len(gram) * np.finfo(np.float64).eps * scale:
            return S
    except np.linalg.LinAlgError:
        pass
    shift = max(-np.linalg.eigvalsh(gram)[0], 0.0) + _SHIFT * scale
    return np.linalg.cholesky(gram + shift * np.eye(len(gram)))


def svd_llm(W: jax.typing.ArrayLike, gram: jax.typing.ArrayLike, rank: int) -> LowRank:
    """The kernel of a given rank with the closest outputs: least ||X W - X W_k||_F, by truncation-aware whitening.

    Args:
      W: kernel [fan_in, fan_out].
      gram: X^T X [fan_in, fan_in], summed over the calibration tokens; any positive multiple of it gives the same.
      rank: k.

    Returns:
      A and B with ||X (W - A B)||_F^2 = the sum of the squared singular values of S^T W left out.

    Raises:
      ValueError: W is not a matrix, a rank out of range, a Gram matrix of the wrong shape.

    Example:
      >>> W, X = np.eye(2), np.array([[1.0, 0.0], [0.0, 3.0]])
      >>> svd_llm(W, X.T @ X, 1).kernel.round(3).tolist()  # the second input is the larger one
      [[0.0, 0.0], [0.0, 1.0]]

    Source: Wang, Zheng, Wan, Zhang (ICLR 2025), arXiv:2403.07378, Algorithm 1 [wang2025svdllm].
    """
    W64 = _kernel(W, rank)
    if np.shape(gram) != (W64.shape[0],) * 2:
        raise ValueError(f"gram must have the shape {(W64.shape[0],) * 2} of the kernel's inputs, got {np.shape(gram)}")
    S = whitening_factor(gram)
    return _factors(S.T @ W64, rank, lambda U: np.linalg.solve(S.T, U), W)


def _kernel(W: jax.typing.ArrayLike, rank: int) -> np.ndarray:
    W64 = np.asarray(W, np.float64)
    if W64.ndim != 2:
        raise ValueError(f"W must be a kernel [fan_in, fan_out], got shape {W64.shape}")
    if not 1 <= rank <= min(W64.shape):
        raise ValueError(f"rank must be between 1 and min{W64.shape} = {min(W64.shape)}, got {rank}")
    return W64


def _factors(scaled: np.ndarray, rank: int, unscale, W: jax.typing.ArrayLike) -> LowRank:
    U, sigma, Vt = np.linalg.svd(scaled, full_matrices=False)
    root = np.sqrt(sigma[:rank])
    dtype = jnp.asarray(W).dtype
    return LowRank(jnp.asarray(unscale(U[:, :rank] * root), dtype), jnp.asarray(root[:, None] * Vt[:rank], dtype))
