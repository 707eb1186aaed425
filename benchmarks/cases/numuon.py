"""NuMuon's update at several ranks, against optax's Muon, for the hidden matrices of GPT-2 small; accuracy of the step.

Cases `update layers=L`: one update of the 6 L matrices of L layers (four of 768 x 768, 768 x 3072, 3072 x 768), all
ranks and `optax.contrib.muon` interleaved, with momentum and decay. The aim is ratios["optax"] >= 1 at r = 0.25. The
state is the initial one: a warm start costs the same, its blocks are better conditioned if anything.

Cases `step MxN r=R`: the direction of one matrix. `flops` and `bytes` are the model below, so that fraction_of_ceiling
says how far from the floor the decomposition is.
  ours           CholeskyQR and the eigenproblem of the Gram matrix (exact once 2 (k + 8) >= n)
  householder    Householder QR and the thin SVD, as in the paper
  newton_schulz  Muon's five steps

Cases `objective SPECTRUM k=K`: `error` is 1 - <M, D> / (sigma_1 + ... + sigma_k) for 384 x 256 against the exact SVD: a
cold start by both methods, and the tenth step of a warm start. At k = 120 the decomposition is exact but for round-off:
over six decades that shows what the Gram matrix, which knows nothing below 2e-4 sigma_1, costs.

The floor. b = k + 8, L = 2 blocks, 2 L + 1 = 5 passes over M:
  block Krylov   10 m n b + 2 m (2b)^2 + 2 (m + n) (2b) k + 3 m k^2 + 2 m n k + 24 n b^2 flops: products with M, Gram
                 matrix, singular vectors, their orthonormality, D, and the orthonormal blocks
  Newton-Schulz  5 (4 m n^2 + 2 n^3) flops
  bytes          float32: M is read five times (once where the result is exact), D is written once
For 768 x 768 that is 2.7 Gflop at r = 0.25 against 13.6, for 3072 x 768 8.3 against 40.8; what is left
are the eigenproblem of order 2b and the Cholesky factorisations of order b or k.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import Case, Implementation, Options, Record, measure
from jaxlib_methods.optimizers import BlockKrylovConfig, numuon, scale_by_numuon
from jaxlib_methods.optimizers.block_krylov import block_krylov_svd
from jaxlib_methods.optimizers.nuclear_norm import nuclear_norm_lmo

HEADLINES = (
    ("update layers=12", "r=1.0", ("optax",)),
    ("update layers=12", "r=0.5", ("optax",)),
    ("update layers=12", "r=0.25", ("optax",), 1),
    ("update layers=12", "r=0.1", ("optax",)),
    ("step 768x768 r=0.25", "ours", ("householder", "newton_schulz")),
)
RANKS = (0.25, 1.0, 0.5, 0.1)
WIDTH = 768
OVERSAMPLING = 8


def run(options: Options) -> Iterator[Record]:
    """Yields every case; with --quick two layers instead of twelve."""
    layers = 2 if options.quick else 12
    if options.selects(f"update layers={layers}"):
        yield from measure(_update_case(layers), options)
    for m in (WIDTH, 4 * WIDTH):
        for r in (0.5, 0.25, 0.1):
            if options.selects(f"step {m}x{WIDTH} r={r}"):
                yield from measure(_step_case(m, WIDTH, r), options)
    for spectrum, k in [(spectrum, 16) for spectrum in SPECTRA] + [("six decades", 120)]:
        if options.selects(f"objective {spectrum} k={k}"):
            yield from measure(_objective_case(spectrum, k), options)


# ----------------------------------------------------------------------------------------------------- a whole update


def _decaying(rng: np.random.Generator, m: int, n: int) -> jax.Array:
    """A gradient with a decaying spectrum: Gaussian, its channels weighted by 1 / sqrt(j)."""
    return jnp.asarray(rng.standard_normal((m, n), np.float32) / np.sqrt(np.arange(1, n + 1, dtype=np.float32)))


def _update_case(layers: int) -> Case:
    rng = np.random.default_rng(0)
    shapes = {name: (WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
    shapes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    grads = {f"{i}/{name}": _decaying(rng, *shape) for i in range(layers) for name, shape in shapes.items()}
    params = jax.tree.map(jnp.zeros_like, grads)

    def implementation(tx: optax.GradientTransformation) -> Implementation:
        return Implementation(jax.jit(tx.update), (grads, jax.block_until_ready(tx.init(params)), params))

    ours = {f"r={r}": implementation(numuon(0.02, r, key=jax.random.key(0))) for r in RANKS}
    optaxs = implementation(optax.contrib.muon(0.02, weight_decay=0.1, nesterov=False))
    return Case("numuon", f"update layers={layers}", ours | {"optax": optaxs}, seconds=60.0, min_rounds=5)


# ----------------------------------------------------------------------------------------------------------- one matrix


def krylov_flops(m: int, n: int, k: int) -> float:
    """Of the matrix products and factorisations of size m n b in one step, L = 2 (module docstring); m >= n."""
    b = min(n, k + OVERSAMPLING)
    if 2 * b >= n:
        return 2 * m * n**2 + 2 * m * n * k + 3 * m * k**2 + 2 * m * n * k
    space = 10 * m * n * b + 24 * n * b**2
    return space + 2 * m * (2 * b) ** 2 + 2 * (m + n) * (2 * b) * k + 3 * m * k**2 + 2 * m * n * k


def krylov_bytes(m: int, n: int, k: int) -> float:
    """M read once for each product with it, and D written."""
    exact = 2 * min(n, k + OVERSAMPLING) >= n
    return 4 * m * n * ((1 if exact else 5) + 1)


def _step_case(m: int, n: int, r: float) -> Case:
    G = {"W": _decaying(np.random.default_rng(1), m, n)}

    def step(rank: float, method: str) -> Implementation:
        rule = scale_by_numuon(rank, key=jax.random.key(0), decomposition=BlockKrylovConfig(method=method))
        return Implementation(jax.jit(rule.update), (G, jax.block_until_ready(rule.init(G))))

    k = int(np.ceil(r * n))
    return Case(
        "numuon",
        f"step {m}x{n} r={r}",
        {
            "ours": step(r, "cholesky"),
            "householder": step(r, "householder"),
            "newton_schulz": step(1.0, "cholesky"),
        },
        flops=krylov_flops(m, n, k),
        bytes=krylov_bytes(m, n, k),
        seconds=5.0,
    )


# ------------------------------------------------------------------------------------------------------------- accuracy

SPECTRA = {
    "power law": lambda n: 1 / np.arange(1, n + 1),
    "exponential": lambda n: np.exp(-np.arange(n) / 16),
    "Gaussian": None,
    "six decades": lambda n: 10.0 ** np.linspace(0, -6, n),
}


def _objective_case(spectrum: str, k: int, m: int = 384, n: int = 256) -> Case:
    rng = np.random.default_rng(2)
    M64 = rng.standard_normal((m, n))
    if SPECTRA[spectrum] is not None:
        U, _, Vt = np.linalg.svd(M64, full_matrices=False)
        M64 = (U * SPECTRA[spectrum](n)) @ Vt
    M = jnp.asarray(M64, jnp.float32)

    def objective(D: Any) -> np.ndarray:
        return np.sum(np.asarray(M, np.float64) * np.asarray(D, np.float64))

    def warm(M: jax.Array) -> jax.Array:
        V = None
        for i in range(10):
            U, _, V = block_krylov_svd(M, k, key=jax.random.key(i), start=V)
        return U @ V.T

    def exact(M: jax.Array) -> np.ndarray:
        U, _, Vt = np.linalg.svd(np.asarray(M, np.float64), full_matrices=False)
        return U[:, :k] @ Vt[:k]

    cold = functools.partial(nuclear_norm_lmo, budget=k, key=jax.random.key(0))
    return Case(
        "numuon",
        f"objective {spectrum} k={k}",
        {
            "cholesky": Implementation(jax.jit(cold), (M,), canonical=objective),
            "householder": Implementation(
                jax.jit(functools.partial(cold, method="householder")), (M,), canonical=objective
            ),
            "ten warm starts": Implementation(jax.jit(warm), (M,), canonical=objective),
            "exact SVD": Implementation(exact, (M,), canonical=objective),
        },
        reference="exact SVD",
        seconds=2.0,
    )
