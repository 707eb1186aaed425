"""SGM, ISGMR and TRWP: MAP inference by scanline message passing (Xu, Ajanthan, Hartley, ACCV 2020)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.kernels.scanline import Pairwise
from jaxlib_methods.message_passing import _schedule
from jaxlib_methods.message_passing._bounds import bound_of, round_sequentially
from jaxlib_methods.message_passing._grid import DIRECTIONS, GridMRF, check, grid_energy, has_sender
from jaxlib_methods.message_passing._schedule import Messages, Schedule, from_lines, single_sweep, to_lines


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


def trwp(
    mrf: GridMRF,
    *,
    iterations: int = 50,
    directions: int = 4,
    rho: float | int = 0.5,
    rounding: str = "argmin",
    evaluate_every: int | None = None,
    tolerance: float | int | None = None,
    messages: Messages | None = None,
    checkpoint_every: int | None = None,
    temperature: float | int | jax.Array | None = None,
    implementation: str | None = None,
) -> Solution:
    """Tree-reweighted message passing with parallel scanlines.

    Directions in order, in place: with rho the edge appearance probability and the newest messages,

        S_p = rho [theta_p + sum_(k != d) m_p^k] - m_p^opposite
        m_i(lam) = min_mu [S_p(mu) + rho m_p^d(mu) + w V(mu, lam)] less its minimum
        beliefs = theta + sum_d m^d

    Args:
      mrf: the problem.
      iterations: number of sweeps over all directions; static.
      directions: 4, 8 or 16; static.
      rho: edge appearance probability. 0.5 is right for 4 directions (each pixel lies in a row and a column); the
        authors' code uses it for all. Static.
      rounding: "argmin" of the beliefs as in the paper, or "sequential" (4 directions only), which finds lower
        energies; static.
      evaluate_every: compute energy and bound every so many iterations (and after the last); None never does. Beliefs
        are then not differentiable. Static.
      tolerance: stop once (energy - bound) <= tolerance |bound| for the best of both, in every image of the batch.
        Needs `evaluate_every` and 4 directions.
      messages: start from these instead of zeros; constants to differentiation.
      checkpoint_every: for the backward pass, keep the messages of every so many iterations and compute the argmins
        between them again, instead of keeping all argmins. A divisor of `iterations`; static.
      temperature: replaces the min by a softmin-weighted mean, differentiated by JAX at L^2 memory per pixel and
        direction. The paper's code has it (temperature 1) and the paper does not use it.
      implementation: of the sweeps, see `jaxlib_methods.kernels.scanline.sweep`.

    Returns:
      A `Solution`. Gradients to unaries, edge weights and V are exact for the argmins found, and cost about two forward
      passes and iterations x D x H x W x (L + 1) bytes (twice as many above 256 labels).

    Raises:
      ValueError: for an invalid problem or options that do not fit together.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> unaries = jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2)
      >>> solution = trwp(mp.GridMRF(unaries, mp.potts(1.0)), evaluate_every=1, tolerance=0.0)
      >>> solution.labels
      Array([[0, 1, 1],
             [0, 1, 1]], dtype=int32)
      >>> solution.energies[:2], solution.bounds[:2]  # optimal after the first iteration, which is proved by the second
      (Array([ 2., nan], dtype=float32), Array([ 2., nan], dtype=float32))

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    schedule = Schedule(directions, float(rho), False, implementation)
    return _solve(
        mrf, schedule, iterations, rounding, evaluate_every, tolerance, messages, checkpoint_every, temperature
    )


def isgmr(
    mrf: GridMRF,
    *,
    iterations: int = 50,
    directions: int = 4,
    rounding: str = "argmin",
    evaluate_every: int | None = None,
    messages: Messages | None = None,
    checkpoint_every: int | None = None,
    temperature: float | int | jax.Array | None = None,
    implementation: str | None = None,
) -> Solution:
    """Iterative semi-global matching revised: loopy min-sum with a scanline schedule, all directions from the last
    iteration.

        m_i(lam) = min_mu [theta_p + m_p^d + sum_(k != d, opposite) m_p^k(old) + w V(mu, lam)] less its minimum
        beliefs = theta + sum_d m^d

    With whole-number costs all messages are exact whole numbers. It need not converge: with 4 directions it often
    oscillates.

    Args:
      mrf, iterations, directions, rounding, evaluate_every, messages, checkpoint_every, temperature, implementation: as
        in `trwp`.

    Returns:
      A `Solution`; its bounds are valid but useless.

    Raises:
      ValueError: for an invalid problem or options that do not fit together.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> isgmr(mp.GridMRF(jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2), mp.potts(1.0)), iterations=2).labels
      Array([[0, 1, 1],
             [0, 1, 1]], dtype=int32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    schedule = Schedule(directions, 1.0, True, implementation)
    return _solve(mrf, schedule, iterations, rounding, evaluate_every, None, messages, checkpoint_every, temperature)


def sgm(
    mrf: GridMRF,
    *,
    directions: int = 4,
    variant: str = "messages",
    iterations: int = 1,
    implementation: str | None = None,
) -> Solution:
    """Semi-global matching, in the two forms that the authors' code has on the GPU and on the CPU.

    * "messages": the first iteration of ISGMR, beliefs = D theta + sum_d m^d: the current pixel's unary is not in its
      messages.
    * "path_costs": L_i^d = theta_i + min_mu [L_p^d(mu) + w V(mu, .)] less its minimum, beliefs = sum_d L^d; L = 0 at
      the first pixel of every line, whose own cost is thus dropped. The published energies are of this form. Iterated,
      it replaces theta by the beliefs.

    Args:
      mrf: the problem.
      directions: 4, 8 or 16; static.
      variant: which form; static.
      iterations: more than 1 only for "path_costs"; static.
      implementation: of the sweeps.

    Returns:
      A `Solution`, differentiable in the problem. Path costs are not a reparametrisation: no messages come with them.

    Raises:
      ValueError: for an invalid problem or options that do not fit together.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> sgm(mp.GridMRF(jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2), mp.potts(1.0))).labels
      Array([[0, 1, 1],
             [0, 1, 1]], dtype=int32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    if variant not in ("messages", "path_costs"):
        raise ValueError(f"variant must be 'messages' or 'path_costs', got {variant!r}")
    schedule = Schedule(directions, 1.0, True, implementation)
    if variant == "messages":
        if iterations != 1:
            raise ValueError(f"iterations must be 1 for variant 'messages', got {iterations}; isgmr iterates it")
        solution = _solve(mrf, schedule, 1, "argmin", None, None, None, None, None)
        beliefs = solution.beliefs + jnp.asarray(directions - 1, mrf.unaries.dtype) * mrf.unaries
        return solution._replace(beliefs=beliefs, labels=_argmin(beliefs))
    check(mrf, directions)
    _positive("iterations", iterations)
    unaries, weights, batched = _batch(mrf, directions)
    beliefs = _path_costs(schedule, iterations, unaries, mrf.pairwise, weights)
    beliefs = beliefs if batched else beliefs[0]
    return Solution(beliefs, _argmin(beliefs), (), jnp.asarray(iterations, jnp.int32))


def _solve(
    mrf: GridMRF,
    schedule: Schedule,
    iterations: int,
    rounding: str,
    evaluate_every: int | None,
    tolerance: float | int | None,
    messages: Messages | None,
    checkpoint_every: int | None,
    temperature: Any,
) -> Solution:
    check(mrf, schedule.directions)
    _positive("iterations", iterations)
    if rounding not in ("argmin", "sequential"):
        raise ValueError(f"rounding must be 'argmin' or 'sequential', got {rounding!r}")
    if rounding == "sequential" and schedule.directions != 4:
        raise ValueError(f"rounding='sequential' needs 4 directions, got {schedule.directions}; use 'argmin'")
    if not 0.0 < schedule.rho <= 1.0:
        raise ValueError(f"rho must lie in (0, 1], got {schedule.rho}")
    if tolerance is not None and (evaluate_every is None or schedule.directions != 4 or not tolerance >= 0):
        raise ValueError(
            f"tolerance must be non-negative and needs evaluate_every and 4 directions, got tolerance={tolerance}, "
            f"evaluate_every={evaluate_every}, directions={schedule.directions}"
        )
    if evaluate_every is not None:
        _positive("evaluate_every", evaluate_every)
    if checkpoint_every is not None and (checkpoint_every < 1 or iterations % checkpoint_every):
        raise ValueError(f"checkpoint_every must divide iterations={iterations}, got {checkpoint_every}")
    if temperature is not None and (evaluate_every is not None or checkpoint_every is not None):
        raise ValueError("temperature goes neither with evaluate_every nor with checkpoint_every")
    unaries, weights, batched = _batch(mrf, schedule.directions)
    b, h, w, num_labels = unaries.shape
    shapes = [(w, num_labels, b * h)] * 2 + [(h, num_labels, b * w)] * (schedule.directions - 2)
    if messages is not None and [m.shape for m in messages] != shapes:
        raise ValueError(f"messages must have the shapes {shapes}, got {[m.shape for m in messages]}")

    problem = (unaries, mrf.pairwise, weights, messages)
    if evaluate_every is not None:
        tolerance = None if tolerance is None else jnp.asarray(tolerance, unaries.dtype)
        solution = _evaluated(schedule, iterations, rounding, evaluate_every, *problem, tolerance)
    elif temperature is not None:
        temperature = jnp.asarray(temperature, unaries.dtype)
        solution = _soft(schedule, iterations, rounding, *problem, temperature)
    else:
        solution = _plain(schedule, iterations, rounding, checkpoint_every, *problem)
    if batched:
        return solution
    first = lambda x: None if x is None else x[:, 0]
    return solution._replace(
        beliefs=solution.beliefs[0],
        labels=solution.labels[0],
        energies=first(solution.energies),
        bounds=first(solution.bounds),
    )


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _batch(mrf: GridMRF, directions: int) -> tuple[jax.Array, jax.Array | None, bool]:
    weights = None if mrf.edge_weights is None else mrf.edge_weights[:directions]
    if mrf.unaries.ndim == 4:
        return mrf.unaries, weights, True
    return mrf.unaries[None], None if weights is None else weights[:, None], False


def _argmin(beliefs: jax.Array) -> jax.Array:
    return jnp.argmin(beliefs, -1).astype(jnp.int32)


def _round(
    rounding: str,
    beliefs: jax.Array,
    unaries: jax.Array,
    pairwise: Pairwise,
    weights: jax.Array | None,
    messages: Messages,
) -> jax.Array:
    if rounding == "argmin":
        return _argmin(beliefs)
    return round_sequentially(unaries, pairwise, weights, messages)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _plain(
    schedule: Schedule,
    iterations: int,
    rounding: str,
    checkpoint_every: int | None,
    unaries: jax.Array,
    pairwise: Pairwise,
    weights: jax.Array | None,
    messages: Messages | None,
) -> Solution:
    options = (schedule, iterations, checkpoint_every)
    beliefs, messages = _schedule.solve_in_chunks(*options, unaries, pairwise, weights, messages)
    messages = jax.lax.stop_gradient(messages)
    labels = _round(rounding, beliefs, unaries, pairwise, weights, messages)
    return Solution(beliefs, labels, messages, jnp.asarray(iterations, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _soft(
    schedule: Schedule,
    iterations: int,
    rounding: str,
    unaries: jax.Array,
    pairwise: Pairwise,
    weights: jax.Array | None,
    messages: Messages | None,
    temperature: jax.Array,
) -> Solution:
    p = _schedule.problem(schedule, unaries, pairwise, weights)
    messages = _schedule.zero_messages(schedule, p) if messages is None else jax.lax.stop_gradient(messages)
    body = lambda carry, _: (_schedule.iterate(schedule, p, carry, temperature=temperature)[0], None)
    messages, _ = jax.lax.scan(body, messages, None, length=iterations)
    beliefs = _schedule.beliefs(p, messages)
    messages = jax.lax.stop_gradient(messages)
    labels = _round(rounding, beliefs, unaries, pairwise, weights, messages)
    return Solution(beliefs, labels, messages, jnp.asarray(iterations, jnp.int32))


class _Progress(NamedTuple):
    """Carry of the evaluated solve: iterations done and everything that is the best so far."""

    done: jax.Array
    messages: Messages
    energy: jax.Array
    labels: jax.Array
    bound: jax.Array
    energies: jax.Array
    bounds: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _evaluated(
    schedule: Schedule,
    iterations: int,
    rounding: str,
    evaluate_every: int,
    unaries: jax.Array,
    pairwise: Pairwise,
    weights: jax.Array | None,
    messages: Messages | None,
    tolerance: jax.Array | None,
) -> Solution:
    """Solves in blocks of `evaluate_every` iterations, with the best labelling and bound so far after each."""
    p = _schedule.problem(schedule, unaries, pairwise, weights)
    batch, dtype = unaries.shape[0], unaries.dtype
    evaluations = -(-iterations // evaluate_every)
    bounded = schedule.directions == 4

    def unfinished(s: _Progress) -> jax.Array:
        open_ = s.done < iterations
        if tolerance is None:
            return open_
        closed = jnp.all(s.energy - s.bound <= tolerance * jnp.abs(s.bound))
        return open_ & ((s.done == 0) | ~closed)

    def block(s: _Progress) -> _Progress:
        count = jnp.minimum(evaluate_every, iterations - s.done)
        step = lambda _, m: _schedule.iterate(schedule, p, m)[0]
        messages = jax.lax.fori_loop(0, count, step, s.messages)
        beliefs = _schedule.beliefs(p, messages) if rounding == "argmin" else unaries
        labels = _round(rounding, beliefs, unaries, pairwise, weights, messages)
        energy = grid_energy(unaries, pairwise, weights, labels, 4, dtype)
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
        messages=_schedule.zero_messages(schedule, p) if messages is None else messages,
        energy=jnp.full((batch,), jnp.inf, dtype),
        labels=jnp.zeros(unaries.shape[:3], jnp.int32),
        bound=jnp.full((batch,), -jnp.inf, dtype),
        energies=trace,
        bounds=trace,
    )
    end = jax.lax.while_loop(unfinished, block, start)
    beliefs = _schedule.beliefs(p, end.messages)
    bounds = end.bounds if bounded else None
    return Solution(beliefs, end.labels, end.messages, end.done, end.energies, bounds)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _path_costs(
    schedule: Schedule, iterations: int, unaries: jax.Array, pairwise: Pairwise, weights: jax.Array | None
) -> jax.Array:
    batch = unaries.shape[0]

    def step(theta: jax.Array, _: None) -> tuple[jax.Array, None]:
        total = jnp.zeros_like(theta)
        for d in range(schedule.directions):
            reached = has_sender(theta.shape[:3], DIRECTIONS[d])[..., None]
            u = jnp.where(np.broadcast_to(reached, theta.shape), theta, jnp.zeros_like(theta))
            weight = None if weights is None else to_lines(weights[d][..., None], d < 2)[:, 0]
            m = single_sweep(schedule, d, batch, to_lines(u, d < 2), pairwise, weight)
            cost = u + from_lines(m, d < 2, batch)
            total = total + (cost - cost.min(-1, keepdims=True))
        return total, None

    return jax.lax.scan(step, unaries, None, length=iterations)[0]
