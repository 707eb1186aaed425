"""The compiled programs behind the solvers, each a function of a `Problem`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods.message_passing import _sweeps
from jaxlib_methods.message_passing._lines import Messages, from_lines, to_lines
from jaxlib_methods.message_passing._problem import Problem, Schedule
from jaxlib_methods.message_passing.bounds import bound_of, round_sequentially
from jaxlib_methods.message_passing.grid import DIRECTIONS, GridMRF, grid_energy, has_sender
from jaxlib_methods.typing import Rounding


class Solution(NamedTuple):
    """What a solver returns; the batch axis B is there exactly if the problem has one.

    Attributes:
      beliefs: (B, H, W, L) costs per label; -beliefs are scores for a network, differentiable in the problem.
      labels: (B, H, W) int32. Of the last iterate; where energies are evaluated, of the lowest energy seen.
      messages: D arrays in sweep layout, [W, L, B H] for directions 0 and 1, else [H, L, B W]: to start again from, for
        `chain_lower_bound` and `sequential_rounding`. Constants to differentiation.
      iterations: () int32, how many were run.
      energies: (T, B) 4-connected energy of the rounded labels at every evaluation, NaN after an early stop; None if
        not asked for.
      bounds: (T, B) best chain lower bound so far, likewise; None if not asked for or not available (more than 4
        directions).
    """

    beliefs: jax.Array
    labels: jax.Array
    messages: Messages
    iterations: jax.Array
    energies: jax.Array | None = None
    bounds: jax.Array | None = None


def solve(
    mrf: GridMRF,
    schedule: Schedule,
    messages: Messages | None = None,
    evaluate_every: int | None = None,
    tolerance: float | int | None = None,
    checkpoint_every: int | None = None,
    temperature: Any = None,
) -> Solution:
    """Checks the options and runs the program that they ask for."""
    num_iterations = schedule.num_iterations
    checks.at_least(1, num_iterations=num_iterations, evaluate_every=evaluate_every)
    checks.one_of(Rounding, rounding=schedule.rounding)
    checks.within("(0, 1]", edge_probability=schedule.edge_probability)
    if schedule.rounding == "sequential" and schedule.num_directions != 4:
        raise ValueError(f"rounding='sequential' needs 4 directions, got {schedule.num_directions}; use 'argmin'")
    if tolerance is not None and (evaluate_every is None or schedule.num_directions != 4 or not tolerance >= 0):
        raise ValueError(
            f"tolerance must be non-negative and needs evaluate_every and 4 directions, got tolerance={tolerance}, "
            f"evaluate_every={evaluate_every}, num_directions={schedule.num_directions}"
        )
    if checkpoint_every is not None and (checkpoint_every < 1 or num_iterations % checkpoint_every):
        raise ValueError(f"checkpoint_every must divide num_iterations={num_iterations}, got {checkpoint_every}")
    if temperature is not None and (evaluate_every is not None or checkpoint_every is not None):
        raise ValueError("temperature goes neither with evaluate_every nor with checkpoint_every")
    problem = Problem.of(mrf, schedule, messages)
    in_type = lambda x: None if x is None else jnp.asarray(x, problem.unaries.dtype)
    if evaluate_every is not None:
        solution = _evaluated(evaluate_every, problem, in_type(tolerance))
    elif temperature is not None:
        solution = _soft(problem, in_type(temperature))
    else:
        solution = _plain(checkpoint_every, problem)
    return solution if mrf.unaries.ndim == 4 else unbatched(solution)


def unbatched(solution: Solution) -> Solution:
    """The solution of the only problem of a batch; its messages keep their layout."""
    first = lambda x: None if x is None else x[:, 0]
    return solution._replace(
        beliefs=solution.beliefs[0],
        labels=solution.labels[0],
        energies=first(solution.energies),
        bounds=first(solution.bounds),
    )


def argmin(beliefs: jax.Array) -> jax.Array:
    return jnp.argmin(beliefs, -1).astype(jnp.int32)


def _round(problem: Problem, beliefs: jax.Array, messages: Messages) -> jax.Array:
    if problem.schedule.rounding == "argmin":
        return argmin(beliefs)
    return round_sequentially(problem, messages)


def _solution(problem: Problem, beliefs: jax.Array, messages: Messages) -> Solution:
    messages = jax.lax.stop_gradient(messages)
    iterations = jnp.asarray(problem.schedule.num_iterations, jnp.int32)
    return Solution(beliefs, _round(problem, beliefs, messages), messages, iterations)


@functools.partial(jax.jit, static_argnums=0)
def _plain(checkpoint_every: int | None, problem: Problem) -> Solution:
    return _solution(problem, *_sweeps.solve_in_chunks(problem, checkpoint_every))


@jax.jit
def _soft(problem: Problem, temperature: jax.Array) -> Solution:
    schedule, p = problem.schedule, problem.lines()
    messages = jax.lax.stop_gradient(problem.start(p))
    body = lambda carry, _: (_sweeps.iterate(schedule, p, carry, temperature=temperature)[0], None)
    messages, _ = jax.lax.scan(body, messages, None, length=schedule.num_iterations)
    return _solution(problem, _sweeps.beliefs(p, messages), messages)


class _Progress(NamedTuple):
    """Carry of the evaluated solve: iterations done and everything that is the best so far."""

    done: jax.Array
    messages: Messages
    energy: jax.Array
    labels: jax.Array
    bound: jax.Array
    energies: jax.Array
    bounds: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _evaluated(evaluate_every: int, problem: Problem, tolerance: jax.Array | None) -> Solution:
    """Solves in blocks of `evaluate_every` iterations, with the best labelling and bound so far after each."""
    schedule, p = problem.schedule, problem.lines()
    unaries, iterations = problem.unaries, schedule.num_iterations
    batch, dtype = unaries.shape[0], unaries.dtype
    evaluations = -(-iterations // evaluate_every)
    bounded = schedule.num_directions == 4

    def unfinished(s: _Progress) -> jax.Array:
        open_ = s.done < iterations
        if tolerance is None:
            return open_
        closed = jnp.all(s.energy - s.bound <= tolerance * jnp.abs(s.bound))
        return open_ & ((s.done == 0) | ~closed)

    def block(s: _Progress) -> _Progress:
        count = jnp.minimum(evaluate_every, iterations - s.done)
        step = lambda _, m: _sweeps.iterate(schedule, p, m)[0]
        messages = jax.lax.fori_loop(0, count, step, s.messages)
        beliefs = _sweeps.beliefs(p, messages) if schedule.rounding == "argmin" else unaries
        labels = _round(problem, beliefs, messages)
        energy = grid_energy(unaries, problem.pairwise, problem.weights, labels, 4, dtype)
        bound = jnp.maximum(s.bound, bound_of(p, messages)) if bounded else s.bound
        better = energy < s.energy
        at = s.done // evaluate_every
        return _Progress(
            done=s.done + count,
            messages=messages,
            energy=jnp.where(better, energy, s.energy),
            labels=jnp.where(better[:, None, None], labels, s.labels),
            bound=bound,
            energies=s.energies.at[at].set(energy),
            bounds=s.bounds.at[at].set(bound),
        )

    trace = jnp.full((evaluations, batch), jnp.nan, dtype)
    start = _Progress(
        done=jnp.zeros((), jnp.int32),
        messages=problem.start(p),
        energy=jnp.full((batch,), jnp.inf, dtype),
        labels=jnp.zeros(unaries.shape[:3], jnp.int32),
        bound=jnp.full((batch,), -jnp.inf, dtype),
        energies=trace,
        bounds=trace,
    )
    end = jax.lax.while_loop(unfinished, block, start)
    beliefs = _sweeps.beliefs(p, end.messages)
    bounds = end.bounds if bounded else None
    return Solution(beliefs, end.labels, end.messages, end.done, end.energies, bounds)


@jax.jit
def path_costs(problem: Problem) -> jax.Array:
    """Beliefs of SGM's second form."""
    schedule, batch = problem.schedule, problem.unaries.shape[0]

    def step(theta: jax.Array, _: None) -> tuple[jax.Array, None]:
        total = jnp.zeros_like(theta)
        for d in range(schedule.num_directions):
            reached = has_sender(theta.shape[:3], DIRECTIONS[d])[..., None]
            u = jnp.where(np.broadcast_to(reached, theta.shape), theta, jnp.zeros_like(theta))
            weights = problem.weights
            weight = None if weights is None else to_lines(weights[d][..., None], d < 2)[:, 0]
            m = _sweeps.single_sweep(schedule, d, batch, to_lines(u, d < 2), problem.pairwise, weight)
            cost = u + from_lines(m, d < 2, batch)
            total = total + (cost - cost.min(-1, keepdims=True))
        return total, None

    return jax.lax.scan(step, problem.unaries, None, length=schedule.num_iterations)[0]
