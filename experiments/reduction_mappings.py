"""Reduction mappings: condition numbers of f and of F, and the steps that gradient descent and GeoPrecGD then take.

Paper: Markou, Ajanthan, Gould, "Sharper Convergence Rates for Nonconvex Optimisation via Reduction Mappings", 2025

    python -m experiments run reduction_mappings                           # all problems, a minute on one core

The paper's synthetic experiments are in an appendix whose numbers are not known here; these are replacements for them.

quadratic        two large and two small outliers in the spectrum; the affine Psi keeps the graph orthogonal to all four
quadratic_random the same f with a random affine Psi through the minimiser, which knows nothing of the outliers
factorisation    ||A B^T - M||_F^2 / 2 with M of rank r; Psi(A) = argmin_B (variable projection)
etf_free         logits W H, squared error, the features H free; Psi is a constant simplex ETF
etf_fixed        digits, principal components X, logits W A X, squared error; Psi is a constant simplex ETF
etf_nearest      the same with Psi(A) the simplex ETF nearest to the class means of A X

Methods on F start from an x1 at the relative distance `radius` from a minimiser, those on f from the same x1 and an x2
as far away. The step is the theory's: 1 / beta of what is descended on, measured at the minimiser. A step of L-BFGS
(optax, memory 10) is one iteration with its line search, hence several evaluations. All in float64.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._machinery import cases
from experiments.data import images as data
from jaxlib_methods.classifiers import etf_weights, simplex_etf
from jaxlib_methods.classifiers.simplex import helmert_basis
from jaxlib_methods.optimizers import geoprec_gd, reduced_objective
from jaxlib_methods.optimizers.curvature import ReducedCurvature, reduced_curvature

PyTree = Any
Name = Literal["quadratic", "quadratic_random", "factorisation", "etf_free", "etf_fixed", "etf_nearest"]
METHODS = ("gradient descent on f", "gradient descent on F", "GeoPrecGD", "L-BFGS on f", "L-BFGS on F")
SHOWN = ("kappa_f", "kappa_F", "kappa_F_euclidean", "beta_F / beta_f", "mu_F / mu_f")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of problem and seed is one case."""

    problems: tuple[Name, ...] = get_args(Name)
    seeds: int = 1
    tolerance: float = 1e-6  # of f - min f, relative to the start
    radius: float = 0.01  # distance of the start from a minimiser, relative to its norm
    max_steps: int = 300_000
    dimension: int = 60  # n of the quadratics
    rows: int = 20  # of M
    columns: int = 12  # of M
    rank: int = 3  # r
    features: int = 30  # principal components of the digits, and examples, for the ETF problems

    def __post_init__(self):
        for name in ("seeds", "tolerance", "radius", "max_steps", "rank"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.problems:
            raise ValueError("problems is empty; name at least one")
        if self.dimension < 10:
            raise ValueError(f"dimension must be at least 10, got {self.dimension}: four are outliers")
        if self.rank > min(self.rows, self.columns):
            raise ValueError(f"rank must be at most rows and columns, got {self.rank}")
        if not 20 <= self.features <= 60:
            raise ValueError(
                f"features must lie between 20 and 60, got {self.features}: two examples a class, 64 pixels"
            )


SMOKE = {
    "problems": ("quadratic", "factorisation"),
    "seeds": 1,
    "rows": 6,
    "columns": 5,
    "rank": 2,
    "max_steps": 100_000,
}
PAPER: dict[str, float] = {}  # the numbers of appendix G are not known here


class Problem(NamedTuple):
    f: Callable[[PyTree, PyTree], jax.Array]  # min f = 0
    psi: Callable[[PyTree], PyTree]
    minimiser: jax.Array  # x1 of a minimiser on the graph


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figure and returns condition numbers and steps, one per seed."""
    metrics: dict[str, list[float]] = {}
    curves: dict[str, dict[str, list[list[list[float]]]]] = {}
    for name in config.problems:
        results = []
        for seed in range(config.seeds):
            run_case = functools.partial(_run_case, config, name, seed)
            results.append(cases.run_or_load(workdir / "cases" / f"{name}-seed{seed}", run_case))
        for shown in SHOWN:
            metrics[f"{shown} {name}"] = [result[shown] for result in results]
        for method in METHODS:
            curves.setdefault(name, {})[method] = [result["curves"][method] for result in results]
            steps = [result["steps"][method] for result in results]
            if None not in steps:
                metrics[f"steps {method}, {name}"] = steps
    if jax.process_index() == 0:
        _figure(config, curves, workdir)
    return metrics


# ---------------------------------------------------------------------------------------------------------- problems


def _problem(config: Config, name: str, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    if name.startswith("quadratic"):
        return _quadratic(rng, config.dimension, aligned=name == "quadratic")
    if name == "factorisation":
        return _factorisation(rng, config.rows, config.columns, config.rank)
    return _etf(rng, seed, config.features, name)


def _quadratic(rng: np.random.Generator, n: int, *, aligned: bool) -> Problem:
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


def _factorisation(rng: np.random.Generator, m: int, n: int, r: int) -> Problem:
    """M = A B^T with singular values from 10 to 1 and balanced factors; the B of each A by least squares."""
    U, V = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in (m, n))
    root = np.sqrt(np.geomspace(10, 1, r))
    A, B = jnp.asarray(U * root), jnp.asarray(V * root)
    M = A @ B.T
    f = lambda A, B: 0.5 * jnp.sum((A @ B.T - M) ** 2)
    return Problem(f, lambda A: jnp.linalg.solve(A.T @ A, A.T @ M).T, A)


def _etf(rng: np.random.Generator, seed: int, p: int, name: str) -> Problem:
    """f = ||W A X - Y||_F^2 / 2N with A (K x p) and X (p x N); the targets Y are an ETF's Gram matrix, by class."""
    K = 10
    split = data.load("digits").train
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


# ----------------------------------------------------------------------------------------------------------- methods


def _run_case(config: Config, name: str, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
    del case_dir  # a case is short: nothing to resume
    with jax.enable_x64(True):
        problem = _problem(config, name, seed)
        found = reduced_curvature(problem.f, problem.psi, problem.minimiser)
        runs = {method: _run(config, problem, found, method, seed) for method in METHODS}
    return {
        "kappa_f": found.kappa_f,
        "kappa_F": found.kappa_F,
        "kappa_F_euclidean": found.kappa_F_euclidean,
        "beta_F / beta_f": found.beta_F / found.beta_f,
        "mu_F / mu_f": found.mu_F / found.mu_f,
        "steps": {method: steps for method, (steps, _) in runs.items()},
        "curves": {method: curve for method, (_, curve) in runs.items()},
    }


def _run(
    config: Config, problem: Problem, found: ReducedCurvature, method: str, seed: int
) -> tuple[int | None, list[list[float]]]:
    """Steps until the tolerance is reached (None if it is not), and the curve as [step, relative error]."""
    rng = np.random.default_rng(seed + 1)

    def away(x: jax.Array) -> jax.Array:
        noise = rng.standard_normal(x.shape)
        return x + jnp.asarray(config.radius * np.linalg.norm(x) / np.linalg.norm(noise) * noise)

    x1, x2 = away(problem.minimiser), away(problem.psi(problem.minimiser))
    F = reduced_objective(problem.f, problem.psi)
    both = lambda x: problem.f(*x)
    objective, start, tx = {
        "gradient descent on f": (both, (x1, x2), optax.sgd(1 / found.beta_f)),
        "gradient descent on F": (F, x1, optax.sgd(1 / found.beta_F_euclidean)),
        "GeoPrecGD": (F, x1, geoprec_gd(1 / found.beta_F, problem.psi, max_iterations=50)),
        "L-BFGS on f": (both, (x1, x2), optax.lbfgs()),
        "L-BFGS on F": (F, x1, optax.lbfgs()),
    }[method]

    def step(carry: tuple) -> tuple:
        x, state, errors, t = carry
        value, grad = jax.value_and_grad(objective)(x)
        updates, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=objective)
        x = optax.apply_updates(x, updates)
        return x, state, errors.at[t + 1].set(objective(x)), t + 1

    def unfinished(carry: tuple) -> jax.Array:
        _, _, errors, t = carry
        return (t < config.max_steps) & (errors[t] > config.tolerance * errors[0])

    with jax.numpy_dtype_promotion("standard"):  # optax.lbfgs mixes types
        errors = jnp.zeros(config.max_steps + 1).at[0].set(objective(start))
        loop = jax.jit(lambda x, errors: jax.lax.while_loop(unfinished, step, (x, tx.init(x), errors, 0))[2:])
        errors, t = loop(start, errors)
    errors = np.asarray(errors[: int(t) + 1])
    if not np.isfinite(errors).all():
        raise FloatingPointError(f"{method} diverged; lower the radius, {config.radius}")
    at = np.unique(np.append(0, np.geomspace(1, len(errors) - 1, 120).astype(int)))
    reached = errors[-1] <= config.tolerance * errors[0]
    return int(t) if reached else None, [[int(t), float(errors[t] / errors[0])] for t in at]


def _figure(config: Config, curves: dict[str, dict[str, list[list[list[float]]]]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.5 * rows), layout="constrained", squeeze=False)
    for axis, (name, of_methods) in itertools.zip_longest(axes.flat, curves.items(), fillvalue=(None, {})):
        if name is None:
            axis.set_axis_off()
            continue
        for (method, of_seeds), style in zip(of_methods.items(), ("-", "--", "-", ":", ":"), strict=True):
            color = None
            for curve in of_seeds:
                steps, errors = np.array(curve).T
                label = method if color is None else None
                (line,) = axis.plot(steps + 1, np.maximum(errors, 1e-12), style, color=color, label=label)
                color = line.get_color()
        axis.axhline(config.tolerance, color="grey", linewidth=0.5)
        axis.set(title=name, xlabel="step + 1", xscale="log", yscale="log", ylim=(config.tolerance / 10, 2))
        axis.grid(alpha=0.3)
        axis.set_ylabel("f - min f, relative to the start")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(workdir / "reduction_mappings.png", dpi=120)
    plt.close(figure)
