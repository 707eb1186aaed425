"""Rank schedules of NuMuon: the fraction r(t) in (0, 1] of a matrix's singular dyads that a step takes.

A matrix with d = min(rows, columns) takes k_t = min(d, max(1, ceil(r(t) d))) of them.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# ceil(r d) of a product that is an integer but for round-off of r in float32 is that integer.
ROUND_OFF = 2.0**-20


def dyads(r: float | jax.Array, d: int) -> int | jax.Array:
    """k = min(d, max(1, ceil(r d))): an int of a Python float, an int32 scalar of an array."""
    if isinstance(r, float):
        return min(d, max(1, math.ceil((r - ROUND_OFF) * d)))
    return jnp.clip(jnp.ceil((r - ROUND_OFF) * d).astype(jnp.int32), 1, d)


def check_fraction(name: str, r: float) -> float:
    """r, or a ValueError where it is not in (0, 1]."""
    if not 0 < r <= 1:
        raise ValueError(f"{name} must be in (0, 1], a fraction of min(rows, columns), got {r}")
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
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
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
