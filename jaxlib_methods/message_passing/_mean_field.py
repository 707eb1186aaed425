"""Mean field on a grid, the baseline of Xu, Ajanthan, Hartley (ACCV 2020)."""

import functools

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.kernels.scanline import dense
from jaxlib_methods.message_passing._problem import Problem, Schedule
from jaxlib_methods.message_passing._programs import Solution, argmin, unbatched
from jaxlib_methods.message_passing.grid import DIRECTIONS, GridMRF, grid_energy, shift_grid


def mean_field(
    mrf: GridMRF,
    *,
    num_iterations: int = 50,
    num_directions: int = 4,
    evaluate: bool = False,
    remat: bool = False,
) -> Solution:
    """Parallel mean-field updates with the mean, not the sum, over the neighbours, as the paper's baseline does.

        q = softmax(-theta) at first;   n_i = 1/D sum_d w_i^d q_(i-d)   (zero outside the image)
        c_i(lam) = theta_i(lam) + sum_mu V(mu, lam) n_i(mu);   q = softmax(-c);   beliefs: the last c.

    Args:
      mrf: the problem.
      num_iterations: updates; static.
      num_directions: 4, 8 or 16; static.
      evaluate: also return the 4-connected energy of the labels after every iteration; static.
      remat: for the gradient, keep one distribution per iteration and compute the rest again; static.

    Returns:
      A `Solution` without messages and bounds, differentiable in the problem by JAX.

    Raises:
      ValueError: for an invalid problem or fewer than one iteration.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> mrf = mp.GridMRF(jnp.array([[[0.0, 4.0], [1.0, 0.9]], [[0.0, 4.0], [0.0, 4.0]]]), mp.potentials.potts(2.0))
      >>> mean_field(mrf, num_iterations=5).labels  # the noisy pixel follows its neighbours
      Array([[0, 0],
             [0, 0]], dtype=int32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.at_least(1, num_iterations=num_iterations)
    problem = Problem.of(mrf, Schedule(num_directions, 1.0, True, num_iterations=num_iterations))
    beliefs, energies = _mean_field(evaluate, remat, problem)
    solution = Solution(
        beliefs, argmin(beliefs), (), jnp.asarray(num_iterations, jnp.int32), energies if evaluate else None
    )
    return solution if mrf.unaries.ndim == 4 else unbatched(solution)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_field(evaluate: bool, remat: bool, problem: Problem) -> tuple[jax.Array, jax.Array | None]:
    unaries, pairwise, weights = problem.unaries, problem.pairwise, problem.weights
    num_directions = problem.schedule.num_directions
    v = dense(pairwise, unaries.shape[-1], unaries.dtype)

    def neighbours(q: jax.Array, first: int) -> jax.Array:
        """Mean over the directions of one parity: V is transposed on the way back along an edge."""
        total = jnp.zeros_like(q)
        for d in range(first, num_directions, 2):
            arrived = jnp.moveaxis(shift_grid(jnp.moveaxis(q, -1, 0), DIRECTIONS[d]), 0, -1)
            total = total + (arrived if weights is None else arrived * weights[d][..., None])
        return total / jnp.asarray(num_directions, q.dtype)

    def update(c: jax.Array, _: None) -> tuple[jax.Array, jax.Array | None]:
        q = jax.nn.softmax(-c, axis=-1)
        if pairwise.kind == "table":
            c = unaries + matmul(neighbours(q, 0), v) + matmul(neighbours(q, 1), v.T)
        else:
            c = unaries + matmul(neighbours(q, 0) + neighbours(q, 1), v)
        if not evaluate:
            return c, None
        return c, grid_energy(unaries, pairwise, weights, argmin(c), 4, unaries.dtype)

    return jax.lax.scan(
        jax.checkpoint(update) if remat else update, unaries, None, length=problem.schedule.num_iterations
    )
