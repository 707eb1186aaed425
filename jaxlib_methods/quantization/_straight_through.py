"""Straight-through baselines: the network sees rounded weights, the gradient passes to the float ones behind them.

w = nearest label of x;   x' = x - eta [min q <= x <= max q] dL/dw     straight-through, clipped gradient
w = nearest label of x;   x' = clip(x - eta dL/dw, min q, max q)       BinaryConnect
"""

import jax
import optax

from jaxlib_methods.quantization._adam import adam, with_adam
from jaxlib_methods.quantization.lattice import Lattice
from jaxlib_methods.quantization.rules import clip_to_labels, scale_by_straight_through


def straight_through(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    clip: bool = True,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """The straight-through estimator with Adam on the float weights.

    Args:
      learning_rate: a number or a schedule.
      lattice: with projection "round".
      clip: whether gradients outside the range of the labels are zeroed.
      b1, b2, eps: of Adam.
      weight_decay: factor of an L2 term on the float weights.

    Returns:
      The optimizer of the float weights; the network's are `project(aux, lattice)`.

    Raises:
      ValueError: as `scale_by_straight_through`.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = straight_through(0.1, Lattice(projection="round"))
      >>> x = jnp.array([0.3, -1.2])
      >>> [f"{u:.1f}" for u in optimizer.update(jnp.array([2.0, 2.0]), optimizer.init(x), x)[0]]
      ['-0.1', '-0.0']

    Source: Bengio, Leonard, Courville (2013), arXiv:1308.3432; Hubara, Courbariaux, Soudry, El-Yaniv, Bengio (NeurIPS
    2016), arXiv:1602.02830 [bengio2013estimating; hubara2016binarized].
    """
    rule = scale_by_straight_through(lattice, clip=clip)
    return with_adam(rule, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def binary_connect(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """BinaryConnect with Adam: gradients of the rounded weights update float weights that are clipped to the labels.

    Args:
      learning_rate: a number or a schedule.
      lattice: with projection "round"; any label set.
      b1, b2, eps: of Adam.

    Returns:
      The optimizer of the float weights; the network's are `project(aux, lattice)`.

    Raises:
      ValueError: as `scale_by_straight_through`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = binary_connect(0.1, Lattice(projection="round"))
      >>> x = jnp.array([0.3, -0.95])
      >>> updates, _ = optimizer.update(jnp.array([2.0, 2.0]), optimizer.init(x), x)
      >>> [f"{x:.2f}" for x in optax.apply_updates(x, updates)]
      ['0.20', '-1.00']

    Source: Courbariaux, Bengio, David (NeurIPS 2015), arXiv:1511.00363 [courbariaux2015binaryconnect].
    """
    return optax.chain(
        scale_by_straight_through(lattice, clip=False),
        adam(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
        clip_to_labels(lattice),
    )
