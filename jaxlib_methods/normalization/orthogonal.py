"""Orthogonal weights: uniform initialisation, orthogonalisation, and training on the manifold.

A matrix with more rows than columns has orthonormal columns, one with fewer has orthonormal rows; leading axes are a
batch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import widen
from jaxlib_methods._core.linalg import (
    eye_like,
    haar,
    matmul,
    newton_schulz_step,
    on_whole_matrices,
    orthonormal,
    transpose,
)
from jaxlib_methods.typing import OrthogonalRetraction, PyTree

__all__ = [
    "bjorck",
    "haar_orthogonal",
    "orthogonal_retraction",
    "orthogonality_error",
    "riemannian_gradient",
]


def haar_orthogonal(
    key: jax.Array, shape: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32, out_sharding: Any = None
) -> jax.Array:
    """Uniformly distributed (semi-)orthogonal matrices: an initializer for plain arrays and for flax.

    QR of a Gaussian matrix with the columns of Q multiplied by the signs of diag(R); without the signs the law is not
    uniform. A tall matrix has orthonormal columns, a wide one orthonormal rows.

    Args:
      key: typed key.
      shape: (..., n, m); leading axes are a batch of independent matrices.
      dtype: floating type; half precision is drawn in float32 and rounded.
      out_sharding: as in JAX's own initializers.

    Returns:
      W, of that shape.

    Raises:
      ValueError: fewer than two axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> W = haar_orthogonal(jax.random.key(0), (2, 5, 5))
      >>> bool(jnp.abs(W[1].T @ W[1] - jnp.eye(5)).max() < 1e-5)
      True

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    if len(shape) < 2:
        raise ValueError(f"an orthogonal matrix needs two axes, got shape {tuple(shape)}")
    W = haar(key, shape, dtype)
    return W if out_sharding is None else jax.sharding.reshard(W, out_sharding)


def orthogonality_error(W: jax.Array) -> jax.Array:
    """||W^T W - I||_F of each matrix, ||W W^T - I||_F of a wide one; its square is the soft penalty of some losses.

    Args:
      W: (..., n, m).

    Returns:
      The distance, shape (...).

    Example:
      >>> import jax.numpy as jnp
      >>> float(orthogonality_error(2.0 * jnp.eye(4)))
      6.0

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    W = W if W.shape[-2] >= W.shape[-1] else transpose(W)
    G = matmul(transpose(W), W)
    return jnp.sqrt(jnp.sum((G - eye_like(G)) ** 2, axis=(-2, -1)))


def bjorck(W: jax.Array, *, num_steps: int = 2) -> jax.Array:
    """Bjorck's orthogonalisation W <- W (3/2 I - 1/2 W^T W), quadratically convergent to the polar factor.

    Args:
      W: (..., n, m) with spectral norm below sqrt(3). bfloat16 is iterated in float32: its products would leave an
        error of 1e-2.
      num_steps: iterations; two are enough after an optimizer's step.

    Returns:
      Nearly (semi-)orthogonal matrices of the same shape and type.

    Raises:
      ValueError: a negative num_steps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> W = haar_orthogonal(jax.random.key(0), (6, 6)) + 0.02 * jax.random.normal(jax.random.key(1), (6, 6))
      >>> [f"{float(orthogonality_error(bjorck(W, num_steps=s))):.0e}" for s in (0, 1, 2)]
      ['2e-01', '1e-02', '1e-04']

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    checks.not_negative(num_steps=num_steps)
    wide = W.shape[-2] < W.shape[-1]
    X = widen(transpose(W) if wide else W)
    for _ in range(num_steps):
        X = newton_schulz_step(X, matmul(transpose(X), X), (1.5, -0.5))
    return (transpose(X) if wide else X).astype(W.dtype)


def riemannian_gradient(W: jax.Array, G: jax.Array) -> jax.Array:
    """Projection of a gradient to the tangent space of the orthogonal matrices at W.

    G_R = 1/2 (G W^T - W G^T) W for square W; in general G - W sym(W^T G), the tangent of the Stiefel manifold in the
    Euclidean metric, which is the same for square W.

    Args:
      W: (..., n, m) with orthonormal columns (rows, if wide).
      G: the Euclidean gradient, same shape.

    Returns:
      G_R, same shape: W^T G_R + G_R^T W = 0.

    Example:
      >>> import jax.numpy as jnp
      >>> riemannian_gradient(jnp.eye(2), jnp.array([[5.0, 1.0], [0.0, 7.0]])).tolist()
      [[0.0, 0.5], [-0.5, 0.0]]

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    if W.shape[-2] < W.shape[-1]:
        return transpose(riemannian_gradient(transpose(W), transpose(G)))
    S = matmul(transpose(W), G)
    return G - matmul(W, (S + transpose(S)) / 2)


def _retract(W: jax.Array, method: OrthogonalRetraction) -> jax.Array:
    if method == "bjorck":
        return bjorck(W, num_steps=2)
    wide = W.shape[-2] < W.shape[-1]
    Q = orthonormal(transpose(W) if wide else W)
    return transpose(Q) if wide else Q


def orthogonal_retraction(
    inner: optax.GradientTransformation, *, method: OrthogonalRetraction = "qr"
) -> optax.GradientTransformationExtraArgs:
    """Keeps weights orthogonal under any optimizer: project its step to the tangent space, take it, retract.

    The gradient is projected before `inner` sees it and the step again after, since momentum leaves the tangent space.
    The update that comes out is (retracted W) - W, so that `optax.apply_updates` lands on the manifold. Parameters with
    fewer than two axes pass through `inner` alone; use `optax.masked` or `optax.partition` to leave others out.

    Args:
      inner: the optimizer, e.g. `optax.sgd(0.1)`.
      method: "qr" (sign-fixed, exact) or "bjorck" (two matrix-product iterations, faster on accelerators; needs steps
        that are small against 1, and restores what they leave within the next steps).

    Returns:
      A transformation that needs `params`, (semi-)orthogonal from the start (`haar_orthogonal`).

    Raises:
      ValueError: unknown method; `params` missing on update.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> W, tx = jnp.eye(3), orthogonal_retraction(optax.sgd(0.1))
      >>> updates, _ = tx.update(jnp.arange(9.0).reshape(3, 3), tx.init(W), W)
      >>> bool(orthogonality_error(optax.apply_updates(W, updates)) < 1e-6)
      True

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169; the retraction is this library's choice
    [lu2020bidirectionally].
    """
    checks.one_of(OrthogonalRetraction, method=method)
    inner = optax.with_extra_args_support(inner)

    def tangent(G: jax.Array, W: jax.Array) -> jax.Array:
        return riemannian_gradient(widen(W), widen(G)).astype(G.dtype)

    def step(u: jax.Array, W: jax.Array) -> jax.Array:
        X = widen(W)
        return (_retract(X + riemannian_gradient(X, widen(u)), method) - X).astype(u.dtype)

    def on_matrices(f: Callable[..., jax.Array], u: jax.Array, W: jax.Array) -> jax.Array:
        return u if W.ndim < 2 else on_whole_matrices(f, u, W)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError("orthogonal_retraction needs params; call update(updates, state, params)")
        updates, state = inner.update(
            jax.tree.map(functools.partial(on_matrices, tangent), updates, params), state, params, **extra_args
        )
        return jax.tree.map(functools.partial(on_matrices, step), updates, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
