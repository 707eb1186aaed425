"""Classifier heads on normalised features: nearest (implicit) ETF, fixed ETF, learned with unit rows.

All three see f = tau h / max(||h||, 1e-12) and return logits f W^T + b. Arrays first, then the flax modules.
The kernel is stored as W^T (d x K), the way flax stores it.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_methods._core import checks
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.classifiers._nearest_etf import first_prox, nearest_etf, scale_to_unit_norm
from jaxlib_methods.classifiers.class_means import class_sums, normalize_features, running_class_means, validate_batch
from jaxlib_methods.classifiers.simplex import check_frame_size, etf_weights, simplex_etf
from jaxlib_methods.typing import ClassAverage, PolarMethod, UnseenClasses


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


def _check_call(features: jax.Array, num_features: int) -> None:
    if features.ndim != 2 or features.shape[1] != num_features:
        raise ValueError(
            f"features must be (B, {num_features}), got {features.shape}; pool the backbone's output first"
        )


class HeadState(nnx.BatchStat):
    """A variable of a head that training updates without gradients; checkpoints and filters treat it as a BatchStat."""


class _Head(nnx.Module):
    def __init__(self, num_features: int, num_classes: int, temperature: float):
        checks.positive(temperature=temperature)
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
      proximal_weight: delta, of the proximal term.
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
        proximal_weight: float = 1e-3,
        average: ClassAverage = "ema",
        unseen: UnseenClasses = "global_mean",
        implicit_gradient: bool = True,
        method: PolarMethod | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        use_running_average: bool = False,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        super().__init__(num_features, num_classes, temperature)
        check_frame_size(num_classes, num_features)
        checks.one_of(ClassAverage, average=average)
        checks.one_of(UnseenClasses, unseen=unseen)
        checks.positive(proximal_weight=proximal_weight, remedy="without the proximal term the frame is not unique")
        self.proximal_weight = proximal_weight
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
        U = nearest_etf(Y, prox, proximal_weight=self.proximal_weight, normalize=False, method=self.method)
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
