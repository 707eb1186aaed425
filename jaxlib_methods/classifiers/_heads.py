"""Classifier heads on normalised features: nearest (implicit) ETF, fixed ETF, learned with unit rows.

All three see f = tau h / max(||h||, 1e-12) and return logits f W^T + b. Arrays first, then the flax modules.
The kernel is stored as W^T (d x K), the way flax stores it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlib_methods.classifiers._nearest_etf import first_prox, nearest_etf, scale_to_unit_norm
from jaxlib_methods.classifiers._polar import matmul
from jaxlib_methods.classifiers._simplex_etf import check_frame_size, compute_dtype, etf_weights, simplex_etf

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
    h = features.astype(compute_dtype(features.dtype))
    square = jnp.sum(h * h, axis=-1, keepdims=True)
    return temperature * h / jnp.sqrt(jnp.maximum(square, 1e-24))


def dot_regression_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Dot-regression loss 1/2 (f . w_y + b_y - 1)^2: only the logit of the true class is asked to be one.

    Args:
      logits: (..., K).
      labels: (...), integers in [0, K).

    Returns:
      The loss of each example, shape (...).

    Example:
      >>> import jax.numpy as jnp
      >>> dot_regression_loss(jnp.array([[3.0, 9.0]]), jnp.array([0])).tolist()
      [2.0]

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """
    own = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return 0.5 * (own - 1.0) ** 2


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
    average: str = "ema",
    unseen: str = "global_mean",
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
    _check_choice("average", average, ("ema", "cumulative"))
    _check_choice("unseen", unseen, ("global_mean", "zero"))
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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_call(features: jax.Array, num_features: int) -> None:
    if features.ndim != 2 or features.shape[1] != num_features:
        raise ValueError(
            f"features must be (B, {num_features}), got {features.shape}; pool the backbone's output first"
        )


class HeadState(nnx.BatchStat):
    """A variable of a head that training updates without gradients; checkpoints and filters treat it as a BatchStat."""


class _Head(nnx.Module):
    def __init__(self, num_features: int, num_classes: int, temperature: float):
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.num_features = num_features
        self.num_classes = num_classes
        self.temperature = temperature

    def _logits(self, f: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        logits = matmul(f, kernel.astype(f.dtype))
        return logits if bias is None else logits + bias.astype(f.dtype)[None, :]

    def normalized(self, features: jax.Array) -> jax.Array:
        """f, the features that the logits and the neural-collapse metrics are computed from."""
        _check_call(features, self.num_features)
        return normalize_features(features, temperature=self.temperature)


class NearestETFHead(_Head):
    """A classifier whose weights are, at every step, the simplex ETF nearest to the running class means.

    Training step t, for normalised features f: batch class means, centred by the batch mean mu_G, enter the running
    means (`running_class_means`); U* = `nearest_etf`(Z_t, U_{t-1}); W = sqrt(K/(K-1)) M U*^T; b = -W mu_G; logits =
    f W^T + b. Gradients reach the features through the logits, mu_G and U*. Nothing here is a parameter.

    Call the head as `head(features, labels)` in training. After `model.eval()` (or with `use_running_average=True`)
    it is `head(features)` with the W and b of the last training step. The state (`HeadState`) is part of
    `nnx.state(model)`: mean F (d, K), count t, prox U (d, K), seen (K,), kernel W^T (d, K), bias (K,).

    Args:
      num_features: d >= K - 1 (d >= K in the paper; for d = K - 1 the frame is built on a Helmert basis).
      num_classes: K.
      temperature: tau. The released recipe uses 5.
      delta: weight of the proximal term.
      average: "ema" or "cumulative".
      unseen: "global_mean" or "zero", see `running_class_means`.
      implicit_gradient: False stops the gradient at U* (the paper's ablation).
      method: see `polar`.
      axis_name: mesh axis of `jax.shard_map` that the batch is split over, so that every shard solves the same problem.
        Not needed under `jit` with shardings.
      param_dtype: type of the state, float32 or float64. All mathematics of the head is done in it or in float32,
        whatever the type of the network around it; logits come out in that type.

    Raises:
      ValueError: d < K - 1, or an argument out of range. On call: wrong shapes, no labels in training. Where the
        batch is concrete (outside `jit`), also labels out of range and non-finite features; inside `jit` use
        `validate_batch`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> head = NearestETFHead(8, 3)
      >>> h = jax.random.normal(jax.random.key(0), (12, 8))
      >>> logits = head(h, jnp.arange(12) % 3)
      >>> head.eval()
      >>> bool(jnp.allclose(head(h), logits, atol=1e-5)), int(head.count[...])
      (True, 1)

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        temperature: float = 5.0,
        delta: float = 1e-3,
        average: str = "ema",
        unseen: str = "global_mean",
        implicit_gradient: bool = True,
        method: str | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        use_running_average: bool = False,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        super().__init__(num_features, num_classes, temperature)
        check_frame_size(num_classes, num_features)
        _check_choice("average", average, ("ema", "cumulative"))
        _check_choice("unseen", unseen, ("global_mean", "zero"))
        if not delta > 0:
            raise ValueError(f"delta must be positive, got {delta}; without the proximal term the frame is not unique")
        self.delta = delta
        self.average = average
        self.unseen = unseen
        self.implicit_gradient = implicit_gradient
        self.method = method
        self.axis_name = axis_name
        self.use_running_average = use_running_average
        shape = (num_features, num_classes)
        self.mean = HeadState(jnp.zeros(shape, param_dtype))
        self.count = HeadState(jnp.zeros((), jnp.int32))
        self.prox = HeadState(jnp.eye(*shape, dtype=param_dtype))
        self.seen = HeadState(jnp.zeros((num_classes,), bool))
        self.kernel = HeadState(simplex_etf(num_classes, num_features, dtype=param_dtype).T)
        self.bias = HeadState(jnp.zeros((num_classes,), param_dtype))

    @jax.named_scope("NearestETFHead")
    def __call__(self, features: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        f = self.normalized(features)
        if self.use_running_average:
            return self._logits(f, self.kernel[...], self.bias[...])
        if labels is None:
            raise ValueError("labels are needed in training; call model.eval() to classify with the last frame")
        if not isinstance(features, jax.core.Tracer) and not isinstance(labels, jax.core.Tracer):
            validate_batch(features.astype(jnp.float32), labels, num_classes=self.num_classes)

        dtype = self.mean[...].dtype
        count = self.count[...]
        batch = class_sums(f.astype(dtype), labels, self.num_classes, axis_name=self.axis_name)
        Z, seen = running_class_means(
            batch, self.mean[...], self.seen[...], count, average=self.average, unseen=self.unseen
        )
        Y = scale_to_unit_norm(Z)
        prox = jax.lax.cond(count == 0, lambda Y, prox: first_prox(Y), lambda Y, prox: prox, Y, self.prox[...])
        U = nearest_etf(Y, prox, delta=self.delta, normalize=False, method=self.method)
        if not self.implicit_gradient:
            U = jax.lax.stop_gradient(U)
        W = etf_weights(U)
        b = -matmul(W, batch[2])

        state = (self.mean, Z), (self.prox, U), (self.kernel, W.T), (self.bias, b), (self.seen, seen)
        for variable, value in state:
            variable[...] = jax.lax.stop_gradient(value)
        self.count[...] = count + 1
        return self._logits(f, W.T, b)


class FixedETFHead(_Head):
    """A frozen simplex ETF as classifier; only the bias follows the features.

    W = sqrt(K/(K-1)) M I_{K x d}, b = -W mean_i f_i of the batch at hand, recomputed in every forward pass (evaluation
    included) without gradient.

    Args:
      num_features: d >= K - 1.
      num_classes: K.
      temperature: tau.
      rngs: draws a random rotation of the frame; None keeps the paper's canonical frame.
      axis_name: mesh axis of `jax.shard_map` that the batch is split over.
      param_dtype: type of the frame.

    Raises:
      ValueError: d < K - 1, wrong shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> head = FixedETFHead(4, 3)
      >>> head(jnp.eye(4)[:2]).shape
      (2, 3)

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        temperature: float = 5.0,
        rngs: nnx.Rngs | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        super().__init__(num_features, num_classes, temperature)
        self.axis_name = axis_name
        key = None if rngs is None else rngs.params()
        self.kernel = HeadState(simplex_etf(num_classes, num_features, key=key, dtype=param_dtype).T)

    @jax.named_scope("FixedETFHead")
    def __call__(self, features: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Logits (B, K) of features (B, d); labels are accepted and not used, so that heads are interchangeable."""
        f = self.normalized(features)
        mu = jnp.mean(f, axis=0)
        if self.axis_name is not None:
            mu = jax.lax.pmean(mu, self.axis_name)
        kernel = self.kernel[...]
        b = -matmul(jax.lax.stop_gradient(mu), kernel.astype(f.dtype))
        return self._logits(f, kernel, b)


class NormalizedHead(_Head):
    """A learned classifier without bias whose rows have unit length: the paper's standard baseline.

    Call `renormalize()` after every optimiser step.

    Args:
      num_features: d.
      num_classes: K.
      temperature: tau.
      rngs: for the initial rows, uniform on the sphere.
      param_dtype: type of the kernel.

    Raises:
      ValueError: wrong shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> head = NormalizedHead(4, 3, rngs=nnx.Rngs(0))
      >>> head.kernel[...] = 2 * head.kernel[...]
      >>> head.renormalize()
      >>> bool(jnp.allclose(jnp.linalg.norm(head.kernel[...], axis=0), 1))
      True

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        temperature: float = 5.0,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        super().__init__(num_features, num_classes, temperature)
        kernel = jax.random.normal(rngs.params(), (num_features, num_classes), param_dtype)
        self.kernel = nnx.Param(_unit_columns(kernel))

    def renormalize(self) -> None:
        """Scales each class's weights back to unit length; call it after every optimiser step."""
        self.kernel[...] = _unit_columns(self.kernel[...])

    @jax.named_scope("NormalizedHead")
    def __call__(self, features: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """Logits (B, K) of features (B, d); labels are accepted and not used, so that heads are interchangeable."""
        return self._logits(self.normalized(features), self.kernel[...], None)


def _unit_columns(kernel: jax.Array) -> jax.Array:
    return kernel / jnp.maximum(jnp.sqrt(jnp.sum(kernel * kernel, axis=0, keepdims=True)), 1e-12)
