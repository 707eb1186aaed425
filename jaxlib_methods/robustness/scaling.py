r"""Scales of the logits that give a saturated network its input gradients back.

With logits a = f(x), label k, J = da/dx and p = softmax(beta a), the cross-entropy of the scaled logits has the input
gradient beta J^T (p - y): beta -> 0 kills the factor beta, beta -> infinity kills p - y on what is classified
correctly. Predictions do not depend on beta > 0, so it is free to choose:

    NJS  beta = beta_1 beta_2: beta_1 = 1 / mean singular value of J, one number for the network; beta_2 for every image
         and step, so that 1 - p_k stays above rho
    HNS  beta = argmax over a grid of the Frobenius norm of the Hessian, which is beta^2 |J^T S J|_F in a piecewise
         linear network, S = diag(p) - p p^T; one number for every image

The Hessian is never formed: |J^T S J|_F^2 = tr(S G S G) with the Gram matrix G = J J^T [d, d]. S does not see what is
common to all rows of J, so the row of the best label k may be subtracted from all. Then only the other labels count,
whose p_j are written exp(m) q_j with m the largest log p_j:

    log |J^T S J|_F = m + log tr(D G D G) / 2,  D = diag(q) - exp(m) q q^T

in which nothing is lost to rounding at p_j = 1e-72, and which takes O(d^2) operations for each beta.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.robustness.jacobians import logit_singular_values, values_at
from jaxlib_methods.typing import ApplyFn, PyTree

__all__ = [
    "HessianNormScaling",
    "NetworkJacobianScaling",
    "confidence_scale",
    "hessian_norm_scale",
    "log_hessian_norm",
    "network_jacobian_scale",
    "network_jacobian_scaling",
]


# ------------------------------------------------------------------------------------------- the mathematics on arrays


def confidence_scale(
    gap: jax.typing.ArrayLike, num_classes: int, *, min_error: jax.typing.ArrayLike = 0.01
) -> jax.Array:
    r"""The scale up to which no softmax is more certain than $1 - \rho$, $-\log(\rho / ((d-1)(1-\rho))) / \gamma$.

    For 0 < beta < this, 1 - max_j softmax(beta a)_j > rho whenever the logits a spread over no more than the gap; at it
    the bound is met exactly by logits that are all equal but for the largest.

    Args:
      gap: gamma = max_j a_j - min_j a_j > 0, any shape.
      num_classes: d >= 2, the number of logits.
      min_error: rho in (0, (d-1)/d).

    Returns:
      beta, like gap.

    Raises:
      ValueError: fewer than two classes, or min_error out of range.

    Example:
      >>> f"{confidence_scale(1.0, 2):.4f} {confidence_scale(2.0, 10):.4f}"
      '4.5951 3.3962'

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511, Proposition 1 [gupta2022improved].
    """
    check_classes(num_classes)
    check_min_error(min_error, num_classes)
    return (jnp.log1p(-jnp.asarray(min_error)) - jnp.log(jnp.asarray(min_error)) + math.log(num_classes - 1)) / gap


def network_jacobian_scale(
    logits: jax.Array, labels: jax.Array, network_scale: jax.typing.ArrayLike, *, min_error: jax.typing.ArrayLike = 0.01
) -> jax.Array:
    r"""Scale of the logits by network Jacobian scaling (NJS) for every image, $\beta_1 \beta_2$.

    beta_2 = `confidence_scale` of the gap of beta_1 a where 1 - softmax(beta_1 a)_k <= rho, and 1 elsewhere.

    Args:
      logits: a [batch, d].
      labels: k, integers [batch].
      network_scale: beta_1 > 0, from `network_jacobian_scaling`.
      min_error: rho, the smallest error signal, in (0, (d-1)/d).

    Returns:
      beta [batch]; constant under differentiation.

    Raises:
      ValueError: min_error out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[200.0, -200.0], [1.0, 0.0]])
      >>> [f"{beta:.5f}" for beta in network_jacobian_scale(logits, jnp.array([0, 0]), 1.0)]
      ['0.01149', '1.00000']

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511, Algorithm 1 [gupta2022improved].
    """
    logits = jax.lax.stop_gradient(logits)
    network_scale = jnp.asarray(network_scale, logits.dtype)
    scaled = network_scale * logits
    log_p = values_at(jax.nn.log_softmax(scaled), labels)
    saturated = -jnp.expm1(log_p) <= min_error
    gap = jnp.where(saturated, jnp.max(scaled, axis=1) - jnp.min(scaled, axis=1), jnp.ones_like(log_p))
    beta = confidence_scale(gap, logits.shape[1], min_error=jnp.asarray(min_error, logits.dtype))
    return network_scale * jnp.where(saturated, beta, jnp.ones_like(beta))


def log_hessian_norm(logits: jax.Array, gram: jax.Array, logit_scale: jax.Array) -> jax.Array:
    r"""Logarithm of the Hessian's norm in a piecewise linear network, $\log (\beta^2 \|J^T S(\beta) J\|_F)$.

    Args:
      logits: a [batch, d].
      gram: J J^T [batch, d, d], of the Jacobian of the logits with respect to the image; from `logit_gram`, whose rows
        are relative to the best label's, or of J as it is.
      logit_scale: beta > 0, [batch, n].

    Returns:
      [batch, n]; minus infinity where the Jacobian's rows are all equal.

    Example:
      >>> import jax.numpy as jnp
      >>> J = jnp.eye(2)[None]
      >>> float(jnp.exp(log_hessian_norm(jnp.zeros((1, 2)), J @ J.mT, jnp.array([[2.0]])))[0, 0])  # 4 * 1/4 * 2
      2.0

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    best = jnp.argmax(logits, axis=1)
    row = jnp.take_along_axis(gram, best[:, None, None], axis=1)  # [batch, 1, d]
    corner = jnp.take_along_axis(row, best[:, None, None], axis=2)
    gram = gram - row - row.mT + corner  # of the rows J_j - J_best
    log_p = jax.nn.log_softmax(logit_scale[:, :, None] * logits[:, None])  # [batch, n, d]
    others = jnp.arange(logits.shape[1])[None] != best[:, None]
    log_p = jnp.where(others[:, None], log_p, -jnp.inf)
    m = jnp.max(log_p, axis=2, keepdims=True)
    q, top = jnp.exp(log_p - m), jnp.exp(m[..., 0])
    precision = jax.lax.Precision.HIGHEST
    squares = jnp.einsum("bij,bni,bnj->bn", gram * gram, q, q, precision=precision)
    products = jnp.einsum("bij,bnj->bni", gram, q, precision=precision)
    mixed, inner = jnp.sum(q * products**2, axis=2), jnp.sum(q * products, axis=2)
    trace = squares - 2 * top * mixed + (top * inner) ** 2
    return 2 * jnp.log(logit_scale) + m[..., 0] + jnp.log(jnp.maximum(trace, 0)) / 2


def hessian_norm_scale(
    logits: jax.Array,
    gram: jax.Array,
    labels: jax.Array,
    *,
    num_points: int = 100,
    margin: float = 1e-2,
    min_error: float = 1e-72,
) -> jax.Array:
    r"""Scale of the logits by Hessian-norm scaling (HNS) for every image, the grid's best beta for `log_hessian_norm`.

    The grid has equal steps from b_1 to b_2, $b = -\log(r / ((d-1)(1-r))) / \gamma_2$, gamma_2 the gap between the two
    largest logits, r = 1 - 1/d - margin at b_1 and r = `min_error` at b_2; the latter's logarithm is taken before it
    would underflow. beta is 1 for images that are misclassified already, at a tie, and where the maximum lies at an end
    of the grid.

    Args:
      logits: a [batch, d].
      gram: J J^T [batch, d, d], as in `log_hessian_norm`.
      labels: integers [batch].
      num_points: of the grid, at least 3.
      margin: in (0, 1 - 1/d).
      min_error: error signal at the upper end, in (0, 1/2).

    Returns:
      beta [batch]; constant under differentiation.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> logits, J = jnp.array([[1.0, 0.0]]), jnp.eye(2)[None]
      >>> f"{hessian_norm_scale(logits, J @ J.mT, jnp.array([0]))[0]:.5f}"  # the optimum is 2.39936
      '1.71421'

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    d = logits.shape[1]
    check_classes(d)
    low, high = grid_ends(d, num_points, margin, min_error)
    logits, gram = jax.lax.stop_gradient((logits, gram))
    largest = jax.lax.top_k(logits, 2)[0]
    gap = largest[:, 0] - largest[:, 1]
    usable = (jnp.argmax(logits, axis=1) == labels) & (gap > 0)
    grid = (
        jnp.linspace(low, high, num_points, dtype=logits.dtype)[None]
        / jnp.where(usable, gap, jnp.ones_like(gap))[:, None]
    )
    best = jnp.argmax(log_hessian_norm(logits, gram, grid), axis=1)
    usable &= (best > 0) & (best < num_points - 1)
    beta = jnp.take_along_axis(grid, best[:, None], axis=1)[:, 0]
    return jnp.where(usable & jnp.isfinite(beta), beta, jnp.ones_like(beta))


def grid_ends(
    num_classes: int, num_points: int = 100, margin: float = 1e-2, min_error: float = 1e-72
) -> tuple[float, float]:
    """b_1 and b_2 of the grid of HNS, times the gap."""
    checks.at_least(3, num_points=num_points, remedy="the ends of the grid are never chosen")
    if not 0 < margin < 1 - 1 / num_classes:
        raise ValueError(f"margin must lie in (0, {1 - 1 / num_classes:.4g}), got {margin}")
    if not 0 < min_error < 0.5:
        raise ValueError(f"min_error must lie in (0, 1/2), got {min_error}")
    end = lambda r: math.log1p(-r) - math.log(r) + math.log(num_classes - 1)
    return end(1 - 1 / num_classes - margin), end(min_error)


# --------------------------------------------------------------------------------------------------- of a whole network


class NetworkJacobianScaling(NamedTuple):
    """Network Jacobian scaling as the `scaling` of an attack; made by `network_jacobian_scaling`.

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """

    scale: jax.typing.ArrayLike  # float32 []: beta_1
    min_error: jax.typing.ArrayLike = 0.01  # float32 []: smallest error signal


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HessianNormScaling:
    """Hessian-norm scaling as the `scaling` of an attack.

    At the start of an attack d backward passes of every image give its Jacobian; beta is then kept for all steps.

    Args:
      num_points, margin, min_error: the grid, as in `hessian_norm_scale`.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> HessianNormScaling()
      HessianNormScaling(num_points=100, margin=0.01, min_error=1e-72)

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """

    num_points: int = 100
    margin: float = 1e-2
    min_error: float = 1e-72

    def __post_init__(self):
        grid_ends(10**6, self.num_points, self.margin, self.min_error)


def network_jacobian_scaling(
    apply_fn: ApplyFn, params: PyTree, images: jax.Array, *, min_error: float = 0.01
) -> NetworkJacobianScaling:
    r"""beta_1 of network Jacobian scaling: the inverse of the mean singular value of J over images and directions.

    The mean singular value of $\beta_1 J$ is 1. It depends on the units of the images: measure it on what the attack
    will be given.

    Args:
      apply_fn: `(params, images) -> logits`, as in `logit_jacobian`.
      params: its first argument.
      images: [M, ...] of the test set; the paper takes M = 100.
      min_error: smallest error signal of the attack.

    Returns:
      The `scaling` of `pgd` and `fgsm`.

    Raises:
      ValueError: no images, min_error out of range, or (outside jit) a Jacobian that vanishes or is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> W = jnp.array([[3.0, 0.0], [0.0, 5.0]])
      >>> float(network_jacobian_scaling(lambda W, x: x @ W, W, jnp.zeros((4, 2))).scale)
      0.25

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    if not len(images):
        raise ValueError("network Jacobian scaling needs images, got none; the paper takes 100 of the test set")
    sigma = logit_singular_values(apply_fn, params, images)
    check_min_error(min_error, sigma.shape[1])
    mean = jnp.mean(sigma)
    if not isinstance(mean, jax.core.Tracer) and not 0 < float(mean) < math.inf:
        raise ValueError(
            f"the mean singular value of the logits' Jacobian is {float(mean)}; NJS needs a network whose logits are "
            "finite and depend on its images"
        )
    return NetworkJacobianScaling(1 / mean, min_error)


def check_classes(num_classes: int) -> None:
    """Raises ValueError below two classes."""
    if num_classes < 2:
        raise ValueError(f"an attack on a classifier needs at least two logits, got {num_classes}")


def check_min_error(min_error: Any, num_classes: int) -> None:
    """Raises ValueError unless 0 < min_error < (d - 1) / d; traced values are not looked at."""
    if not isinstance(min_error, jax.core.Tracer) and not 0 < float(min_error) < (num_classes - 1) / num_classes:
        raise ValueError(f"min_error must lie in (0, {(num_classes - 1) / num_classes:.4g}), got {float(min_error)}")
