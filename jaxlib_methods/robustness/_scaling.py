r"""Temperatures that give a saturated network its input gradients back.

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
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any
Apply = Callable[[PyTree, jax.Array], jax.Array]


# ------------------------------------------------------------------------------------------- the mathematics on arrays


def confidence_temperature(
    gap: jax.typing.ArrayLike, num_classes: int, *, rho: jax.typing.ArrayLike = 0.01
) -> jax.Array:
    r"""The temperature up to which no softmax is more certain than 1 - rho, $-\log(\rho / ((d-1)(1-\rho))) / \gamma$.

    For 0 < beta < this, 1 - max_j softmax(beta a)_j > rho whenever the logits a spread over no more than the gap; at it
    the bound is met exactly by logits that are all equal but for the largest.

    Args:
      gap: gamma = max_j a_j - min_j a_j > 0, any shape.
      num_classes: d >= 2, the number of logits.
      rho: in (0, (d-1)/d).

    Returns:
      beta, like gap.

    Raises:
      ValueError: fewer than two classes, or rho out of range.

    Example:
      >>> f"{confidence_temperature(1.0, 2):.4f} {confidence_temperature(2.0, 10):.4f}"
      '4.5951 3.3962'

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511, Proposition 1 [gupta2022improved].
    """
    check_classes(num_classes)
    check_rho(rho, num_classes)
    return (jnp.log1p(-jnp.asarray(rho)) - jnp.log(jnp.asarray(rho)) + math.log(num_classes - 1)) / gap


def network_jacobian_temperature(
    logits: jax.Array, labels: jax.Array, scale: jax.typing.ArrayLike, *, rho: jax.typing.ArrayLike = 0.01
) -> jax.Array:
    r"""Temperature of network Jacobian scaling (NJS) for every image, $\beta_1 \beta_2$.

    beta_2 = `confidence_temperature` of the gap of beta_1 a where 1 - softmax(beta_1 a)_k <= rho, and 1 elsewhere.

    Args:
      logits: a [batch, d].
      labels: k, integers [batch].
      scale: beta_1 > 0, from `network_jacobian_scaling`.
      rho: smallest error signal, in (0, (d-1)/d).

    Returns:
      beta [batch]; constant under differentiation.

    Raises:
      ValueError: rho out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[200.0, -200.0], [1.0, 0.0]])
      >>> [f"{beta:.5f}" for beta in network_jacobian_temperature(logits, jnp.array([0, 0]), 1.0)]
      ['0.01149', '1.00000']

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511, Algorithm 1 [gupta2022improved].
    """
    logits = jax.lax.stop_gradient(logits)
    scale = jnp.asarray(scale, logits.dtype)
    scaled = scale * logits
    log_p = of_label(jax.nn.log_softmax(scaled), labels)
    saturated = -jnp.expm1(log_p) <= rho
    gap = jnp.where(saturated, jnp.max(scaled, axis=1) - jnp.min(scaled, axis=1), jnp.ones_like(log_p))
    beta = confidence_temperature(gap, logits.shape[1], rho=jnp.asarray(rho, logits.dtype))
    return scale * jnp.where(saturated, beta, jnp.ones_like(beta))


def log_hessian_norm(logits: jax.Array, gram: jax.Array, beta: jax.Array) -> jax.Array:
    r"""Logarithm of the Hessian's norm in a piecewise linear network, $\log (\beta^2 \|J^T S(\beta) J\|_F)$.

    Args:
      logits: a [batch, d].
      gram: J J^T [batch, d, d], of the Jacobian of the logits with respect to the image; from `logit_gram`, whose rows
        are relative to the best label's, or of J as it is.
      beta: temperatures > 0, [batch, n].

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
    log_p = jax.nn.log_softmax(beta[:, :, None] * logits[:, None])  # [batch, n, d]
    others = jnp.arange(logits.shape[1])[None] != best[:, None]
    log_p = jnp.where(others[:, None], log_p, -jnp.inf)
    m = jnp.max(log_p, axis=2, keepdims=True)
    q, top = jnp.exp(log_p - m), jnp.exp(m[..., 0])
    precision = jax.lax.Precision.HIGHEST
    squares = jnp.einsum("bij,bni,bnj->bn", gram * gram, q, q, precision=precision)
    products = jnp.einsum("bij,bnj->bni", gram, q, precision=precision)
    mixed, inner = jnp.sum(q * products**2, axis=2), jnp.sum(q * products, axis=2)
    trace = squares - 2 * top * mixed + (top * inner) ** 2
    return 2 * jnp.log(beta) + m[..., 0] + jnp.log(jnp.maximum(trace, 0)) / 2


def hessian_norm_temperature(
    logits: jax.Array,
    gram: jax.Array,
    labels: jax.Array,
    *,
    points: int = 100,
    margin: float = 1e-2,
    smallest: float = 1e-72,
) -> jax.Array:
    r"""Temperature of Hessian-norm scaling (HNS) for every image, the grid's best beta for `log_hessian_norm`.

    The grid has equal steps from b_1 to b_2, $b = -\log(r / ((d-1)(1-r))) / \gamma_2$, gamma_2 the gap between the two
    largest logits, r = 1 - 1/d - margin at b_1 and r = `smallest` at b_2; the latter's logarithm is taken before it
    would underflow. beta is 1 for images that are misclassified already, at a tie, and where the maximum lies at an end
    of the grid.

    Args:
      logits: a [batch, d].
      gram: J J^T [batch, d, d], as in `log_hessian_norm`.
      labels: integers [batch].
      points: of the grid, at least 3.
      margin: in (0, 1 - 1/d).
      smallest: error signal at the upper end, in (0, 1/2).

    Returns:
      beta [batch]; constant under differentiation.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> logits, J = jnp.array([[1.0, 0.0]]), jnp.eye(2)[None]
      >>> f"{hessian_norm_temperature(logits, J @ J.mT, jnp.array([0]))[0]:.5f}"  # the optimum is 2.39936
      '1.71421'

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    d = logits.shape[1]
    check_classes(d)
    low, high = grid_ends(d, points, margin, smallest)
    logits, gram = jax.lax.stop_gradient((logits, gram))
    largest = jax.lax.top_k(logits, 2)[0]
    gap = largest[:, 0] - largest[:, 1]
    usable = (jnp.argmax(logits, axis=1) == labels) & (gap > 0)
    grid = (
        jnp.linspace(low, high, points, dtype=logits.dtype)[None] / jnp.where(usable, gap, jnp.ones_like(gap))[:, None]
    )
    best = jnp.argmax(log_hessian_norm(logits, gram, grid), axis=1)
    usable &= (best > 0) & (best < points - 1)
    beta = jnp.take_along_axis(grid, best[:, None], axis=1)[:, 0]
    return jnp.where(usable & jnp.isfinite(beta), beta, jnp.ones_like(beta))


def grid_ends(
    num_classes: int, points: int = 100, margin: float = 1e-2, smallest: float = 1e-72
) -> tuple[float, float]:
    """b_1 and b_2 of the grid of HNS, times the gap."""
    if points < 3:
        raise ValueError(f"points must be at least 3, got {points}: the ends of the grid are never chosen")
    if not 0 < margin < 1 - 1 / num_classes:
        raise ValueError(f"margin must lie in (0, {1 - 1 / num_classes:.4g}), got {margin}")
    if not 0 < smallest < 0.5:
        raise ValueError(f"smallest must lie in (0, 1/2), got {smallest}")
    end = lambda r: math.log1p(-r) - math.log(r) + math.log(num_classes - 1)
    return end(1 - 1 / num_classes - margin), end(smallest)


# --------------------------------------------------------------------------------------------------- of a whole network


def logit_jacobian(apply: Apply, params: PyTree, images: jax.Array) -> jax.Array:
    r"""Jacobian of the logits with respect to every image, $J = \partial a / \partial x$, by d backward passes at once.

    Args:
      apply: `(params, images) -> logits [batch, d]`, in which images do not influence one another (batch norm with
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
    return logits_and_jacobian(apply, params, images)[1]


def logits_and_jacobian(apply: Apply, params: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [batch, d] and their Jacobian [batch, d, ...] from one forward pass."""
    logits, pull_back = jax.vjp(functools.partial(apply, params), images)
    basis = jnp.broadcast_to(jnp.eye(logits.shape[1], dtype=logits.dtype)[:, None], (logits.shape[1], *logits.shape))
    return logits, jnp.moveaxis(jax.vmap(lambda e: pull_back(e)[0])(basis), 0, 1)


def logit_gram(logits: jax.Array, jacobian: jax.Array) -> jax.Array:
    """Gram matrices [batch, d, d] of the Jacobian's rows relative to the best label's, for `log_hessian_norm`."""
    rows = jacobian.reshape(*jacobian.shape[:2], -1)
    rows = rows - jnp.take_along_axis(rows, jnp.argmax(logits, axis=1)[:, None, None], axis=1)
    return jnp.einsum("bin,bjn->bij", rows, rows, precision=jax.lax.Precision.HIGHEST)


class NetworkJacobianScaling(NamedTuple):
    """Network Jacobian scaling as the `scaling` of an attack; made by `network_jacobian_scaling`.

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """

    scale: jax.typing.ArrayLike  # float32 []: beta_1
    rho: jax.typing.ArrayLike = 0.01  # float32 []: smallest error signal


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HessianNormScaling:
    """Hessian-norm scaling as the `scaling` of an attack.

    At the start of an attack d backward passes of every image give its Jacobian; beta is then kept for all steps.

    Args:
      points, margin, smallest: the grid, as in `hessian_norm_temperature`.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> HessianNormScaling()
      HessianNormScaling(points=100, margin=0.01, smallest=1e-72)

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """

    points: int = 100
    margin: float = 1e-2
    smallest: float = 1e-72

    def __post_init__(self):
        grid_ends(10**6, self.points, self.margin, self.smallest)


def network_jacobian_scaling(
    apply: Apply, params: PyTree, images: jax.Array, *, rho: float = 0.01
) -> NetworkJacobianScaling:
    r"""beta_1 of network Jacobian scaling: the inverse of the mean singular value of J over images and directions.

    The mean singular value of $\beta_1 J$ is 1. It depends on the units of the images: measure it on what the attack
    will be given.

    Args:
      apply: `(params, images) -> logits`, as in `logit_jacobian`.
      params: its first argument.
      images: [M, ...] of the test set; the paper takes M = 100.
      rho: smallest error signal of the attack.

    Returns:
      The `scaling` of `pgd` and `fgsm`.

    Raises:
      ValueError: no images, rho out of range, or a Jacobian that vanishes or is not finite (looked at outside jit).

    Example:
      >>> import jax.numpy as jnp
      >>> W = jnp.array([[3.0, 0.0], [0.0, 5.0]])
      >>> float(network_jacobian_scaling(lambda W, x: x @ W, W, jnp.zeros((4, 2))).scale)
      0.25

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    if not len(images):
        raise ValueError("network Jacobian scaling needs images, got none; the paper takes 100 of the test set")
    sigma = jacobian_singular_values(apply, params, images)
    check_rho(rho, sigma.shape[1])
    mean = jnp.mean(sigma)
    if not isinstance(mean, jax.core.Tracer) and not 0 < float(mean) < math.inf:
        raise ValueError(
            f"the mean singular value of the logits' Jacobian is {float(mean)}; NJS needs a network whose logits are "
            "finite and depend on its images"
        )
    return NetworkJacobianScaling(1 / mean, rho)


def jacobian_singular_values(apply: Apply, params: PyTree, images: jax.Array) -> jax.Array:
    """Singular values of the logits' Jacobian for every image, how strongly logits react to it.

    Args:
      apply: `(params, images) -> logits`, as in `logit_jacobian`. Compiled once for every such object.
      params: its first argument.
      images: [batch, ...].

    Returns:
      [batch, min(d, N)], descending, of an image with N numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> W = jnp.array([[3.0, 0.0], [0.0, 5.0]])
      >>> jacobian_singular_values(lambda W, x: x @ W, W, jnp.zeros((1, 2))).tolist()
      [[5.0, 3.0]]

    Source: Gupta, Ajanthan (AAAI 2022), arXiv:2003.13511 [gupta2022improved].
    """
    return _singular_values(apply, params, images)


@functools.partial(jax.jit, static_argnames="apply")
def _singular_values(apply: Apply, params: PyTree, images: jax.Array) -> jax.Array:
    jacobian = logit_jacobian(apply, params, images)
    return jnp.linalg.svd(jacobian.reshape(*jacobian.shape[:2], -1), compute_uv=False)


def of_label(values: jax.Array, labels: jax.Array) -> jax.Array:
    """values[i, labels[i]], as a masked sum, which is sharded as its arguments are."""
    chosen = jnp.arange(values.shape[1])[None] == labels[:, None]
    return jnp.sum(jnp.where(chosen, values, jnp.zeros_like(values)), axis=1)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(a)_k, [batch]."""
    return jax.nn.logsumexp(logits, axis=1) - of_label(logits, labels)


def check_classes(num_classes: int) -> None:
    """Raises ValueError below two classes."""
    if num_classes < 2:
        raise ValueError(f"an attack on a classifier needs at least two logits, got {num_classes}")


def check_rho(rho: Any, num_classes: int) -> None:
    """Raises ValueError unless 0 < rho < (d - 1) / d; traced values are not looked at."""
    if not isinstance(rho, jax.core.Tracer) and not 0 < float(rho) < (num_classes - 1) / num_classes:
        raise ValueError(f"rho must lie in (0, {(num_classes - 1) / num_classes:.4g}), got {float(rho)}")
