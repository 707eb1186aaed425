"""Automatic gradient descent (AGD): the step length follows from the architecture, there is no learning rate to tune.

Symbols, for each of the L weights W (..., fan_in, fan_out) with positions (kh, kw) in the leading axes:
  sigma = sqrt(fan_out / fan_in) / sqrt(kh kw)       the spectral norm that initialisation gives every position
  g     = ||dL/dW||_F over the two channel axes, per position
  Gbar  = (1/L) sum_weights sigma sum_positions g
  eta   = log((1 + sqrt(1 + 4 Gbar)) / 2)
  W    <- W - gain eta / L  sigma / g  dL/dW
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core.dtypes import common_compute_dtype, compute_dtype
from jaxlib_methods._core.linalg import haar
from jaxlib_methods.typing import PyTree


def _sigma(shape: Sequence[int]) -> float:
    if len(shape) < 2:
        raise ValueError(
            f"AGD is defined for weights of rank 2 and more, got a parameter of shape {tuple(shape)}; leave biases and "
            "normalisation scales out of the network, or give them another optimizer with optax.partition"
        )
    fan_in, fan_out = shape[-2:]
    return math.sqrt(fan_out / fan_in / math.prod(shape[:-2]))


def agd_initializer() -> Callable[..., jax.Array]:
    """The initializer that AGD's analysis assumes: orthogonal at every kernel position, times sigma.

    Returns:
      `init(key, shape, dtype)` for weights (..., fan_in, fan_out): every position has all its singular values equal to
      sqrt(fan_out / fan_in) / sqrt(number of positions).

    Raises:
      ValueError: on call, for a shape of rank below 2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> W = agd_initializer()(jax.random.key(0), (3, 3, 4, 16))
      >>> [round(float(s), 4) for s in jnp.linalg.svd(W[0, 0], compute_uv=False)]
      [0.6667, 0.6667, 0.6667, 0.6667]

    Source: Bernstein, Mingard, Huang, Azizan, Yue (2023), arXiv:2304.05187 [bernstein2023automatic].
    """

    def init(
        key: jax.Array, shape: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        sigma = _sigma(shape)
        W = (sigma * haar(key, shape, compute_dtype(dtype))).astype(dtype)
        return W if out_sharding is None else jax.sharding.reshard(W, out_sharding)

    return init


def scale_by_agd() -> optax.GradientTransformationExtraArgs:
    """AGD's direction and length, eta / L sigma / g dL/dW, without the gain and the minus sign.

    The gradients are used as they are: no momentum, no state. A position whose gradient is zero stays where it is.

    Returns:
      A stateless transformation of gradients of rank 2 and more (the last two axes are fan_in, fan_out).

    Raises:
      ValueError: on init or update, for a parameter of rank below 2.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_agd()
      >>> W = jnp.eye(2)
      >>> updates, _ = rule.update(2 * W, rule.init(W), W)
      >>> round(float(jnp.linalg.norm(updates)), 4)  # log((1 + sqrt(1 + 4 * 2 sqrt(2))) / 2)
      0.8129

    Source: Bernstein, Mingard, Huang, Azizan, Yue (2023), arXiv:2304.05187 [bernstein2023automatic].
    """

    def init(params: PyTree) -> optax.EmptyState:
        for leaf in jax.tree.leaves(params):
            _sigma(leaf.shape)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        dtype = common_compute_dtype(leaves)
        L = len(leaves)
        sigmas = [_sigma(leaf.shape) for leaf in leaves]
        squares = [jnp.sum(jnp.square(leaf.astype(dtype)), axis=(-2, -1), keepdims=True) for leaf in leaves]
        g = [jnp.sqrt(square) for square in squares]
        Gbar = sum(sigma * jnp.sum(norm) for sigma, norm in zip(sigmas, g, strict=True)) / L
        eta = jnp.log1p(2 * Gbar / (1 + jnp.sqrt(1 + 4 * Gbar)))  # the logarithm above, exact for small gradients
        scaled = [
            (eta / L * sigma * jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 0) * leaf.astype(dtype)).astype(
                leaf.dtype
            )
            for leaf, sigma, norm in zip(leaves, sigmas, g, strict=True)
        ]
        return structure.unflatten(scaled), state

    return optax.GradientTransformationExtraArgs(init, update)


def agd(gain: optax.ScalarOrSchedule = 10.0) -> optax.GradientTransformationExtraArgs:
    """Automatic gradient descent for networks made of weights only (no biases, no normalisation scales).

    Args:
      gain: multiplies the step; 1 is the theory's, 10 that of the nearest-ETF recipe. A schedule is accepted.

    Returns:
      The optimizer.

    Raises:
      ValueError: on init, for a parameter of rank below 2.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> W, tx = jnp.eye(3), agd(gain=1.0)
      >>> state = tx.init(W)
      >>> for _ in range(10):  # gradient descent on ||W - 1/2||_F^2 / 2
      ...     updates, state = tx.update(W - 0.5, state, W)
      ...     W = optax.apply_updates(W, updates)
      >>> bool(jnp.abs(W - 0.5).max() < 1e-3)
      True

    Source: Bernstein, Mingard, Huang, Azizan, Yue (2023), arXiv:2304.05187 [bernstein2023automatic].
    """
    return optax.chain(scale_by_agd(), optax.scale_by_learning_rate(gain))
