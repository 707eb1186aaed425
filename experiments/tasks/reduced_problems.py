"""Problems f(x1, x2) with a reduction mapping x2 = Psi(x1), whose least value is 0 and whose minimisers are known.

quadratic        two large and two small outliers in the spectrum; the affine Psi keeps the graph orthogonal to all four
quadratic_random the same f with a random affine Psi through the minimiser, which knows nothing of the outliers
factorisation    ||A B^T - M||_F^2 / 2 with M of rank r; Psi(A) = argmin_B (variable projection)
etf_free         logits W H, squared error, the features H free; Psi is a constant simplex ETF
etf_fixed        digits, principal components X, logits W A X, squared error; Psi is a constant simplex ETF
etf_nearest      the same with Psi(A) the simplex ETF nearest to the class means of A X

"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import images
from jaxlib_methods.classifiers import etf_weights, simplex_etf
from jaxlib_methods.classifiers.simplex import helmert_basis

PyTree = Any
Name = Literal["quadratic", "quadratic_random", "factorisation", "etf_free", "etf_fixed", "etf_nearest"]


class Problem(NamedTuple):
    f: Callable[[PyTree, PyTree], jax.Array]  # min f = 0
    psi: Callable[[PyTree], PyTree]
    minimiser: jax.Array  # x1 of a minimiser on the graph


def quadratic(rng: np.random.Generator, n: int, *, aligned: bool) -> Problem:
    """f = (x - b)^T H (x - b) / 2 with four outliers, and n2 = 4."""
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    eigenvalues = np.concatenate([[0.05, 0.1], np.linspace(1, 10, n - 4), [200, 400]])
    H, b = jnp.asarray(Q * eigenvalues @ Q.T), jnp.asarray(rng.standard_normal(n))
    if aligned:  # V^T (x - b) = 0 for the four eigenvectors V, solved for x2
        V = Q[:, [0, 1, -2, -1]]
        slope = -np.linalg.solve(V[-4:].T, V[:-4].T)
    else:
        slope = rng.standard_normal((4, n - 4)) / np.sqrt(n)
    slope = jnp.asarray(slope)

    def f(x1: jax.Array, x2: jax.Array) -> jax.Array:
        error = jnp.concatenate([x1, x2]) - b
        return 0.5 * error @ H @ error

    return Problem(f, lambda x1: b[-4:] + slope @ (x1 - b[:-4]), b[:-4])


def factorisation(rng: np.random.Generator, m: int, n: int, r: int) -> Problem:
    """M = A B^T with singular values from 10 to 1 and balanced factors; the B of each A by least squares."""
    U, V = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in (m, n))
    root = np.sqrt(np.geomspace(10, 1, r))
    A, B = jnp.asarray(U * root), jnp.asarray(V * root)
    M = A @ B.T
    f = lambda A, B: 0.5 * jnp.sum((A @ B.T - M) ** 2)
    return Problem(f, lambda A: jnp.linalg.solve(A.T @ A, A.T @ M).T, A)


def etf(rng: np.random.Generator, seed: int, p: int, name: Name) -> Problem:
    """f = ||W A X - Y||_F^2 / 2N with A (K x p) and X (p x N); the targets Y are an ETF's Gram matrix, by class."""
    K = 10
    split = images.load("digits").train
    pixels = split.images.reshape(len(split.labels), -1).astype(np.float64) / 16
    pixels -= pixels.mean(axis=0)
    components = np.linalg.svd(pixels, full_matrices=False)[2][:p]
    chosen = np.concatenate([rng.permutation(np.flatnonzero(split.labels == k))[: p // K] for k in range(K)])
    X = jnp.eye(len(chosen)) if name == "etf_free" else jnp.asarray(components @ pixels[chosen].T)
    labels = np.repeat(np.arange(K), p // K)
    N = len(labels)
    W = simplex_etf(K, K, key=jax.random.key(seed), dtype=jnp.float64)
    Y = (W @ W.T)[:, labels]
    means = jnp.asarray(np.eye(K)[labels] / (p // K))  # N x K
    H = helmert_basis(K, jnp.float64)

    def nearest_etf(A: jax.Array) -> jax.Array:
        """By Newton-Schulz on the sum-zero directions: repeated singular values are no trouble to any derivative."""
        U = A @ X @ means @ H
        U = U / jnp.linalg.norm(U) * np.sqrt(K - 1)
        U = jax.lax.fori_loop(0, 8, lambda _, U: 1.5 * U - 0.5 * U @ (U.T @ U), U)
        return etf_weights(U @ H.T)

    f = lambda A, W: 0.5 / N * jnp.sum((W @ A @ X - Y) ** 2)
    psi = nearest_etf if name == "etf_nearest" else lambda A: W
    return Problem(f, psi, jnp.asarray(W.T[:, labels] @ np.linalg.pinv(X)))
