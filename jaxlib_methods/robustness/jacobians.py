"""The Jacobian of a network's logits with respect to its images, and what is read from it."""

import functools

import jax
import jax.numpy as jnp

from jaxlib_methods.typing import ApplyFn, PyTree

__all__ = [
    "logit_gram",
    "logit_jacobian",
    "logit_singular_values",
]


def logit_jacobian(apply_fn: ApplyFn, params: PyTree, images: jax.Array) -> jax.Array:
    r"""Jacobian of the logits with respect to every image, $J = \partial a / \partial x$, by d backward passes at once.

    Args:
      apply_fn: `(params, images) -> logits [batch, d]`, in which images do not influence one another (batch norm with
        running statistics).
      params: its first argument.
      images: [batch, ...].

    Returns:
      [batch, d, ...], in the dtype of the images: 4 batch d N bytes for float32 images of N numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> W = jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
      >>> logit_jacobian(lambda W, x: x @ W, W, jnp.zeros((1, 2))).tolist()
      [[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]]

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    return logits_and_jacobian(apply_fn, params, images)[1]


def logits_and_jacobian(apply_fn: ApplyFn, params: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [batch, d] and their Jacobian [batch, d, ...] from one forward pass."""
    logits, pull_back = jax.vjp(functools.partial(apply_fn, params), images)
    basis = jnp.broadcast_to(jnp.eye(logits.shape[1], dtype=logits.dtype)[:, None], (logits.shape[1], *logits.shape))
    return logits, jnp.moveaxis(jax.vmap(lambda e: pull_back(e)[0])(basis), 0, 1)


def logit_gram(logits: jax.Array, J: jax.Array) -> jax.Array:
    """Gram matrices [batch, d, d] of the Jacobian's rows relative to the best label's, for `log_hessian_norm`."""
    rows = J.reshape(*J.shape[:2], -1)
    rows = rows - jnp.take_along_axis(rows, jnp.argmax(logits, axis=1)[:, None, None], axis=1)
    return jnp.einsum("bin,bjn->bij", rows, rows, precision=jax.lax.Precision.HIGHEST)


def logit_singular_values(apply_fn: ApplyFn, params: PyTree, images: jax.Array) -> jax.Array:
    """Singular values of the logits' Jacobian for every image, how strongly logits react to it.

    Args:
      apply_fn: `(params, images) -> logits`, as in `logit_jacobian`. Compiled once for every such object.
      params: its first argument.
      images: [batch, ...].

    Returns:
      [batch, min(d, N)], descending, of an image with N numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> W = jnp.array([[3.0, 0.0], [0.0, 5.0]])
      >>> logit_singular_values(lambda W, x: x @ W, W, jnp.zeros((1, 2))).tolist()
      [[5.0, 3.0]]

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    return _singular_values(apply_fn, params, images)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _singular_values(apply_fn: ApplyFn, params: PyTree, images: jax.Array) -> jax.Array:
    jacobian = logit_jacobian(apply_fn, params, images)
    return jnp.linalg.svd(jacobian.reshape(*jacobian.shape[:2], -1), compute_uv=False)


def values_at(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[i, labels[i]], as a masked sum, which is sharded as its arguments are."""
    chosen = jnp.arange(values.shape[1])[None] == labels[:, None]
    return jnp.sum(jnp.where(chosen, values, jnp.zeros_like(values)), axis=1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(a)_k, [batch]."""
    return jax.nn.logsumexp(logits, axis=1) - values_at(logits, labels)
