"""What the heads see of a batch: normalised features, and class means that run along with training."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import widen
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.typing import ClassAverage, UnseenClasses

__all__ = ["class_sums", "normalize_features", "running_class_means", "validate_batch"]

ALPHA_FLOOR = 1e-4


def normalize_features(features: jax.Array, *, temperature: float = 5.0) -> jax.Array:
    """Features on the sphere of radius tau: f = tau h / max(||h||_2, 1e-12), in at least float32.

    Args:
      features: h, shape (..., d).
      temperature: tau.

    Returns:
      f, shape (..., d), float32 (float64 for float64 input).

    Example:
      >>> import jax.numpy as jnp
      >>> normalize_features(jnp.array([[3.0, 4.0]]), temperature=10.0).tolist()
      [[6.0, 8.0]]

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """
    h = widen(features)
    square = jnp.sum(h * h, axis=-1, keepdims=True)
    return temperature * h / jnp.sqrt(jnp.maximum(square, 1e-24))


def class_sums(
    features: jax.Array, labels: jax.Array, num_classes: int, *, axis_name: str | tuple[str, ...] | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums and counts of the features of each class, and their mean, over the whole (sharded) batch.

    Args:
      features: f, shape (B, d).
      labels: y, shape (B,), integers. A label outside [0, K) belongs to no class and counts in the mean only.
      num_classes: K.
      axis_name: mesh axis (or axes) of `jax.shard_map` that the batch is split over; None on one device and under `jit`
        with shardings, where the partitioner inserts the same reduction.

    Returns:
      sums (d, K), counts (K,), mean (d,), identical on every shard.

    Example:
      >>> import jax.numpy as jnp
      >>> sums, counts, mean = class_sums(jnp.array([[1.0], [2.0], [6.0]]), jnp.array([0, 1, 1]), 2)
      >>> sums.tolist(), counts.tolist(), mean.tolist()
      ([[1.0, 8.0]], [1.0, 2.0], [3.0])
    """

    def scatter(f: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:  # B d additions; labels outside are dropped
        return jax.ops.segment_sum(f, y, num_classes).T, jax.ops.segment_sum(jnp.ones_like(f[:, 0]), y, num_classes)

    def multiply(f: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:  # B d K, but in the same order every time
        members = jax.nn.one_hot(y, num_classes, dtype=f.dtype)
        return matmul(f.T, members), jnp.sum(members, axis=0)

    totals = jax.lax.platform_dependent(features, labels, cpu=scatter, default=multiply)
    totals = (*totals, jnp.sum(features, axis=0))
    size = features.shape[0]
    if axis_name is not None:
        totals = jax.lax.psum(totals, axis_name)
        size = size * jax.lax.psum(1, axis_name)
    sums, counts, total = totals
    return sums, counts, total / size


def running_class_means(
    batch: tuple[jax.Array, jax.Array, jax.Array],
    mean: jax.Array,
    seen: jax.Array,
    count: jax.Array,
    *,
    average: ClassAverage = "ema",
    unseen: UnseenClasses = "global_mean",
) -> tuple[jax.Array, jax.Array]:
    """One step of the running, centred class means.

    m_c = mean_{i: y_i = c} f_i - mu_G for the classes in the batch, Z_t = alpha_t [m_1 .. m_K] + (1 - alpha_t)
    F_{t-1} with alpha_t = max(2/(t+1), 1e-4), i.e. weights proportional to s for the steps s = 1..t. The gradient
    flows through the alpha_t-weighted current term only. A class that is absent now but was seen before keeps its
    column. A class never seen takes mu_G (the authors' code; note that the other columns are centred) or zero.

    Args:
      batch: sums (d, K), counts (K,), mean (d,) of `class_sums`.
      mean: F_{t-1}, shape (d, K).
      seen: flags (K,) of the classes met in any earlier batch.
      count: t - 1, the number of batches so far.
      average: "ema" (above) or "cumulative" (alpha_t = 1/t).
      unseen: "global_mean" or "zero", the column of a class that was never seen.

    Returns:
      Z_t (d, K) and the new flags (K,).

    Raises:
      ValueError: unknown `average` or `unseen`.

    Example:
      >>> import jax.numpy as jnp
      >>> F, seen = jnp.zeros((1, 2)), jnp.zeros(2, bool)
      >>> for t, v in enumerate([1.0, 2.0, 3.0]):
      ...     F, seen = running_class_means((jnp.array([[v, -v]]), jnp.ones(2), jnp.zeros(1)), F, seen, jnp.int32(t))
      >>> round(float(F[0, 0]), 4)
      2.3333

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """
    checks.one_of(ClassAverage, average=average)
    checks.one_of(UnseenClasses, unseen=unseen)
    sums, counts, mu_G = batch
    F = jax.lax.stop_gradient(mean)
    t = (count + 1).astype(F.dtype)
    alpha = jnp.maximum(2.0 / (t + 1.0), ALPHA_FLOOR) if average == "ema" else 1.0 / t
    present = counts > 0
    now_seen = seen | present
    m = sums / jnp.maximum(counts, 1)[None, :] - mu_G[:, None]
    default = jnp.broadcast_to(mu_G[:, None], F.shape) if unseen == "global_mean" else jnp.zeros_like(F)
    current = jnp.where(present[None, :], m, jnp.where(now_seen[None, :], F, default))
    # A class that appears for the first time after step 1 has the stand-in of its unseen days as its history.
    previous = jnp.where(now_seen[None, :], F, jax.lax.stop_gradient(default))
    return alpha * current + (1.0 - alpha) * previous, now_seen


def validate_batch(features: jax.typing.ArrayLike, labels: jax.typing.ArrayLike, *, num_classes: int) -> None:
    """Checks a batch on the host: traced code cannot raise, and one NaN stays in the running means for ever.

    Args:
      features: (B, d), anything NumPy can read.
      labels: (B,).
      num_classes: K.

    Raises:
      ValueError: a label outside [0, K), a feature that is not finite, shapes that disagree.

    Example:
      >>> import numpy as np
      >>> validate_batch(np.ones((1, 2)), np.array([3]), num_classes=3)
      Traceback (most recent call last):
      ...
      ValueError: labels must lie in [0, 3), got 3 at index 0; check num_classes and the data set's label offset
    """
    h, y = np.asarray(features), np.asarray(labels)
    if h.ndim != 2 or y.shape != h.shape[:1]:
        raise ValueError(f"features must be (B, d) and labels (B,), got {h.shape} and {y.shape}")
    outside = np.flatnonzero((y < 0) | (y >= num_classes))
    if outside.size:
        raise ValueError(
            f"labels must lie in [0, {num_classes}), got {y[outside[0]]} at index {outside[0]}; "
            "check num_classes and the data set's label offset"
        )
    bad = np.flatnonzero(~np.isfinite(h.astype(np.float32)).all(axis=1))
    if bad.size:
        raise ValueError(
            f"features must be finite, got NaN or infinity in {bad.size} of {h.shape[0]} rows, first row {bad[0]}; "
            "lower the learning rate or check the inputs"
        )
