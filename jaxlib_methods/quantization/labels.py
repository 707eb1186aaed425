"""Label sets: the few values that quantized weights may take."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["BINARY", "TERNARY", "symmetric_labels"]

Labels = tuple[float, ...]

BINARY = (-1.0, 1.0)
TERNARY = (-1.0, 0.0, 1.0)


def symmetric_labels(count: int) -> Labels:
    """The integers around zero: with zero for odd counts, without it for even ones.

    Args:
      count: number of labels, at least 2.

    Returns:
      A label set, ascending.

    Raises:
      ValueError: fewer than two labels.

    Example:
      >>> symmetric_labels(2), symmetric_labels(3), symmetric_labels(4)
      ((-1.0, 1.0), (-1.0, 0.0, 1.0), (-2.0, -1.0, 1.0, 2.0))

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, official code [ajanthan2019proximal].
    """
    if count < 2:
        raise ValueError(f"a label set needs at least two labels, got {count}")
    half = count // 2
    return tuple(float(q) for q in range(-half, half + 1) if q or count % 2)


def label_steps(labels: Labels) -> tuple[np.ndarray, np.ndarray, float]:
    """Midpoints m_j and half gaps h_j between neighbouring labels, and the centre c of the interval."""
    q = np.sort(np.asarray(labels, np.float64))
    return (q[1:] + q[:-1]) / 2, (q[1:] - q[:-1]) / 2, float(q[0] + q[-1]) / 2


def nearest_index(x: jax.Array, labels: Labels) -> jax.Array:
    """Index into the sorted labels of the one nearest to x, int32; a tie goes away from zero, and up at zero."""
    midpoints, _, _ = label_steps(labels)
    above = [x >= x.dtype.type(m) if m >= 0 else x > x.dtype.type(m) for m in midpoints]
    return functools.reduce(jnp.add, [a.astype(jnp.int32) for a in above])


def look_up(index: jax.Array, labels: Sequence[float], dtype: jax.typing.DTypeLike) -> jax.Array:
    """labels[index] by selects: elementwise, so that it fuses and keeps any sharding."""
    w = jnp.full_like(index, labels[0], dtype=dtype)
    for l, q in enumerate(labels[1:], start=1):
        w = jnp.where(index == l, jnp.full_like(w, q), w)
    return w


def as_labels(labels: Sequence[float | int]) -> Labels:
    """A label set as a tuple of floats in the given order, or ValueError."""
    try:
        values = tuple(float(label) for label in labels)
    except (TypeError, ValueError):
        raise ValueError(f"a label set must be a sequence of numbers such as (-1, 1), got {labels!r}") from None
    if len(values) < 2:
        raise ValueError(f"a label set needs at least two labels, got {labels!r}; (-1, 1) is the binary one")
    if len(set(values)) != len(values) or not all(np.isfinite(values)):
        raise ValueError(f"labels must be finite and distinct, got {labels!r}")
    return values
