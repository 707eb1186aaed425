"""Bidirectionally self-normalising networks: very deep plain networks whose forward and backward norms stay flat.

Symbols: h^l = W^l x^{l-1}, x^l = phi(h^l), W^l in O(n), y^l = dE/dh^l. Orthogonal weights (`orthogonal`) and GPN
activations (`gaussian_poincare`) keep ||x^l|| and ||y^l|| constant over the layers, up to fluctuations of order
sqrt(L / n).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.normalization.orthogonal import haar_orthogonal

__all__ = [
    "BSNParams",
    "SignalNorms",
    "apply_bsn",
    "init_bsn",
    "rescale_inputs",
    "signal_norms",
]


def rescale_inputs(x: jax.Array) -> jax.Array:
    """Each input on the sphere of radius sqrt(n), where a standard normal vector lies: ||x||^2 = n.

    Args:
      x: (..., n).

    Returns:
      The same direction with norm sqrt(n); a zero input stays zero.

    Example:
      >>> import jax.numpy as jnp
      >>> rescale_inputs(jnp.array([[5.0, 5.0]])).tolist()
      [[1.0, 1.0]]

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169; per-sample rescaling is this library's choice
    [lu2020bidirectionally].
    """
    norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
    return x / norm * math.sqrt(x.shape[-1])


class BSNParams(NamedTuple):
    """Weights of a plain network of equal layers, stacked so that depth is a scan and not L programs.

    Example:
      >>> BSNParams._fields
      ('first', 'hidden', 'last')

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """

    first: jax.Array  # [n, inputs], semi-orthogonal
    hidden: jax.Array  # [L - 1, n, n], orthogonal
    last: jax.Array  # [outputs, n], semi-orthogonal; the output layer is linear


def init_bsn(
    *,
    key: jax.Array,
    depth: int,
    width: int,
    num_inputs: int,
    num_outputs: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> BSNParams:
    """Haar-orthogonal weights of a network with `depth` hidden layers of `width` units.

    Args:
      key: typed key.
      depth: L, hidden layers.
      width: n.
      num_inputs: features of an input.
      num_outputs: classes.
      dtype: floating type.

    Returns:
      `BSNParams`.

    Raises:
      ValueError: depth or width below 1.

    Example:
      >>> import jax
      >>> [W.shape for W in init_bsn(key=jax.random.key(0), depth=3, width=8, num_inputs=4, num_outputs=2)]
      [(8, 4), (2, 8, 8), (2, 8)]

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    checks.at_least(1, depth=depth, width=width)
    keys = jax.random.split(key, 3)
    return BSNParams(
        haar_orthogonal(keys[0], (width, num_inputs), dtype),
        haar_orthogonal(keys[1], (depth - 1, width, width), dtype),
        haar_orthogonal(keys[2], (num_outputs, width), dtype),
    )


def apply_bsn(params: BSNParams, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Logits of the network: x^l = phi(W^l x^{l-1}), then the linear output layer.

    h^1 is multiplied by sqrt(n / inputs) where the first layer widens, so that it enters with ||h^1||^2 = n.

    Args:
      params: weights.
      x: inputs (B, num_inputs), from `rescale_inputs`.
      activation: phi, e.g. `gpn(jnp.tanh)`.

    Returns:
      Logits (B, num_outputs).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = init_bsn(key=jax.random.key(0), depth=3, width=8, num_inputs=4, num_outputs=2)
      >>> apply_bsn(params, jnp.ones((5, 4)), jnp.tanh).shape
      (5, 2)

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    return _run(params, x, activation, jnp.zeros((params.hidden.shape[0] + 1, 1, params.first.shape[0]), x.dtype))[0]


def _run(params: BSNParams, x: jax.Array, phi: Callable[[jax.Array], jax.Array], probes: jax.Array):
    """Logits and the mean ||x^l||^2 / n of every layer; probes (L, B or 1, n) are added to h^l."""
    n, inputs = params.first.shape
    square = lambda x: jnp.mean(x * x)
    h = x @ params.first.T * max(1.0, math.sqrt(n / inputs))
    x = phi(h + jnp.broadcast_to(probes[0], h.shape))

    def layer(x: jax.Array, W_probe: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        W, probe = W_probe
        h = x @ W.T
        out = phi(h + jnp.broadcast_to(probe, h.shape))
        return out, square(out)

    out, squares = jax.lax.scan(layer, x, (params.hidden, probes[1:]))
    return out @ params.last.T, jnp.concatenate([square(x)[None], squares])


class SignalNorms(NamedTuple):
    """Norms by layer, l = 1..L: flat curves are bidirectional self-normalisation.

    Example:
      >>> SignalNorms._fields
      ('forward', 'backward')

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """

    forward: jax.Array  # [L]: mean over the batch of ||x^l||^2 / n
    backward: jax.Array  # [L]: sqrt of the sum over the batch of ||y^l||^2, y^l = dE/dh^l


def signal_norms(
    params: BSNParams,
    x: jax.Array,
    loss_fn: Callable[[jax.Array], jax.Array],
    activation: Callable[[jax.Array], jax.Array],
) -> SignalNorms:
    """Forward and backward signal norms of every layer.

    ||dE/dW^l||_F = ||y^l|| ||x^{l-1}|| for one example: both factors flat means that gradients neither vanish nor
    explode.

    Args:
      params: weights.
      x: inputs (B, num_inputs).
      loss_fn: logits -> E, a scalar.
      activation: phi.

    Returns:
      `SignalNorms`; takes L B n numbers of memory.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = init_bsn(key=jax.random.key(0), depth=3, width=8, num_inputs=8, num_outputs=8)
      >>> x = rescale_inputs(jax.random.normal(jax.random.key(1), (5, 8)))
      >>> norms = signal_norms(params, x, lambda logits: jnp.sum(logits), lambda z: z)  # linear: exact at any depth
      >>> [bool(jnp.allclose(norm, norm[0], rtol=1e-4)) for norm in norms]
      [True, True]

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    shape = (params.hidden.shape[0] + 1, x.shape[0], params.first.shape[0])

    def energy(probes: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, squares = _run(params, x, activation, probes)
        return loss_fn(logits), squares

    y, squares = jax.grad(energy, has_aux=True)(jnp.zeros(shape, x.dtype))
    return SignalNorms(squares, jnp.sqrt(jnp.sum(y * y, axis=(1, 2))))
