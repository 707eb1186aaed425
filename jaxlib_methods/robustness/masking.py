"""Does a network resist an attack, or does it hide its gradients? What the input gradient is made of, image by image.

The gradient beta J^T (p - y) is zero in float32 when p - y is (logits too far apart) or when J is; a sign method then
has no direction. The first is what a factor on the logits cures.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.robustness import _feasible
from jaxlib_methods.robustness.jacobians import cross_entropy, logits_and_jacobian, values_at
from jaxlib_methods.typing import ApplyFn, PyTree

__all__ = [
    "GradientMaskingResult",
    "gradient_masking",
]


class GradientMaskingResult(NamedTuple):
    """Where the input gradients of a batch are lost."""

    vanished: jax.Array  # float32 []: share of images whose gradient has no entry above the threshold
    gradient_norm: jax.Array  # [batch]: L2 norm of the gradient of the cross-entropy with respect to the image
    error_signal: jax.Array  # [batch]: 1 - p_k, the probability outside the true class
    logit_gap: jax.Array  # [batch]: largest minus second largest logit
    logit_range: jax.Array  # [batch]: largest minus smallest logit
    singular_values: jax.Array  # [batch, min(d, N)]: of the logits' Jacobian, descending


def gradient_masking(
    apply_fn: ApplyFn,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    *,
    logit_scale: jax.typing.ArrayLike = 1.0,
    threshold: jax.typing.ArrayLike = 0.0,
) -> GradientMaskingResult:
    r"""Diagnoses vanished input gradients: $\beta J^\top (p - y)$, its two factors, and the logits they come from.

    Args:
      apply_fn: `(params, images) -> logits [batch, d]`, in which images do not influence one another. Compiled once for
        every such object.
      params: its first argument.
      images: [batch, ...].
      labels: the true classes, integers [batch].
      logit_scale: beta, the factor on the logits in the loss, a number or [batch]; their statistics are without it.
      threshold: largest absolute entry up to which a gradient counts as vanished; 0 means exactly zero.

    Returns:
      A `GradientMaskingResult`.

    Raises:
      ValueError: logits that are not finite (looked at outside jit).

    Example:
      >>> import jax.numpy as jnp
      >>> W = 200 * jnp.array([[1.0, -1.0]])
      >>> found = gradient_masking(lambda W, x: x @ W, W, jnp.array([[1.0], [0.0]]), jnp.array([0, 0]))
      >>> float(found.vanished), found.logit_gap.tolist(), found.error_signal.tolist()
      (0.5, [400.0, 0.0], [0.0, 0.5])

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    logit_scale = jnp.broadcast_to(jnp.asarray(logit_scale, images.dtype), labels.shape)
    found, finite = _look(apply_fn, params, images, labels, logit_scale, jnp.asarray(threshold, images.dtype))
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError("the network's logits are NaN or infinite; look at params and at the images")
    return found


@functools.partial(jax.jit, static_argnames="apply_fn")
def _look(
    apply_fn: ApplyFn,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    logit_scale: jax.Array,
    threshold: jax.Array,
) -> tuple[GradientMaskingResult, jax.Array]:
    logits, jacobian = logits_and_jacobian(apply_fn, params, images)
    rows = jacobian.reshape(*jacobian.shape[:2], -1)

    def loss(x: jax.Array) -> jax.Array:
        scaled = logit_scale[:, None].astype(logits.dtype) * apply_fn(params, x)
        return jnp.sum(cross_entropy(scaled, labels))

    gradient = jax.grad(loss)(images).reshape(len(images), 1, -1)  # as an attack sees it, underflow included
    log_p = values_at(jax.nn.log_softmax(logit_scale[:, None] * logits), labels)
    largest = jax.lax.top_k(logits, 2)[0]
    found = GradientMaskingResult(
        vanished=jnp.mean(jnp.max(jnp.abs(gradient), axis=(1, 2)) <= threshold, dtype=jnp.float32),
        gradient_norm=_feasible.row_norms(gradient)[:, 0],
        error_signal=jnp.abs(jnp.expm1(log_p)),
        logit_gap=largest[:, 0] - largest[:, 1],
        logit_range=jnp.max(logits, axis=1) - jnp.min(logits, axis=1),
        singular_values=jnp.linalg.svd(rows, compute_uv=False),
    )
    return found, jnp.isfinite(logits).all()
