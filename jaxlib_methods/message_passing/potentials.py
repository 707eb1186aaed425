"""Pairwise costs V(|lam - mu|) by name, all multiplied by a weight (Xu, Ajanthan, Hartley, ACCV 2020).

`weight` and the tables are arrays and may be learned; whatever decides a shape or a fast path is static.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlib_methods._core import checks
from jaxlib_methods.kernels.scanline import Pairwise
from jaxlib_methods.typing import QuadraticTruncation

__all__ = [
    "Pairwise",
    "cauchy",
    "huber",
    "linear",
    "negative_potts",
    "potts",
    "quadratic",
    "table",
    "toeplitz",
    "truncated_linear",
    "truncated_quadratic",
]


def potts(weight: ArrayLike = 1.0) -> Pairwise:
    """V = weight [lam != mu].

    Args:
      weight: non-negative scalar.

    Returns:
      A `Pairwise` of kind "potts": O(L) per pixel and direction.

    Raises:
      ValueError: for a negative weight.

    Example:
      >>> potts(2.0).kind
      'potts'

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    return Pairwise("potts", _weight(weight), semimetric=True)


def truncated_linear(weight: ArrayLike = 1.0, *, truncation: float | int) -> Pairwise:
    """V = weight min(|lam - mu|, truncation).

    Args:
      weight: non-negative scalar.
      truncation: positive, in labels; a whole number takes the O(L log T) doubling path, a fractional one a Toeplitz
        window.

    Returns:
      A `Pairwise`.

    Raises:
      ValueError: for a negative weight or a truncation that is not positive.

    Example:
      >>> truncated_linear(20.0, truncation=2).kind
      'truncated_linear'

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.positive(truncation=truncation)
    if float(truncation).is_integer():
        return Pairwise("truncated_linear", _weight(weight), truncation=int(truncation), semimetric=True)
    return _truncated(np.arange(math.ceil(truncation) + 1), truncation, weight)


def truncated_quadratic(weight: ArrayLike = 1.0, *, truncation: float | int, truncate: QuadraticTruncation) -> Pairwise:
    """V = weight min(|lam - mu|, truncation)^2, or weight min(|lam - mu|^2, truncation).

    The two readings of "truncated quadratic with T" differ by a square, and both are in use: the authors' stereo code
    truncates the distance (Venus with 7 is min(d^2, 49)), their denoising code and the Middlebury benchmark the cost
    (min(d^2, 7)).

    Args:
      weight: non-negative scalar.
      truncation: positive; labels for "distance", squared labels for "cost".
      truncate: which of the two; no default, so that nobody gets the other one unawares.

    Returns:
      A `Pairwise` with a Toeplitz window.

    Raises:
      ValueError: for a negative weight, a truncation that is not positive, or another `truncate`.

    Example:
      >>> truncated_quadratic(truncation=2, truncate="distance").profile
      Array([0., 1., 4.], dtype=float32)
      >>> truncated_quadratic(truncation=2, truncate="cost").profile
      Array([0., 1., 2.], dtype=float32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.one_of(QuadraticTruncation, truncate=truncate, remedy="'distance' is min(d, T)^2, 'cost' min(d^2, T)")
    checks.positive(truncation=truncation)
    limit = truncation**2 if truncate == "distance" else truncation
    return _truncated(np.arange(math.ceil(math.sqrt(limit)) + 1) ** 2, limit, weight)


def linear(weight: ArrayLike = 1.0, *, num_labels: int) -> Pairwise:
    """V = weight |lam - mu|.

    Args:
      weight: non-negative scalar.
      num_labels: L; the distance never exceeds L - 1, so this is the truncated linear cost there.

    Returns:
      A `Pairwise`.

    Raises:
      ValueError: for a negative weight or fewer than two labels.

    Example:
      >>> linear(num_labels=5).truncation
      4

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.at_least(2, num_labels=num_labels)
    return truncated_linear(weight, truncation=num_labels - 1)


def quadratic(weight: ArrayLike = 1.0, *, num_labels: int) -> Pairwise:
    """V = weight |lam - mu|^2.

    Args:
      weight: non-negative scalar.
      num_labels: L.

    Returns:
      A `Pairwise` with a profile over all distances: O(L^2) per pixel and direction.

    Raises:
      ValueError: for a negative weight or fewer than two labels.

    Example:
      >>> quadratic(num_labels=4).profile
      Array([0., 1., 4., 9.], dtype=float32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.at_least(2, num_labels=num_labels)
    return toeplitz(np.arange(num_labels) ** 2.0, weight)


def cauchy(weight: ArrayLike = 1.0, *, truncation: float | int, num_labels: int) -> Pairwise:
    """V = weight T^2/2 log(1 + (|lam - mu| / T)^2).

    Args:
      weight: non-negative scalar.
      truncation: T > 0, in labels: where the quadratic start bends.
      num_labels: L.

    Returns:
      A `Pairwise` with a profile over all distances.

    Raises:
      ValueError: for a negative weight, fewer than two labels or T that is not positive.

    Example:
      >>> cauchy(truncation=2.0, num_labels=3).profile.round(3)
      Array([0.   , 0.446, 1.386], dtype=float32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.at_least(2, num_labels=num_labels)
    checks.positive(truncation=truncation)
    return toeplitz(0.5 * truncation**2 * np.log1p((np.arange(num_labels) / truncation) ** 2), weight)


def huber(weight: ArrayLike = 1.0, *, truncation: float | int, num_labels: int) -> Pairwise:
    """V = weight d^2 up to T, weight (2 T d - T^2) beyond, d = |lam - mu|.

    Args:
      weight: non-negative scalar.
      truncation: T > 0, in labels: from where on V is linear.
      num_labels: L.

    Returns:
      A `Pairwise` with a profile over all distances.

    Raises:
      ValueError: for a negative weight, fewer than two labels or T that is not positive.

    Example:
      >>> huber(truncation=1.0, num_labels=4).profile
      Array([0., 1., 3., 5.], dtype=float32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.at_least(2, num_labels=num_labels)
    checks.positive(truncation=truncation)
    d = np.arange(num_labels)
    return toeplitz(np.where(d <= truncation, d**2, 2 * truncation * d - truncation**2), weight)


def negative_potts(weight: ArrayLike = 1.0) -> Pairwise:
    """V = -weight [lam == mu]: Potts less a constant, without its zero diagonal.

    Args:
      weight: non-negative scalar.

    Returns:
      A `Pairwise`.

    Raises:
      ValueError: for a negative weight.

    Example:
      >>> negative_potts(3.0).profile
      Array([-1.,  0.], dtype=float32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    return toeplitz(np.array([-1.0, 0.0]), weight)


def toeplitz(profile: ArrayLike | Sequence, weight: ArrayLike = 1.0, *, semimetric: bool | None = None) -> Pairwise:
    """V = weight profile[min(|lam - mu|, R)], R = len(profile) - 1: any cost of the label distance, truncated at R.

    Args:
      profile: (R + 1,) array, its last entry the largest unless R >= L - 1; may be learned. Small R is a window of 2 R
        - 1 shifts.
      weight: non-negative scalar.
      semimetric: promise that profile >= 0 and profile[0] = 0; found out by itself where the values are known, False
        under `jit`.

    Returns:
      A `Pairwise`.

    Raises:
      ValueError: for a negative weight or a profile that is not a vector.

    Example:
      >>> toeplitz([0.0, 1.0, 1.5]).semimetric
      True
    """
    values = _float(profile)
    if values.ndim != 1 or values.shape[0] < 2:
        raise ValueError(f"profile must be a vector of at least two costs, got shape {values.shape}")
    if semimetric is None:
        known = _known(profile)
        semimetric = known is not None and bool(known[0] == 0 and (known >= 0).all())
    return Pairwise("toeplitz", _weight(weight), profile=values, semimetric=semimetric)


def table(values: ArrayLike | Sequence, weight: ArrayLike = 1.0, *, semimetric: bool | None = None) -> Pairwise:
    """V = weight values[mu, lam], mu the label of the upper or left pixel of the edge: a free, possibly learned table.

    Args:
      values: (L, L) array; it need not be symmetric.
      weight: non-negative scalar.
      semimetric: promise that values >= 0 with a zero diagonal; found out by itself where they are known, False under
        `jit`.

    Returns:
      A `Pairwise`: O(L^2) per pixel and direction.

    Raises:
      ValueError: for a negative weight or a table that is not square.

    Example:
      >>> table([[0.0, 1.0], [3.0, 0.0]]).semimetric
      True

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    values_ = _float(values)
    if values_.ndim != 2 or values_.shape[0] != values_.shape[1]:
        raise ValueError(f"values must be a square (L, L) table, got shape {values_.shape}")
    if semimetric is None:
        known = _known(values)
        semimetric = known is not None and bool((np.diag(known) == 0).all() and (known >= 0).all())
    return Pairwise("table", _weight(weight), table=values_, semimetric=semimetric)


def _truncated(costs: np.ndarray, limit: float | int, weight: ArrayLike) -> Pairwise:
    return toeplitz(np.minimum(costs, limit), weight)


def _float(x: ArrayLike | Sequence) -> jax.Array:
    """A float array that is not weakly typed, so that numbers and arrays make the same program."""
    dtype = x.dtype if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)
    return jnp.asarray(x, dtype)


def _known(x: ArrayLike | Sequence) -> np.ndarray | None:
    """The values of a concrete argument; None for one that is being traced."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def _weight(weight: ArrayLike) -> jax.Array:
    known = _known(weight)
    if known is not None and (known.ndim != 0 or not known >= 0):
        raise ValueError(f"weight must be a non-negative scalar, got {weight}; signs belong into the profile or table")
    return _float(weight)
