"""Random invertible matrices with their inverses, for the boundaries between stages; in float64 on the host."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxlib_methods._core import checks

__all__ = [
    "Transform",
    "draw_transform",
    "draw_transforms",
]


class Transform(NamedTuple):
    """A matrix T of a boundary with its inverse, float64 on the host.

    Args:
      matrix: T, (..., d, d).
      inverse: its inverse.

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """

    matrix: np.ndarray
    inverse: np.ndarray


def draw_transform(
    width: int,
    *,
    key: jax.Array,
    spread: float | int | None = None,
    scale: float | int = 1.0,
    batch: Sequence[int] = (),
) -> Transform:
    r"""A random transform: uniform on the orthogonal group, or with a bounded condition number.

    Orthogonal: $T = Q\,\mathrm{diag}(\mathrm{sign}(\mathrm{diag} R))$ for the QR decomposition of a normal matrix. Its
    reflections are drawn and the matrix is not, which saves the decomposition. With a spread,
    $T = P_1\,\mathrm{diag}(s\,e^{u_i})\,P_2^\top$ with two such matrices and $u_i$ uniform in
    $[-\epsilon, \epsilon]$: its condition number is at most $e^{2 \epsilon}$.

    Args:
      width: d.
      key: typed key; it must not be kept.
      spread: epsilon; None: orthogonal.
      scale: s. Alternate s and 1/s, so that the product of many does not grow.
      batch: leading axes of independent transforms, for stacked layers.

    Returns:
      The transform, (*batch, d, d).

    Raises:
      ValueError: for a width below 1, a negative spread, a scale that is not positive or one without a spread.

    Example:
      >>> T = draw_transform(8, key=jax.random.key(0), spread=0.1)
      >>> bool(np.linalg.cond(T.matrix) <= np.exp(0.2)), bool(np.allclose(T.matrix @ T.inverse, np.eye(8), atol=1e-14))
      (True, True)

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable]; the signs: Mezzadri (2007),
    arXiv:math-ph/0609050 [mezzadri2007generate]; the reflections: Stewart (1980) [stewart1980efficient].
    """
    checks.at_least(1, width=width)
    checks.not_negative(spread=spread, remedy="None draws orthogonal transforms")
    if not scale > 0 or (spread is None and scale != 1):
        raise ValueError(f"scale must be positive, and needs a spread (0 is one), got {scale} and spread={spread}")
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).reshape(-1))
    first = _haar(random, (*batch, width, width))
    if spread is None:
        return Transform(first, transpose(first))
    second = _haar(random, (*batch, width, width))
    values = scale * np.exp(random.uniform(-spread, spread, (*batch, 1, width)))
    return Transform((first * values) @ transpose(second), (second / values) @ transpose(first))


def _haar(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Reflection i takes the normal vector x_i, d - i long, to the axis i: what is left of a column is still normal."""
    x = np.triu(random.standard_normal(shape))  # rows x_i
    first = np.diagonal(x, axis1=-2, axis2=-1).copy()
    diagonal = -np.copysign(np.linalg.norm(x, axis=-1), first)  # of R
    x /= (first - diagonal)[..., None]
    factors = 1 - first / diagonal
    factors[..., -1], diagonal[..., -1] = 0, first[..., -1]  # nothing to reflect
    return _reflections(x, factors) * np.sign(diagonal)[..., None, :]


def _reflections(vectors: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The products of I - f_i v_i v_i^T with v_i = (0, ..., 0, 1, vectors[i, i + 1 :])."""
    from scipy.linalg import lapack  # with JAX, but not loaded by it

    if vectors.ndim > 2:
        return np.stack(list(map(_reflections, vectors, factors)))
    product, _, error = lapack.dorgqr(vectors.T, factors, lwork=64 * len(factors), overwrite_a=1)
    if error:
        raise RuntimeError(f"LAPACK's dorgqr refused argument {-error}")
    return product


def transpose(a: np.ndarray) -> np.ndarray:
    return np.swapaxes(a, -1, -2)


def draw_transforms(
    names: Iterable[Hashable],
    width: int,
    *,
    key: jax.Array,
    spread: float | int | None = None,
    scale: float | int = 1.0,
) -> dict[Hashable, Transform]:
    """Independent transforms by name, all of one size.

    Args:
      names: of the boundaries, in an order that all processes share.
      width: d.
      key: typed key.
      spread: as for `draw_transform`.
      scale: as for `draw_transform`.

    Returns:
      name -> transform.

    Example:
      >>> sorted(draw_transforms(["in", "out"], 4, key=jax.random.key(0)))
      ['in', 'out']

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    draw = lambda index: draw_transform(width, key=jax.random.fold_in(key, index), spread=spread, scale=scale)
    return {name: draw(index) for index, name in enumerate(names)}
