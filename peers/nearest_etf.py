"""The nearest simplex ETF as its authors compute it: Riemannian trust regions and a dense implicit backward."""

from collections.abc import Callable

import numpy as np


def trust_region(
    Y: np.ndarray, prox: np.ndarray, G: np.ndarray, *, delta: float, backward: bool
) -> Callable[[], tuple[np.ndarray, ...]]:
    """The frame nearest to Y by the authors' solver and settings, and dL/dY for the cotangent G where `backward`."""
    import pymanopt

    d, K = Y.shape
    M = np.eye(K) - 1 / K
    root = np.sqrt(K - 1)
    manifold = pymanopt.manifolds.Stiefel(d, K)

    @pymanopt.function.numpy(manifold)
    def cost(U: np.ndarray) -> float:
        return np.sum((Y - U @ M / root) ** 2) + delta / 2 * np.sum((U - prox) ** 2)

    @pymanopt.function.numpy(manifold)
    def gradient(U: np.ndarray) -> np.ndarray:
        return 2 / (K - 1) * U @ M - 2 / root * Y @ M + delta * (U - prox)

    @pymanopt.function.numpy(manifold)
    def hessian(U: np.ndarray, V: np.ndarray) -> np.ndarray:
        return 2 / (K - 1) * V @ M + delta * V

    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian)
    optimizer = pymanopt.optimizers.TrustRegions(
        max_iterations=30, min_gradient_norm=1e-6, kappa=0.1, theta=1, rho_prime=0.1, verbosity=0
    )

    def solve() -> tuple[np.ndarray, ...]:
        U = optimizer.run(problem, initial_point=prox, Delta_bar=np.sqrt(K), Delta0=np.sqrt(K) / 8).point
        return (U, _dense_backward(U, gradient(U), G, M, delta)) if backward else (U,)

    return solve


def _dense_backward(U: np.ndarray, fY: np.ndarray, G: np.ndarray, M: np.ndarray, delta: float) -> np.ndarray:
    """dL/dY by the implicit function theorem with one row per constraint U_i . U_j = [i = j]."""
    d, K = U.shape
    Sigma = fY.T @ U
    block = np.linalg.inv(2 / (K - 1) * M + delta * np.eye(K) - (Sigma + Sigma.T) / 2)
    i, j = np.triu_indices(K)
    A = np.zeros((len(i), d, K))
    rows = np.arange(len(i))
    A[rows, :, i] += U.T[j]
    A[rows, :, j] += U.T[i]
    w = -G @ block
    t = A @ block
    flat = A.reshape(len(i), -1)
    s = -np.linalg.solve(flat @ t.reshape(len(i), -1).T, flat @ w.reshape(-1))
    return -2 / np.sqrt(K - 1) * (w + np.tensordot(s, t, axes=1)) @ M
