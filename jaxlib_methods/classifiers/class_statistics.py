"""Counts, means and within-class scatter of features, streamed: sums that merge exactly over batches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core.linalg import matmul

__all__ = ["ClassStatistics", "init_class_statistics", "merge_class_statistics", "update_class_statistics"]


class ClassStatistics(NamedTuple):
    """Counts, means and within-class scatter of features: sums that merge exactly over batches and devices.

    Example:
      >>> init_class_statistics(3, 5).scatter.shape
      (5, 5)
    """

    count: jax.Array  # float [K]: examples of each class
    mean: jax.Array  # float [K, d]: class means, zero for a class without examples
    scatter: jax.Array  # float [d, d], or [K, d, d] by class: sum of (f - mu_y)(f - mu_y)^T


def init_class_statistics(
    num_classes: int, num_features: int, *, by_class: bool = False, dtype: jax.typing.DTypeLike = jnp.float32
) -> ClassStatistics:
    """Statistics of no examples.

    Args:
      num_classes: K.
      num_features: d.
      by_class: keep one scatter a class, K d^2 numbers; the numerical rank needs it.
      dtype: float32 or float64.

    Returns:
      Zeros.

    Example:
      >>> init_class_statistics(3, 5, by_class=True).scatter.shape
      (3, 5, 5)
    """
    shape = (num_features, num_features)
    return ClassStatistics(
        jnp.zeros((num_classes,), dtype),
        jnp.zeros((num_classes, num_features), dtype),
        jnp.zeros((num_classes, *shape) if by_class else shape, dtype),
    )


def merge_class_statistics(a: ClassStatistics, b: ClassStatistics) -> ClassStatistics:
    """Statistics of the union of two sets of examples, exactly.

    n = n_a + n_b, delta = mu_b - mu_a: mu = mu_a + delta n_b / n, S = S_a + S_b + (n_a n_b / n) delta delta^T.

    Args:
      a: statistics of one set.
      b: of another, with the same shapes.

    Returns:
      Those of both.

    Example:
      >>> import jax.numpy as jnp
      >>> empty = init_class_statistics(2, 1)
      >>> a = update_class_statistics(empty, jnp.array([[1.0], [3.0]]), jnp.array([0, 0]))
      >>> b = update_class_statistics(empty, jnp.array([[5.0]]), jnp.array([0]))
      >>> both = merge_class_statistics(a, b)
      >>> both.mean.tolist(), both.scatter.tolist()
      ([[3.0], [0.0]], [[8.0]])
    """
    n = a.count + b.count
    share = b.count / jnp.maximum(n, 1)
    delta = b.mean - a.mean
    spread = (jnp.sqrt(a.count * share))[:, None] * delta
    by_class = a.scatter.ndim == 3
    between = spread[:, :, None] * spread[:, None, :] if by_class else matmul(spread.T, spread)
    return ClassStatistics(n, a.mean + share[:, None] * delta, a.scatter + b.scatter + between)


def update_class_statistics(statistics: ClassStatistics, features: jax.Array, labels: jax.Array) -> ClassStatistics:
    """Adds a batch; pure and jittable, so it runs where the features are.

    Args:
      statistics: so far.
      features: f, shape (B, d).
      labels: (B,), integers; an example whose label lies outside [0, K) is left out (use -1 to pad).

    Returns:
      The statistics with the batch.

    Example:
      >>> import jax.numpy as jnp
      >>> f, y = jnp.array([[1.0], [3.0], [9.0]]), jnp.array([0, 0, -1])
      >>> s = update_class_statistics(init_class_statistics(2, 1), f, y)
      >>> s.count.tolist(), s.mean.tolist(), s.scatter.tolist()
      ([2.0, 0.0], [[2.0], [0.0]], [[2.0]])
    """
    dtype = statistics.mean.dtype
    f = features.astype(dtype)
    members = jax.nn.one_hot(labels, statistics.count.shape[0], dtype=dtype)
    count = jnp.sum(members, axis=0)
    mean = matmul(members.T, f) / jnp.maximum(count, 1)[:, None]
    inside = jnp.sum(members, axis=1, keepdims=True)
    centred = inside * (f - matmul(members, mean))
    if statistics.scatter.ndim == 3:
        scatter = jnp.einsum("bk,bi,bj->kij", members, centred, centred, precision=jax.lax.Precision.HIGHEST)
    else:
        scatter = matmul(centred.T, centred)
    return merge_class_statistics(statistics, ClassStatistics(count, mean, scatter))
