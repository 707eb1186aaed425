"""The step in the nuclear-norm ball: top singular dyads of a matrix, and Newton-Schulz where all of them are wanted.

D = argmax <M, D> subject to ||D||_2 <= 1, ||D||_* <= tau
  = sum_i clip(tau - i, 0, 1) u_{i+1} v_{i+1}^T                                from M = U diag(sigma) V^T
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxlib_methods._core.linalg import matmul, newton_schulz_step, transpose
from jaxlib_methods.optimizers.block_krylov import block_krylov_svd
from jaxlib_methods.typing import KrylovMethod

__all__ = ["NewtonSchulzConfig", "nuclear_norm_lmo"]


@dataclasses.dataclass(frozen=True)
class NewtonSchulzConfig:
    """How Muon approximates a polar factor.

    Args:
      coefficients: a, b, c of a step X <- X (a + b G + c G^2), G = X^T X.
      num_steps: how often.
      eps: added to the norm that the matrix is divided by first.

    Example:
      >>> NewtonSchulzConfig().num_steps
      5

    Source: Jordan et al. (2024) [jordan2024muon].
    """

    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    num_steps: int = 5
    eps: float = 1e-8


def newton_schulz(M: jax.Array, config: NewtonSchulzConfig) -> jax.Array:
    """Muon's approximate polar factor of M (..., m, n) with m >= n."""
    X = M / (jnp.sqrt(jnp.sum(M * M, axis=(-2, -1), keepdims=True)) + jnp.asarray(config.eps, M.dtype))
    for _ in range(config.num_steps):
        X = newton_schulz_step(X, matmul(transpose(X), X), config.coefficients)
    return X


def spend(budget: jax.typing.ArrayLike, U: jax.Array, V: jax.Array) -> jax.Array:
    """sum_i w_i u_i v_i^T: the dyads count 1 while the budget lasts, and its fraction for the next one."""
    index = jnp.arange(U.shape[-1]).astype(U.dtype)[(None,) * (U.ndim - 1)]
    return matmul(U * jnp.clip(budget - index, 0, 1), transpose(V))


def nuclear_norm_lmo(
    M: jax.Array,
    budget: float | int,
    *,
    key: jax.Array,
    num_iterations: int = 2,
    oversampling: int = 8,
    method: KrylovMethod = "cholesky",
) -> jax.Array:
    """The step of NuMuon: D = argmax <M, D> subject to ||D||_2 <= 1 and ||D||_* <= tau.

    D = sum_i clip(tau - i, 0, 1) u_{i+1} v_{i+1}^T over the singular dyads of M: the largest floor(tau) of them, and
    the next one weighted by what is left. With tau = min(rows, columns) it is the polar factor, with tau = 1 the step
    of the nuclear-norm ball. <M, D> is the Ky Fan norm, the sum of the tau largest singular values.

    Args:
      M: (..., rows, columns), real; leading axes are a batch.
      budget: tau, in (0, min(rows, columns)]. Static.
      key: typed key, as are the remaining arguments, of `block_krylov_svd`.
      num_iterations: blocks of the Krylov space. Static.
      oversampling: columns beyond ceil(tau) in a block. Static.
      method: "cholesky" or "householder".

    Returns:
      D, of M's shape and type. Dyads whose singular value is round-off of the largest are left out: they would add
      noise and gain nothing. A zero matrix gives zero.

    Raises:
      ValueError: a budget out of range, and what `block_krylov_svd` refuses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> D = nuclear_norm_lmo(jnp.diag(jnp.array([10.0, 5.0, 2.0, 1.0])), 2.5, key=jax.random.key(0))
      >>> (jnp.diagonal(D).round(3) + 0.0).tolist()
      [1.0, 1.0, 0.5, 0.0]

    Source: Dolatabadi et al. (2026), arXiv:2603.03597 [dolatabadi2026numuon].
    """
    if M.ndim < 2:
        raise ValueError(f"M must be a matrix (..., rows, columns), got shape {M.shape}")
    d = min(M.shape[-2:])
    if not 0 < budget <= d:
        raise ValueError(
            f"budget must be in (0, min(rows, columns)] = (0, {d}], got {budget} for a matrix of shape {M.shape}"
        )
    k = math.ceil(budget)
    U, _, V = block_krylov_svd(M, k, key=key, num_iterations=num_iterations, oversampling=oversampling, method=method)
    return spend(float(budget), U, V).astype(M.dtype)
