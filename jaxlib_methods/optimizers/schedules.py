"""Schedules of the optimizers: the ranks of NuMuon, and the momenta of the Nesterov method.

A rank schedule gives the fraction r(t) in (0, 1] of a matrix's singular dyads that a step takes. A matrix with
d = min(rows, columns) takes k_t = min(d, max(1, ceil(r(t) d))) of them.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks

__all__ = [
    "cosine_rank_schedule",
    "momentum_schedule",
    "piecewise_rank_schedule",
    "theory_momentum",
]

# ceil(r d) of a product that is an integer but for round-off of r in float32 is that integer.
ROUND_OFF = 2.0**-20


def dyads(r: float | jax.Array, d: int) -> int | jax.Array:
    """k = min(d, max(1, ceil(r d))): an int of a Python float, an int32 scalar of an array."""
    if isinstance(r, float):
        return min(d, max(1, math.ceil((r - ROUND_OFF) * d)))
    return jnp.clip(jnp.ceil((r - ROUND_OFF) * d).astype(jnp.int32), 1, d)


def check_fraction(name: str, r: float) -> float:
    """r, or a ValueError where it is not in (0, 1]."""
    checks.within("(0, 1]", **{name: r}, remedy="it is a fraction of min(rows, columns)")
    return float(r)


def cosine_rank_schedule(
    total_steps: int, start: float = 1.0, end: float = 0.25, *, hold: float = 0.1, until: float = 0.9
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Holds the rank at `start`, lowers it along half a cosine, and holds it at `end`.

    r(t) = start for t < hold T, end for t >= until T, and end + (start - end) (1 + cos(pi p)) / 2 in between, with
    p = (t - hold T) / (until T - hold T).

    Args:
      total_steps: T.
      start: fraction at the beginning, in (0, 1].
      end: fraction at the end, in (0, 1].
      hold: share of the steps at the beginning with the rank at `start`.
      until: share of the steps after which the rank is at `end`.

    Returns:
      The schedule, a function of the step.

    Raises:
      ValueError: no steps, a fraction outside (0, 1], or not 0 <= hold < until <= 1.

    Example:
      >>> r = cosine_rank_schedule(1000, 1.0, 0.25)
      >>> [round(float(r(t)), 3) for t in (100, 300, 500, 700, 900)]
      [1.0, 0.89, 0.625, 0.36, 0.25]

    Source: Dolatabadi et al. (2026), arXiv:2603.03597 [dolatabadi2026numuon].
    """
    checks.at_least(1, total_steps=total_steps)
    check_fraction("start", start)
    check_fraction("end", end)
    if not 0 <= hold < until <= 1:
        raise ValueError(f"hold and until must satisfy 0 <= hold < until <= 1, got hold={hold}, until={until}")

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        p = (jnp.asarray(count, jnp.float32) / total_steps - hold) / (until - hold)
        return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(p, 0, 1)))

    return schedule


def piecewise_rank_schedule(
    boundaries: Sequence[int], values: Sequence[float]
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """A constant rank on each segment of the steps.

    Args:
      boundaries: steps t_1 < t_2 < ... at which the rank changes.
      values: fractions in (0, 1], one more than there are boundaries: r(t) = values[i] for t_i <= t < t_{i+1}, t_0 = 0.

    Returns:
      The schedule, a function of the step.

    Raises:
      ValueError: boundaries that do not increase, a wrong number of values, or a value outside (0, 1].

    Example:
      >>> r = piecewise_rank_schedule([100, 500], [1.0, 0.5, 0.25])
      >>> [float(r(t)) for t in (0, 99, 100, 499, 500)]
      [1.0, 1.0, 0.5, 0.5, 0.25]

    Source: Dolatabadi et al. (2026), arXiv:2603.03597 [dolatabadi2026numuon].
    """
    if len(values) != len(boundaries) + 1:
        raise ValueError(f"values must be one more than boundaries, got {len(values)} and {len(boundaries)}")
    if any(later <= earlier for earlier, later in zip([0, *boundaries], boundaries, strict=False)):
        raise ValueError(f"boundaries must be positive and increase, got {list(boundaries)}")
    fractions = [check_fraction(f"values[{i}]", value) for i, value in enumerate(values)]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        segment = jnp.searchsorted(jnp.asarray(boundaries, jnp.int32), jnp.asarray(count, jnp.int32), side="right")
        return jnp.asarray(fractions, jnp.float32)[segment]

    return schedule


def momentum_schedule(
    step: jax.Array, b1: jax.typing.ArrayLike = 0.99, momentum_decay: jax.typing.ArrayLike = 0.004
) -> jax.Array:
    r"""The momentum of NAdam's step t, $\mu_t = \beta_1 (1 - \tfrac12 0.96^{t \psi})$.

    It grows from b1 / 2 towards b1, with half of the way done at t = 17 / psi.

    Args:
      step: t = 1, 2, ..., a floating-point array of any shape.
      b1: beta_1, the limit.
      momentum_decay: psi; larger is faster, and infinity means mu_t = b1.

    Returns:
      mu_t, of the shape and dtype of `step`.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(momentum_schedule(jnp.float32(t))), 4) for t in (1, 1000, 50_000)]
      [0.4951, 0.5696, 0.9899]

    Source: Dozat (ICLR workshop 2016) [dozat2016incorporating]; the constants are PyTorch's.
    """
    return jnp.asarray(b1 * (1 - 0.5 * jnp.exp(step * (momentum_decay * math.log(0.96)))))


def theory_momentum(step: jax.Array) -> jax.Array:
    r"""The momentum of the convergence theorem, $\gamma_t = (t - 2) / t$, for `scale_by_discounted_nesterov`.

    At t = 1 the formula gives -1 where there is no previous step to extrapolate; 0 is used there.

    Args:
      step: t = 1, 2, ..., an array of any shape.

    Returns:
      gamma_t in [0, 1), float32, or float64 with a float64 `step`.

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(g), 3) for g in theory_momentum(jnp.arange(1.0, 6.0))]
      [0.0, 0.0, 0.333, 0.5, 0.6]

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099, eq. 10 [ajanthan2025nesterov].
    """
    t = step if jnp.issubdtype(step.dtype, jnp.floating) else step.astype(jnp.float32)
    return jnp.maximum(1 - 2 / t, 0)
