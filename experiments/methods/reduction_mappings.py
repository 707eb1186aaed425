"""Reduction mappings: condition numbers of f and of F, and the steps that gradient descent and GeoPrecGD then take.

Paper: Markou, Ajanthan, Gould, "Sharper Convergence Rates for Nonconvex Optimisation via Reduction Mappings", 2025

    python -m experiments run reduction_mappings                           # all problems, a minute on one core

The paper's synthetic experiments are in an appendix whose numbers are not known here; the problems of
`experiments.tasks.reduced_problems` are replacements for them.

Methods on F start from an x1 at the relative distance `radius` from a minimiser, those on f from the same x1 and an x2
as far away. The step is the theory's: 1 / beta of what is descended on, measured at the minimiser. A step of L-BFGS
(optax, memory 10) is one iteration with its line search, hence several evaluations. All in float64.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._machinery import options, plots
from experiments._machinery.options import Count, Positive, Range
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import reduced_problems
from experiments.tasks.reduced_problems import Problem
from jaxlib_methods.optimizers import geoprec_gd, reduced_objective
from jaxlib_methods.optimizers.curvature import ReducedCurvature, reduced_curvature

Method = Literal["gradient descent on f", "gradient descent on F", "GeoPrecGD", "L-BFGS on f", "L-BFGS on F"]


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Every combination of problem and seed is one case."""

    problems: tuple[reduced_problems.Name, ...] = get_args(reduced_problems.Name)
    seeds: Count = 1
    tolerance: Positive = 1e-6  # of f - min f, relative to the start
    radius: Positive = 0.01  # distance of the start from a minimiser, relative to its norm
    max_steps: Count = 300_000
    dimension: Annotated[int, Range(10, remedy="four are outliers")] = 60  # n of the quadratics
    rows: Count = 20  # of M
    columns: Count = 12  # of M
    rank: Count = 3  # r
    # Principal components of the digits, and examples, for the ETF problems.
    features: Annotated[int, Range(20, 60, remedy="two examples a class, 64 pixels")] = 30

    def __post_init__(self):
        super().__post_init__()
        if self.rank > min(self.rows, self.columns):
            raise ValueError(f"rank must be at most rows and columns, got {self.rank}")


SMOKE: dict[str, Any] = {
    "problems": ("quadratic", "factorisation"), "seeds": 1, "rows": 6, "columns": 5, "rank": 2, "max_steps": 100_000,
}  # fmt: skip
SHOWN = ("kappa_f", "kappa_F", *(f"steps {method}" for method in get_args(Method)))


def targets(config: Config) -> Targets:
    """None: the numbers of the paper's appendix G are not known here."""
    del config
    return {}


def variants(config: Config) -> dict[str, reduced_problems.Name]:
    return {name: name for name in config.problems}


def make_problem(config: Config, name: reduced_problems.Name, seed: int) -> Problem:
    """One of the problems at the sizes of the options."""
    rng = np.random.default_rng(seed)
    if name.startswith("quadratic"):
        return reduced_problems.quadratic(rng, config.dimension, aligned=name == "quadratic")
    if name == "factorisation":
        return reduced_problems.factorisation(rng, config.rows, config.columns, config.rank)
    return reduced_problems.etf(rng, seed, config.features, name)


def run(config: Config, name: reduced_problems.Name, seed: int, workdir: pathlib.Path) -> Outcome:
    """Condition numbers, and the steps of each method where it reaches the tolerance."""
    del workdir  # a case is short: nothing to resume
    with jax.enable_x64(True):
        problem = make_problem(config, name, seed)
        found = reduced_curvature(problem.f, problem.psi, problem.minimiser)
        runs = {method: descend(config, problem, found, method, seed) for method in get_args(Method)}
    metrics = {
        "kappa_f": found.kappa_f,
        "kappa_F": found.kappa_F,
        "kappa_F_euclidean": found.kappa_F_euclidean,
        "beta_F / beta_f": found.beta_F / found.beta_f,
        "mu_F / mu_f": found.mu_F / found.mu_f,
    }
    metrics |= {f"steps {method}": steps for method, (steps, _) in runs.items() if steps is not None}
    return Outcome(metrics, details={"errors": {method: errors for method, (_, errors) in runs.items()}})


def descend(
    config: Config, problem: Problem, found: ReducedCurvature, method: Method, seed: int
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


def figures(config: Config, cases: list[Case]) -> dict[str, Any]:
    """The relative error of each method by step, of the first seed."""
    curves = [
        case._replace(
            name=method,
            curve=[{"step": t + 1, "error": max(error, 1e-12)} for t, error in case.details["errors"][method]],
        )
        for case in cases
        if case.seed == 0
        for method in get_args(Method)
    ]
    figure = plots.curves(
        curves,
        "step",
        {"error": "f - min f, relative to the start"},
        panel=lambda case: case.variant,
        xlabel="step + 1",
        xscale="log",
        yscale="log",
        ylim=(config.tolerance / 10, 2),
    )
    return {"reduction_mappings": figure}
