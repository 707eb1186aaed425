r"""What an attacker gets who collects the stages of a transformed model over time.

p is its share of the compute, R the replicas, S the stages and T the number of transforms so far.
"""

import math

import jax
import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods.typing import Incompatibility

__all__ = [
    "estimate_bridge",
    "estimate_entry_bridge",
    "extraction_probability",
]


def extraction_probability(
    share: float, *, num_replicas: int, num_stages: int, num_transforms: int, incompatibility: Incompatibility = "full"
) -> float:
    r"""The probability that an attacker at some time holds stages that fit together.

    none: $(1 - (1-p)^{RT})^S$: any stages do, from any time. partial: $(1 - (1 - P_2)^{T-2})^{S-1}$ with
    $P_2 = (1 - (1-p)^{3R})^2$: the two sides of each boundary from neighbouring times, as in an MLP. full:
    $1 - (1 - (1 - (1-p)^{3R})^S)^{T-2}$: all stages from neighbouring times, as skip connections demand.

    Args:
      share: p, in [0, 1].
      num_replicas: R.
      num_stages: S.
      num_transforms: T, at least 2.
      incompatibility: of stages from different times, "none", "partial" or "full".

    Returns:
      The probability, accurate also where it is tiny.

    Raises:
      ValueError: for a share outside of [0, 1], sizes that are too small, or an unknown incompatibility.

    Example:
      >>> f"{extraction_probability(1e-3, num_replicas=10, num_stages=10, num_transforms=10**6):.3g}"
      '5.11e-10'

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    checks.within("[0, 1]", share=share)
    checks.at_least(1, num_replicas=num_replicas, num_stages=num_stages)
    checks.at_least(2, num_transforms=num_transforms)
    checks.one_of(Incompatibility, incompatibility=incompatibility)
    if incompatibility == "none":
        return _some_of(share, num_replicas * num_transforms) ** num_stages
    one = _some_of(share, 3 * num_replicas)
    if incompatibility == "partial":
        return _some_of(one**2, num_transforms - 2) ** (num_stages - 1)
    return _some_of(one**num_stages, num_transforms - 2)


def _some_of(p: float, n: int) -> float:
    """1 - (1 - p)^n without cancellation."""
    return 1.0 if p >= 1 and n else -math.expm1(n * math.log1p(-p)) if p < 1 else 0.0


def estimate_bridge(x: jax.typing.ArrayLike, later: jax.typing.ArrayLike, *, orthogonal: bool = False) -> np.ndarray:
    r"""The matrix-system attack: $\hat T = X(t)^+ X(t')$ from what the same inputs gave at two times.

    Exact if X has full column rank and the inputs were the same, which a run prevents by never repeating them. With
    $\hat T$, stages of the two times fit together.

    Args:
      x: activations at a boundary at time t, (..., d).
      later: of the same inputs at time t'.
      orthogonal: whether to look for an orthogonal matrix (Procrustes).

    Returns:
      float64 (d, d).

    Raises:
      ValueError: for different shapes.

    Example:
      >>> X, T = np.eye(3) + 1.0, np.diag([1.0, 2.0, 3.0])
      >>> bool(np.allclose(estimate_bridge(X, X @ T), T))
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    if np.shape(x) != np.shape(later):
        raise ValueError(f"activations of the same inputs have one shape, got {np.shape(x)} and {np.shape(later)}")
    X, Y = (np.asarray(a, np.float64).reshape(-1, np.shape(a)[-1]) for a in (x, later))
    if orthogonal:
        left, _, right = np.linalg.svd(X.T @ Y)
        return left @ right
    return np.linalg.lstsq(X, Y, rcond=None)[0]


def estimate_entry_bridge(entry: jax.typing.ArrayLike, later: jax.typing.ArrayLike) -> np.ndarray:
    r"""The bridge between two times from an entry matrix that is not trained: $\hat T = D(t)\, D(t')^+$.

    N of `gpt.transformable_gpt_stages` and D of `gpt_coordinates.coordinate_gpt_stages` only collect transforms,
    $D(t') = T^{-1} D(t)$. Who knows the first, from an earlier look or because everybody knows D(0), such as $U^\top$
    of a subspace network, needs no inputs.

    Args:
      entry: D at time t, (k, d) with k <= d independent rows.
      later: D of the same stage at time t'.

    Returns:
      float64 (k, k); the best in the sense of least squares if `later` is no transform of `entry`.

    Raises:
      ValueError: for different shapes.

    Example:
      >>> D, T = np.eye(2, 3), np.array([[1.0, 2.0], [0.0, 1.0]])
      >>> bool(np.allclose(estimate_entry_bridge(D, np.linalg.inv(T) @ D), T))
      True

    Source: for the transforms of Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    if np.shape(entry) != np.shape(later):
        raise ValueError(f"entry matrices of one stage have one shape, got {np.shape(entry)} and {np.shape(later)}")
    D, after = np.asarray(entry, np.float64), np.asarray(later, np.float64)
    return np.linalg.lstsq(after.T, D.T, rcond=None)[0].T
