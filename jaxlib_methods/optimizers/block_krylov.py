"""The k largest singular triplets of many matrices at once, by randomized block Krylov iteration.

Symbols: M (m x n) with m >= n (a wide matrix is transposed), k triplets, L iterations, p columns of oversampling,
b = min(n, k + p) columns in a block, B_0 (n x b) the block to start from.

  B_l = orth((I - Q Q^T) M^T M B_{l-1}),  Q = [B_1 ... B_{l-1}]          l = 1..L: an orthonormal basis of the Krylov
  Q   = [B_1 ... B_L]                                                   space of M^T M and B_0, n x bL
  T   = M Q;  T^T T = X diag(s^2) X^T;  V = Q X_k;  U = orth(T X_k)       Rayleigh-Ritz

Once b L >= n the space is everything: Q = I, and the result is the exact truncated decomposition. The projection makes
M B_{l-1}, computed for the next block, also a block of T: M is read 2L + 1 times, by b columns each.

Two ways of computing the factorisations, `method`:
  cholesky     orth by CholeskyQR and the eigenproblem of the small Gram matrix T^T T: matrix products, but for three
               factorisations of k + p to (k + p) L columns. Squaring T loses the singular vectors below sqrt(eps) s_1
               (2.4e-4 s_1 in float32) to round-off, not their orthonormality: the final orth restores it.
  householder  Householder QR and the thin SVD of T, as in the paper. The reference.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods._core.linalg import eye_like, matmul, orthonormal, transpose
from jaxlib_methods.typing import KrylovMethod

__all__ = ["BlockKrylovConfig", "block_krylov_svd"]

# Distance of a Gram matrix from I (Frobenius) from which one more pass of CholeskyQR ends at round-off.
_NEARLY_ORTHONORMAL = 0.5
_MAX_PASSES = 6  # each multiplies the smallest singular value by about 1 / sqrt(shift), 10^2 to 10^3 in float32


@dataclasses.dataclass(frozen=True)
class BlockKrylovConfig:
    """How an optimizer decomposes its momentum at every step.

    Args:
      num_iterations: L, blocks of the Krylov space.
      oversampling: p, columns beyond the rank in a block.
      warm_start: start from the last step's singular vectors.
      rank_buckets: increasing fractions in (0, 1]; a step costs what the first bucket that is not below the rank costs.
        A schedule above the last bucket is cut at it. None: the rank itself if it is a number, else 1/16, 1/8, 1/4,
        3/8, 1/2, 3/4 and 1. Every bucket is compiled: give those that the schedule visits.
      method: "cholesky" or "householder" (module docstring).

    Raises:
      ValueError: no iterations, a negative oversampling, an unknown method.

    Example:
      >>> BlockKrylovConfig(num_iterations=3).oversampling
      8
    """

    num_iterations: int = 2
    oversampling: int = 8
    warm_start: bool = True
    rank_buckets: tuple[float, ...] | None = None
    method: KrylovMethod = "cholesky"

    def __post_init__(self):
        checks.at_least(1, num_iterations=self.num_iterations)
        checks.not_negative(oversampling=self.oversampling)
        checks.one_of(KrylovMethod, method=self.method)

    def width(self, n: int, k: int) -> int:
        """b, the columns of a block for k triplets of a matrix with n columns."""
        return min(n, k + self.oversampling)

    def is_exact(self, n: int, k: int) -> bool:
        """Whether the Krylov space is everything, so that no block to start from is needed."""
        return self.num_iterations * self.width(n, k) >= n


def _column_norms(X: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(X * X, axis=-2, keepdims=True))


def _householder_orth(W: jax.Array, Q: jax.Array | None) -> jax.Array:
    return orthonormal(W if Q is None else jnp.concatenate([Q, W], axis=-1))[..., -W.shape[-1] :]


def _cholesky_orth(W: jax.Array, Q: jax.Array | None = None, alive: jax.Array | None = None) -> jax.Array:
    """An orthonormal basis of the columns of W, the leading ones kept best: W R^-1, repeated until it is orthonormal.

    One pass takes C = W^T W = R^T R and returns W R^-1. While C is far from I it is shifted, which keeps the
    factorisation from breaking down; a pass from ||C - I||_F < 1/2 is not, and ends at round-off. Columns that no pass
    can separate (zeros, exact copies), or that are not orthogonal to Q in the end, go to Householder's QR, which
    completes the basis.

    Args:
      W: (..., n, b).
      Q: (..., n, q), orthonormal; W has been projected on its complement.
      alive: (..., 1, b) of 0 and 1; columns with 0 are zero and stay so.
    """
    eye = eye_like(W)
    unit = jnp.finfo(W.dtype).eps
    dead = 0 if alive is None else eye * (1 - alive)

    def one_pass(W: jax.Array) -> tuple[jax.Array, jax.Array]:
        C = matmul(transpose(W), W) + dead
        distance = jnp.sqrt(jnp.sum((C - eye) ** 2, axis=(-2, -1), keepdims=True))
        size = jnp.sqrt(jnp.sum(C * C, axis=(-2, -1), keepdims=True))
        shift = jnp.where(distance < _NEARLY_ORTHONORMAL, 0, 8 * unit * size)
        R = jax.lax.linalg.cholesky(C + shift * eye, symmetrize_input=False)
        W = jax.lax.linalg.triangular_solve(R, W, left_side=False, lower=True, transpose_a=True)
        return W, jnp.max(distance)

    def another(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return *one_pass(carry[0]), carry[2] + 1

    norms = _column_norms(W)
    first = one_pass(W / jnp.where(norms > 0, norms, 1))
    # A breakdown makes the distance NaN: both comparisons are false then.
    orthonormal, distance, _ = jax.lax.while_loop(
        lambda carry: (carry[1] >= _NEARLY_ORTHONORMAL) & (carry[2] < _MAX_PASSES), another, (*first, jnp.int32(1))
    )
    good = distance < _NEARLY_ORTHONORMAL
    if Q is not None:
        good &= jnp.max(jnp.abs(matmul(transpose(Q), orthonormal))) < unit**0.5
    kept = 1 if alive is None else alive
    return jax.lax.cond(good, lambda: orthonormal * kept, lambda: _householder_orth(W, Q) * kept)


def _krylov_space(M: jax.Array, B: jax.Array, num_iterations: int, method: KrylovMethod) -> tuple[jax.Array, jax.Array]:
    """Q, an orthonormal basis of the Krylov space, and T = M Q."""
    orth = _cholesky_orth if method == "cholesky" else _householder_orth
    Q = B = orth(matmul(transpose(M), matmul(M, B)), None)
    products = []
    for _ in range(num_iterations - 1):
        MB = matmul(M, B)
        products.append(MB)
        outside = lambda Y, Q=Q: Y - matmul(Q, matmul(transpose(Q), Y))
        B = orth(outside(orth(outside(matmul(transpose(M), MB)), None)), Q)  # twice is enough
        Q = jnp.concatenate([Q, B], axis=-1)
    return Q, jnp.concatenate([*products, matmul(M, B)], axis=-1)


def svd_of_tall(
    M: jax.Array, k: int, B: jax.Array | None, config: BlockKrylovConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`block_krylov_svd` of M (..., m, n) with m >= n in float32 or float64; B is B_0, None where `config.is_exact`."""
    peak = jnp.max(jnp.abs(M), axis=(-2, -1), keepdims=True)
    peak = jnp.where(peak >= jnp.finfo(M.dtype).tiny, peak, 1)
    M = M / peak  # squares of very small or large entries leave the range
    Q, T = (None, M) if B is None else _krylov_space(M, B, config.num_iterations, config.method)
    if config.method == "cholesky":
        _, X = jnp.linalg.eigh(matmul(transpose(T), T), symmetrize_input=False)
        X = X[..., ::-1][..., :k]
        U = matmul(T, X)
        S = _column_norms(U)
    else:
        U, S, Xt = jnp.linalg.svd(T, full_matrices=False)
        U, S, X = U[..., :k], S[..., None, :k], transpose(Xt)[..., :k]
    round_off = max(M.shape[-2:]) * jnp.finfo(M.dtype).eps * S[..., :1]
    alive = (round_off < S).astype(M.dtype)
    U = _cholesky_orth(U * alive, alive=alive) if config.method == "cholesky" else U * alive
    V = X if Q is None else matmul(Q, X)
    return U, (S * peak)[..., 0, :], V


def block_krylov_svd(
    M: jax.Array,
    k: int,
    *,
    key: jax.Array,
    num_iterations: int = 2,
    oversampling: int = 8,
    start: jax.Array | None = None,
    method: KrylovMethod = "cholesky",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k largest singular values of M and their vectors, M ~ U diag(S) V^T, by randomized block Krylov iteration.

    U and V have orthonormal columns to round-off, whatever the accuracy of the triplets, so that <M, U V^T> never
    exceeds the sum of the k largest singular values by more than round-off. It equals that sum where num_iterations *
    min(k + oversampling, n) >= n, n = min(rows, columns): the result is exact then. In between it depends on the decay
    of the spectrum; without any (a Gaussian matrix) expect 0.96 of it from two iterations, and single vectors that are
    only loosely right. With the last V as `start`, repeated calls converge.

    Args:
      M: (..., rows, columns), real; leading axes are a batch, computed together. Half precision is computed in float32.
      k: number of triplets, 1 to min(rows, columns). Static.
      key: typed key of the Gaussian columns; the same key gives the same result on every device.
      num_iterations: L, blocks of the Krylov space. Static.
      oversampling: p, columns beyond k in a block. Static.
      start: (..., min(rows, columns), any number of columns), an estimate of the singular vectors of the shorter
        side (V, or U if M is wide); cut at k + oversampling columns, or followed by Gaussian ones.
      method: "cholesky" or "householder" (module docstring).

    Returns:
      U (..., rows, k), S (..., k) in descending order up to round-off, V (..., columns, k), in float32 or float64.
      Where S is below eps max(rows, columns) S_1 the column of U (of V, if M is wide) is zero: its direction would be
      noise.

    Raises:
      ValueError: M is not a real matrix, k, num_iterations or oversampling out of range, a start of the wrong shape,
        an unknown method.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> M = jnp.array([[3.0, 0.0], [4.0, 5.0]])
      >>> U, S, V = block_krylov_svd(M, 1, key=jax.random.key(0))
      >>> [round(float(s) ** 2, 3) for s in S], [[round(float(d), 4) for d in row] for row in U @ V.T]
      ([45.0], [[0.2236, 0.2236], [0.6708, 0.6708]])

    Source: Musco, Musco (NeurIPS 2015), arXiv:1504.05477, Algorithm 2 [musco2015randomized]; Fukaya et al. (SISC 2020),
    arXiv:1809.11085 [fukaya2020shifted].
    """
    if M.ndim < 2 or not jnp.issubdtype(M.dtype, jnp.floating):
        raise ValueError(f"M must be a real matrix (..., rows, columns), got shape {M.shape} of {M.dtype}")
    *batch, rows, columns = M.shape
    n = min(rows, columns)
    config = BlockKrylovConfig(num_iterations, oversampling, method=method)
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and min(rows, columns) = {n}, got {k} for a matrix of shape {M.shape}")
    if start is not None and (start.shape[:-1] != (*batch, n)):
        raise ValueError(
            f"start must have the shape {(*batch, n, 'any')}, one column for each singular vector of the shorter "
            f"side, got {start.shape}"
        )
    wide = rows < columns
    compute = compute_dtype(M.dtype)
    B = None
    if not config.is_exact(n, k):
        b = config.width(n, k)
        warm = jnp.zeros((*batch, n, 0), compute) if start is None else start[..., :b].astype(compute)
        B = jnp.concatenate([warm, jax.random.normal(key, (*batch, n, b - warm.shape[-1]), compute)], axis=-1)
    U, S, V = svd_of_tall((transpose(M) if wide else M).astype(compute), k, B, config)
    return (V, S, U) if wide else (U, S, V)
