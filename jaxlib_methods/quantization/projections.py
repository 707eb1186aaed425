"""The projections of auxiliary variables to the simplex of labels or to the interval, each with its Jacobians.

Lifted form: x [d, ...], one auxiliary variable per label in the leading axis. Scalar form: x [...]. Nothing overflows
to NaN for finite x and any inverse temperature that float32 holds.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlib_methods._core.dtypes import widen
from jaxlib_methods.quantization._projection_maps import LIFTED, check_jacobian, primal
from jaxlib_methods.quantization.labels import Labels, as_labels
from jaxlib_methods.typing import ProjectionJacobian

__all__ = ["argmax_projection", "round_projection", "softmax_projection", "sparsemax_projection", "tanh_projection"]


def _public(projection: str, jacobian: str, labels: Labels, x: jax.Array, beta: jax.Array | float) -> jax.Array:
    check_jacobian(projection, jacobian)
    if projection in LIFTED and (x.ndim < 1 or x.shape[0] < 2):
        raise ValueError(f"x must be [labels, ...] with at least two labels in the leading axis, got {x.shape}")
    return primal(projection, jacobian, labels, x, jnp.asarray(beta, widen(x).dtype))


def softmax_projection(
    x: jax.Array, inverse_temperature: jax.Array | float = 1.0, *, jacobian: ProjectionJacobian = "exact"
) -> jax.Array:
    r"""Softmax over the labels with inverse temperature, $u = \mathrm{softmax}(\beta x)$.

    Args:
      x: [d, ...], one auxiliary variable per label in the leading axis.
      inverse_temperature: beta > 0, a scalar; the limit of infinity is the argmax. No gradient goes to it.
      jacobian: of the gradient in x: "exact", "single" or "double" (surrogates, which do
        not vanish as beta grows), or "straight_through" (the identity).

    Returns:
      u, like x: non-negative, sums to 1 over the leading axis.

    Raises:
      ValueError: unknown Jacobian, or fewer than two labels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> [f"{u:.5f}" for u in softmax_projection(jnp.array([0.3, -0.2]), 1.5)]
      ['0.67918', '0.32082']
      >>> softmax_projection(jnp.array([0.3, -0.2]), 1e35).tolist()
      [1.0, 0.0]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return _public("softmax", jacobian, (), x, inverse_temperature)


def sparsemax_projection(
    x: jax.Array, inverse_temperature: jax.Array | float = 1.0, *, jacobian: ProjectionJacobian = "exact"
) -> jax.Array:
    r"""Euclidean projection to the simplex over the labels, $u = \arg\min_{s \in \Delta} \|s - \beta x\|^2$.

    Args:
      x: [d, ...], one auxiliary variable per label in the leading axis.
      inverse_temperature: beta > 0, a scalar. No gradient goes to it.
      jacobian: "exact", or "straight_through" (the identity).

    Returns:
      u, like x: non-negative, sums to 1 over the leading axis, and zero for labels far below the best.

    Raises:
      ValueError: unknown Jacobian, or fewer than two labels.

    Example:
      >>> import jax.numpy as jnp
      >>> [f"{u:.4f}" for u in sparsemax_projection(jnp.array([0.1, 0.2, 0.9]))]
      ['0.0333', '0.1333', '0.8333']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return _public("sparsemax", jacobian, (), x, inverse_temperature)


def argmax_projection(x: jax.Array, *, jacobian: ProjectionJacobian = "clipped") -> jax.Array:
    """One-hot vector of the best label: the softmax projection at infinite inverse temperature.

    Args:
      x: [d, ...], one auxiliary variable per label in the leading axis; the lower index wins a tie.
      jacobian: "clipped", for two labels the gradient that makes it BinaryConnect's straight-through step, or
        "straight_through" (the identity).

    Returns:
      u, like x, of zeros and ones.

    Raises:
      ValueError: unknown Jacobian; fewer than two labels, or in the gradient of "clipped" more than two.

    Example:
      >>> import jax.numpy as jnp
      >>> argmax_projection(jnp.array([0.1, 0.9, 0.2])).tolist()
      [0.0, 1.0, 0.0]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return _public("argmax", jacobian, (), x, 1.0)


def tanh_projection(
    x: jax.Array,
    inverse_temperature: jax.Array | float = 1.0,
    *,
    labels: Sequence[float | int] = (-1.0, 1.0),
    jacobian: ProjectionJacobian = "exact",
) -> jax.Array:
    r"""Smooth staircase through the labels, $w = c + \sum_j h_j \tanh(\beta (x - m_j))$; $\tanh(\beta x)$ for {-1, 1}.

    Args:
      x: auxiliary variables of any shape.
      inverse_temperature: beta > 0, a scalar; the limit of infinity is rounding. No gradient goes to it.
      labels: the label set; {-1, 0, 1} gives the shifted tanh of the ternary case.
      jacobian: "exact", or "straight_through" (the identity).

    Returns:
      w, like x, between the smallest and the largest label.

    Raises:
      ValueError: unknown Jacobian, or labels that are not a label set.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([-2.0, 0.25, 0.6])
      >>> tanh_projection(x, 1e6, labels=(-1, 0, 1)).tolist()
      [-1.0, 0.0, 1.0]

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    return _public("tanh", jacobian, as_labels(labels), x, inverse_temperature)


def round_projection(
    x: jax.Array, *, labels: Sequence[float | int] = (-1.0, 1.0), jacobian: ProjectionJacobian = "clipped"
) -> jax.Array:
    """The nearest label; the sign for {-1, 1}, where 0 counts as positive.

    Args:
      x: auxiliary variables of any shape. A tie goes to the label farther from zero, and up at zero.
      labels: the label set.
      jacobian: "clipped" (the identity between the smallest and the largest label, zero outside), or
        "straight_through" (the identity everywhere).

    Returns:
      w, like x, every entry exactly a label.

    Raises:
      ValueError: unknown Jacobian, or labels that are not a label set.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.array([-1.7, -0.5, 0.2, 0.5])
      >>> round_projection(x, labels=(-1, 0, 1)).tolist()
      [-1.0, -1.0, 0.0, 1.0]
      >>> jax.grad(lambda x: round_projection(x).sum())(x).tolist()
      [0.0, 1.0, 1.0, 1.0]

    Source: Courbariaux, Bengio, David (NeurIPS 2015), arXiv:1511.00363; Bengio, Leonard, Courville (2013),
    arXiv:1308.3432 [courbariaux2015binaryconnect; bengio2013estimating].
    """
    return _public("round", jacobian, as_labels(labels), x, 1.0)
