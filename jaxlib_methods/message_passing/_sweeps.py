"""Iterations of scanline sweeps in pair form, and the exact backward pass through their argmins.

Messages live in the layout that their sweep wants (`_lines`); only sums of pairs are ever transposed.

**Forward.** For the pair k = (d, q) of opposite directions let u_k = theta + sum of the messages of all *other* pairs.
The sweeps of d and q need u_k and one another's messages and nothing else, so an iteration reads no message that it
overwrites, keeps no running belief and cannot drift. TRWP takes the newest messages (Gauss-Seidel, d before q), ISGMR
those of the previous iteration (Jacobi).

**Backward.** With dS^d the gradient that the sweep of d sends to its S, u_k receives du_k = rho (dS^d + dS^q) and the
messages of the opposite direction (rho - 1) dS^d. Every message of pair k thus receives the sum of du over the *other*
pairs, plus (rho - 1) dS of its opposite: the forward recursion with dS in the place of m, walked from the last
iteration to the first, and of the last pair to the first. It needs P and Q, one byte per pixel, label, direction and
iteration up to 256 labels, and not a single message value.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels.scanline import Pairwise, sweep, sweep_backward, transpose
from jaxlib_methods.kernels.scanline.reference import dense_base, walk
from jaxlib_methods.kernels.scanline.request import Sweep
from jaxlib_methods.message_passing._lines import Lines, Messages, from_lines, plus_turned, step, to_lines, turn
from jaxlib_methods.message_passing._problem import Problem, Schedule


def _plus_others(base: jax.Array, x: Messages | list[jax.Array], pair: int, batch: int) -> jax.Array:
    """base + the sum of x over all pairs but one, in the layout of that pair."""
    vertical = [x[2 * k] + x[2 * k + 1] for k in range(1, len(x) // 2) if k != pair]
    if pair:
        return functools.reduce(jnp.add, vertical, plus_turned(base, x[0], x[1], batch))
    *rest, last = [x[d] for d in range(2, len(x))]
    return plus_turned(base, functools.reduce(jnp.add, rest), last, batch)


def beliefs(p: Lines, messages: Messages) -> jax.Array:
    """b = theta + sum of all messages, (B, H, W, L)."""
    batch = p.batch
    return from_lines(_plus_others(p.thetas[1], messages, len(messages), batch), False, batch)


def iterate(
    schedule: Schedule, p: Lines, messages: Messages, with_indices: bool = False, temperature: jax.Array | None = None
) -> tuple[Messages, tuple]:
    """One iteration over all directions; the indices are a tuple of D pairs (P, Q), or empty."""
    batch = p.batch
    live, indices = list(messages), []
    for pair in range(schedule.num_directions // 2):
        source = messages if schedule.synchronous else live
        u = _plus_others(p.thetas[pair > 0], source, pair, batch)
        for d in (2 * pair, 2 * pair + 1):
            opposite = None if schedule.edge_probability == 1.0 else source[d ^ 1]
            weight = None if p.weights is None else p.weights[d]
            pairwise = transpose(p.pairwise) if d % 2 else p.pairwise
            options: dict[str, Any] = {
                "edge_probability": schedule.edge_probability,
                "reverse": d % 2 == 1,
                "step": step(d),
                "num_images": batch,
            }
            if temperature is not None:
                request = Sweep(u=u, opposite=opposite, pairwise=pairwise, edge_weight=weight, **options)
                live[d] = _soft_sweep(request, temperature)
                continue
            # Gauss-Seidel never reads an old own message again, so the new one may take its place.
            options["out"] = None if schedule.synchronous else messages[d]
            found = sweep(
                u,
                opposite,
                pairwise,
                edge_weight=weight,
                with_indices=with_indices,
                implementation=schedule.implementation,
                **options,
            )
            if with_indices:
                live[d] = found[0]
                indices.append(found[1:])
            else:
                live[d] = found
    return tuple(live), tuple(indices)


def _soft_sweep(request: Sweep, temperature: jax.Array) -> jax.Array:
    """t(lam) = sum_mu softmax_mu(-e / temperature) e with e = a + w V: the soft variant of the min, differentiated by
    JAX."""
    u, pairwise = request.u, request.pairwise
    base = dense_base(pairwise, u.shape[1], u.dtype)[:, :, None]

    def product(a: jax.Array, w: jax.Array | None) -> tuple[jax.Array]:
        scale = jnp.asarray(pairwise.weight).astype(a.dtype)
        scale = scale.reshape(1, 1, 1) if w is None else (scale * w)[None, None]
        e = a[:, None] + scale * base
        t = (jax.nn.softmax(-e / temperature.astype(a.dtype), axis=0) * e).sum(0)
        return (t - t.min(0, keepdims=True),)

    return walk(request, product, (jnp.zeros_like(u),), mask=True)[0]


def run(schedule: Schedule, p: Lines, messages: Messages, iterations: int, with_indices: bool = False) -> tuple:
    """Several iterations; indices are stacked along a new first axis."""
    body = lambda carry, _: iterate(schedule, p, carry, with_indices)
    return jax.lax.scan(body, messages, None, length=iterations)


# A processor works from its caches: 8 images of Tsukuba at once take 36 times as long as one, one after the other 8
# times.
CPU_CHUNK_BYTES = 8 * 2**20


def solve_in_chunks(problem: Problem, checkpoint_every: int | None) -> tuple[jax.Array, Messages]:
    """`solve`, on a CPU for as many images at a time as their unaries fit `CPU_CHUNK_BYTES`."""
    unaries = problem.unaries
    batch = unaries.shape[0]
    chunk = batch
    if jax.default_backend() == "cpu":
        fits = max(1, CPU_CHUNK_BYTES * batch // (unaries.size * unaries.dtype.itemsize))
        chunk = max(c for c in range(1, batch + 1) if batch % c == 0 and c <= fits)
    if chunk == batch:
        return solve(checkpoint_every, problem)
    count = batch // chunk

    def split(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    weights = None if problem.weights is None else split(problem.weights, 1)
    start = None if problem.messages is None else tuple(split(m, 2) for m in problem.messages)

    def one(x: tuple) -> tuple[jax.Array, Messages]:
        return solve(checkpoint_every, dataclasses.replace(problem, unaries=x[0], weights=x[1], messages=x[2]))

    beliefs, messages = jax.lax.map(one, (split(unaries, 0), weights, start))
    together = lambda m: jnp.moveaxis(m, 0, 2).reshape(*m.shape[1:3], -1)
    return beliefs.reshape(unaries.shape), tuple(together(m) for m in messages)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solve(checkpoint_every: int | None, problem: Problem) -> tuple[jax.Array, Messages]:
    """Beliefs (B, H, W, L), differentiable in the problem, and messages, which are not and count as constants."""
    p = problem.lines()
    messages, _ = run(problem.schedule, p, problem.start(p), problem.schedule.num_iterations)
    return beliefs(p, messages), messages


def _solve_forward(checkpoint_every: int | None, problem: Problem) -> tuple[tuple[jax.Array, Messages], tuple]:
    schedule, p = problem.schedule, problem.lines()
    messages = problem.start(p)
    if checkpoint_every is None:
        messages, indices = run(schedule, p, messages, schedule.num_iterations, with_indices=True)
        # The gradient of one iteration needs argmins and weights, and of the unaries only the shape.
        return (beliefs(p, messages), messages), (dataclasses.replace(problem, unaries=None, messages=None), indices)
    chunk = lambda carry, _: (run(schedule, p, carry, checkpoint_every)[0], carry)
    messages, checkpoints = jax.lax.scan(chunk, messages, None, length=schedule.num_iterations // checkpoint_every)
    return (beliefs(p, messages), messages), (dataclasses.replace(problem, messages=None), checkpoints)


def _solve_backward(checkpoint_every: int | None, residuals: tuple, cotangents: tuple) -> tuple:
    problem, stored = residuals
    g, _ = cotangents
    schedule, num_iterations = problem.schedule, problem.schedule.num_iterations
    # Only shapes and weights of `p` matter unless iterations are computed again: g stands for the unaries otherwise.
    p = (dataclasses.replace(problem, unaries=g) if problem.unaries is None else problem).lines()
    gs = (to_lines(g, True), to_lines(g, False))
    state = _Gradients(
        ds=p.zeros(schedule.num_directions),
        theta=tuple(jnp.zeros_like(x) for x in gs),
        weights=None if p.weights is None else tuple(jnp.zeros_like(w) for w in p.weights),
        pairwise=jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.result_type(x)), problem.pairwise),
    )

    def through(state: _Gradients, indices: tuple, is_last: jax.Array) -> _Gradients:
        """Through as many iterations as the indices hold; `is_last` marks the one whose beliefs the loss sees."""
        body = lambda s, x: (_iterate_backward(schedule, p, gs, s, *x), None)
        return jax.lax.scan(body, state, (indices, is_last), reverse=True)[0]

    if checkpoint_every is None:
        state = through(state, stored, jnp.arange(num_iterations) == num_iterations - 1)
    else:

        def chunk(state: _Gradients, x: tuple) -> tuple[_Gradients, None]:
            messages, is_last = x
            _, indices = run(schedule, p, messages, checkpoint_every, with_indices=True)
            return through(state, indices, is_last), None

        is_last = (jnp.arange(num_iterations) == num_iterations - 1).reshape(-1, checkpoint_every)
        state, _ = jax.lax.scan(chunk, state, (stored, is_last), reverse=True)

    batch = g.shape[0]
    d_unaries = g + from_lines(state.theta[1] + turn(state.theta[0], batch), False, batch)
    d_weights = None
    if state.weights is not None:
        d_weights = jnp.stack([from_lines(w[:, None], d < 2, batch)[..., 0] for d, w in enumerate(state.weights)])
    return (dataclasses.replace(problem, unaries=d_unaries, pairwise=state.pairwise, weights=d_weights, messages=None),)


solve.defvjp(_solve_forward, _solve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def single_sweep(
    schedule: Schedule, d: int, images: int, u: jax.Array, pairwise: Pairwise, weight: jax.Array | None
) -> jax.Array:
    """Messages of one direction at rho = 1, differentiable."""
    return _single_sweep_forward(schedule, d, images, u, pairwise, weight)[0]


def _single_sweep_forward(
    schedule: Schedule, d: int, images: int, u: jax.Array, pairwise: Pairwise, weight: jax.Array | None
) -> tuple[jax.Array, tuple]:
    v = transpose(pairwise) if d % 2 else pairwise
    options = _single_options(schedule, d, images, weight)
    m, *indices = sweep(u, None, v, with_indices=True, **options)
    return m, (indices, pairwise, weight)


def _single_sweep_backward(schedule: Schedule, d: int, images: int, residuals: tuple, dm: jax.Array) -> tuple:
    indices, pairwise, weight = residuals
    v = transpose(pairwise) if d % 2 else pairwise
    options = _single_options(schedule, d, images, weight)
    ds, dw, dv = sweep_backward(dm, None, *indices, v, **options)
    return ds, transpose(dv) if d % 2 else dv, dw


def _single_options(schedule: Schedule, d: int, images: int, weight: jax.Array | None) -> dict[str, Any]:
    return {
        "edge_weight": weight,
        "edge_probability": 1.0,
        "reverse": d % 2 == 1,
        "step": step(d),
        "num_images": images,
        "implementation": schedule.implementation,
    }


single_sweep.defvjp(_single_sweep_forward, _single_sweep_backward)


class _Gradients(NamedTuple):
    """Carry of the backward pass.

    Attributes:
      ds: D arrays like the messages, dS of the sweeps of the following iteration (newest first in Gauss-Seidel order).
      theta: sum of du, in both layouts.
      weights, pairwise: sums of the gradients in them.
    """

    ds: Messages
    theta: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...] | None
    pairwise: Pairwise


def _iterate_backward(
    schedule: Schedule,
    p: Lines,
    gs: tuple[jax.Array, jax.Array],
    state: _Gradients,
    indices: tuple,
    is_last: jax.Array,
) -> _Gradients:
    batch = p.batch
    rho = jnp.asarray(schedule.edge_probability, gs[0].dtype)
    live, theta = list(state.ds), list(state.theta)
    weights = None if state.weights is None else list(state.weights)
    pairwise = state.pairwise
    for pair in reversed(range(schedule.num_directions // 2)):
        source = state.ds if schedule.synchronous else live
        g = gs[pair > 0]
        # The loss sees the beliefs of the last iteration, hence all its messages.
        dm = rho * _plus_others(jnp.where(is_last, g / rho, jnp.zeros_like(g)), source, pair, batch)
        for d in (2 * pair + 1, 2 * pair):
            found = sweep_backward(
                dm,
                None if schedule.edge_probability == 1.0 else source[d ^ 1],
                *indices[d],
                transpose(p.pairwise) if d % 2 else p.pairwise,
                edge_weight=None if p.weights is None else p.weights[d],
                edge_probability=schedule.edge_probability,
                reverse=d % 2 == 1,
                step=step(d),
                num_images=batch,
                out=None if schedule.synchronous else state.ds[d],
                implementation=schedule.implementation,
            )
            live[d] = found[0]
            if weights is not None:
                weights[d] = weights[d] + found[1]
            pairwise = jax.tree.map(jnp.add, pairwise, transpose(found[2]) if d % 2 else found[2])
        theta[pair > 0] = theta[pair > 0] + rho * (live[2 * pair] + live[2 * pair + 1])
    return _Gradients(tuple(live), tuple(theta), None if weights is None else tuple(weights), pairwise)
