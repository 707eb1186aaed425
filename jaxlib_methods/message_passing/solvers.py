"""SGM, ISGMR and TRWP: MAP inference by scanline message passing (Xu, Ajanthan, Hartley, ACCV 2020)."""

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.message_passing._lines import Messages
from jaxlib_methods.message_passing._problem import Problem, Schedule
from jaxlib_methods.message_passing._programs import Solution as Solution, argmin, path_costs, solve, unbatched
from jaxlib_methods.message_passing.grid import GridMRF
from jaxlib_methods.typing import Implementation, Rounding, SGMVariant

__all__ = ["Solution", "isgmr", "sgm", "trwp"]


def trwp(
    mrf: GridMRF,
    *,
    num_iterations: int = 50,
    num_directions: int = 4,
    edge_probability: float | int = 0.5,
    rounding: Rounding = "argmin",
    evaluate_every: int | None = None,
    tolerance: float | int | None = None,
    messages: Messages | None = None,
    checkpoint_every: int | None = None,
    temperature: float | int | jax.Array | None = None,
    implementation: Implementation | None = None,
) -> Solution:
    """Tree-reweighted message passing with parallel scanlines.

    Directions in order, in place: with rho the edge appearance probability and the newest messages,

        S_p = rho [theta_p + sum_(k != d) m_p^k] - m_p^opposite
        m_i(lam) = min_mu [S_p(mu) + rho m_p^d(mu) + w V(mu, lam)] less its minimum
        beliefs = theta + sum_d m^d

    Args:
      mrf: the problem.
      num_iterations: sweeps over all directions; static.
      num_directions: 4, 8 or 16; static.
      edge_probability: rho. 0.5 is right for 4 directions (each pixel lies in a row and a column); the authors' code
        uses it for all. Static.
      rounding: "argmin" of the beliefs as in the paper, or "sequential" (4 directions only), which finds lower
        energies; static.
      evaluate_every: compute energy and bound every so many iterations (and after the last); None never does. Beliefs
        are then not differentiable. Static.
      tolerance: stop once (energy - bound) <= tolerance |bound| for the best of both, in every image of the batch.
        Needs `evaluate_every` and 4 directions.
      messages: start from these instead of zeros; constants to differentiation.
      checkpoint_every: for the backward pass, keep the messages of every so many iterations and compute the argmins
        between them again, instead of keeping all argmins. A divisor of `num_iterations`; static.
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
      >>> solution = trwp(mp.GridMRF(unaries, mp.potentials.potts(1.0)), evaluate_every=1, tolerance=0.0)
      >>> solution.labels
      Array([[0, 1, 1],
             [0, 1, 1]], dtype=int32)
      >>> solution.energies[:2], solution.bounds[:2]  # optimal after the first iteration, which is proved by the second
      (Array([ 2., nan], dtype=float32), Array([ 2., nan], dtype=float32))

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    schedule = Schedule(num_directions, float(edge_probability), False, implementation, num_iterations, rounding)
    return solve(mrf, schedule, messages, evaluate_every, tolerance, checkpoint_every, temperature)


def isgmr(
    mrf: GridMRF,
    *,
    num_iterations: int = 50,
    num_directions: int = 4,
    rounding: Rounding = "argmin",
    evaluate_every: int | None = None,
    messages: Messages | None = None,
    checkpoint_every: int | None = None,
    temperature: float | int | jax.Array | None = None,
    implementation: Implementation | None = None,
) -> Solution:
    """Iterative semi-global matching revised: loopy min-sum with a scanline schedule, all directions from the last
    iteration.

        m_i(lam) = min_mu [theta_p + m_p^d + sum_(k != d, opposite) m_p^k(old) + w V(mu, lam)] less its minimum
        beliefs = theta + sum_d m^d

    With whole-number costs all messages are exact whole numbers. It need not converge: with 4 directions it often
    oscillates.

    Args:
      mrf, num_iterations, num_directions, rounding: as in `trwp`.
      evaluate_every, messages, checkpoint_every, temperature, implementation: likewise.

    Returns:
      A `Solution`; its bounds are valid but useless.

    Raises:
      ValueError: for an invalid problem or options that do not fit together.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> unaries = jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2)
      >>> isgmr(mp.GridMRF(unaries, mp.potentials.potts(1.0)), num_iterations=2).labels
      Array([[0, 1, 1],
             [0, 1, 1]], dtype=int32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    schedule = Schedule(num_directions, 1.0, True, implementation, num_iterations, rounding)
    return solve(mrf, schedule, messages, evaluate_every, None, checkpoint_every, temperature)


def sgm(
    mrf: GridMRF,
    *,
    num_directions: int = 4,
    variant: SGMVariant = "messages",
    num_iterations: int = 1,
    implementation: Implementation | None = None,
) -> Solution:
    """Semi-global matching, in the two forms that the authors' code has on the GPU and on the CPU.

    * "messages": the first iteration of ISGMR, beliefs = D theta + sum_d m^d: the current pixel's unary is not in its
      messages.
    * "path_costs": L_i^d = theta_i + min_mu [L_p^d(mu) + w V(mu, .)] less its minimum, beliefs = sum_d L^d; L = 0 at
      the first pixel of every line, whose own cost is thus dropped. The published energies are of this form. Iterated,
      it replaces theta by the beliefs.

    Args:
      mrf: the problem.
      num_directions: 4, 8 or 16; static.
      variant: which form; static.
      num_iterations: more than 1 only for "path_costs"; static.
      implementation: of the sweeps.

    Returns:
      A `Solution`, differentiable in the problem. Path costs are not a reparametrisation: no messages come with them.

    Raises:
      ValueError: for an invalid problem or options that do not fit together.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> sgm(mp.GridMRF(jnp.array([[[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]]] * 2), mp.potentials.potts(1.0))).labels
      Array([[0, 1, 1],
             [0, 1, 1]], dtype=int32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.one_of(SGMVariant, variant=variant)
    checks.at_least(1, num_iterations=num_iterations)
    schedule = Schedule(num_directions, 1.0, True, implementation, num_iterations)
    if variant == "messages":
        if num_iterations != 1:
            raise ValueError(
                f"num_iterations must be 1 for variant 'messages', got {num_iterations}; isgmr iterates it"
            )
        solution = solve(mrf, schedule)
        beliefs = solution.beliefs + jnp.asarray(num_directions - 1, mrf.unaries.dtype) * mrf.unaries
        return solution._replace(beliefs=beliefs, labels=argmin(beliefs))
    beliefs = path_costs(Problem.of(mrf, schedule))
    solution = Solution(beliefs, argmin(beliefs), (), jnp.asarray(num_iterations, jnp.int32))
    return solution if mrf.unaries.ndim == 4 else unbatched(solution)
