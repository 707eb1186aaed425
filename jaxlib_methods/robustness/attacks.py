r"""FGSM and PGD, and with a scale on the logits before the cross-entropy FGSM++ and PGD++.

    x_1 = P(x_0 + eps U(-1, 1)^N);   x_{t+1} = P(x_t + eta d_t),   d_t = sign(g_t) or g_t / |g_t|_2,   t = 1..T
    g_t = gradient in x of CE(softmax(beta f(x_t)), k)

P projects to the ball of radius eps around x_0 and to the box of valid values. FGSM is T = 1 and eta = eps. beta is 1
in the plain attacks, and chosen by network Jacobian scaling (for every image and step) or Hessian-norm scaling (for
every image, at x_1) in the ++ ones; it is constant under differentiation. All steps and restarts are one program.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods.robustness import _feasible
from jaxlib_methods.robustness._arguments import Bounds, amount_of, check_arrays, look_at, raise_for
from jaxlib_methods.robustness.jacobians import cross_entropy, logit_gram, logits_and_jacobian
from jaxlib_methods.robustness.scaling import (
    HessianNormScaling,
    NetworkJacobianScaling,
    check_classes,
    check_min_error,
    hessian_norm_scale,
    network_jacobian_scale,
)
from jaxlib_methods.typing import ApplyFn, AttackNorm, PyTree

__all__ = [
    "AttackResult",
    "fgsm",
    "pgd",
]

Scaling = jax.typing.ArrayLike | NetworkJacobianScaling | HessianNormScaling | None


class AttackResult(NamedTuple):
    """What an attack found."""

    images: jax.Array  # [batch, ...]: like the attacked ones, in the ball and the box
    logits: jax.Array  # [batch, d]: of these images, unscaled
    success: jax.Array  # bool [batch]: whether they are misclassified, those included that were so before the attack


def fgsm(
    apply_fn: ApplyFn,
    params: PyTree,
    images: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    key: jax.Array,
    radius: jax.typing.ArrayLike,
    bounds: Bounds = (0.0, 1.0),
    scaling: Scaling = None,
    random_start: bool = True,
) -> AttackResult:
    r"""The fast gradient sign method, $x = P(x_1 + \epsilon\, \mathrm{sign}(\nabla_x L))$; with `scaling` FGSM++.

    Args:
      apply_fn, params, images, labels, key, radius, bounds, scaling, random_start: as for `pgd` with norm "linf", one
        step of this size.

    Returns:
      An `AttackResult`.

    Raises:
      ValueError, TypeError: as `pgd`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> W = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, k = jnp.array([[0.5, 0.25]]), jnp.array([0])
      >>> fgsm(lambda W, x: x @ W, W, x, k, key=jax.random.key(0), radius=0.125, random_start=False).images.tolist()
      [[0.375, 0.375]]

    Source: Goodfellow, Shlens, Szegedy (ICLR 2015), arXiv:1412.6572; FGSM++ of Gupta, Ajanthan (AAAI 2022),
    arXiv:2003.13511 [goodfellow2015explaining; gupta2022improved].
    """
    step = jnp.maximum(radius, float(jnp.finfo(jnp.float32).tiny))  # radius may be 0, a step may not
    return pgd(
        apply_fn,
        params,
        images,
        labels,
        key=key,
        radius=radius,
        step_size=step,
        num_steps=1,
        bounds=bounds,
        scaling=scaling,
        random_start=random_start,
    )


def pgd(
    apply_fn: ApplyFn,
    params: PyTree,
    images: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
    *,
    key: jax.Array,
    radius: jax.typing.ArrayLike,
    step_size: jax.typing.ArrayLike,
    num_steps: int,
    norm: AttackNorm = "linf",
    bounds: Bounds = (0.0, 1.0),
    scaling: Scaling = None,
    random_start: bool = True,
    num_restarts: int = 1,
    gradient_floor: jax.typing.ArrayLike = 0.0,
) -> AttackResult:
    r"""Projected gradient descent on the images, $x_{t+1} = P(x_t + \eta\, d_t)$; with `scaling` PGD++.

    The images returned lie in the ball and in the box to the last bit. Every image has its own gradient and
    factor on the logits, so a batch that is sharded over devices is attacked where it lies, without communication.

    Args:
      apply_fn: `(params, images) -> logits [batch, d]`, a pure function in which images do not influence one another
        (batch norm with running statistics). The program is compiled once for every such object: pass the same one
        again, and what changes in params.
      params: its first argument.
      images: [batch, ...], float32 or float64, in the box. Put the normalisation into `apply_fn`, or give radius, step
        and bounds in the units of the normalised channels.
      labels: the true classes, integers [batch].
      key: typed key of the random starts.
      radius: radius >= 0 of the ball, in the units of the images. A number; for "linf" also an array that broadcasts
        to the images, such as one radius for every channel.
      step_size: eta > 0, in the units of the images; for "linf" also an array. The paper's L2 step is 2.5 radius / T.
      num_steps: T >= 1.
      norm: "linf", "l2", or "l2_per_channel": a ball of this radius for each channel (last axis), as in the authors'
        code, whose images may be sqrt(channels) radius away in all.
      bounds: smallest and largest valid value, numbers or arrays that broadcast to the images; `None`: no box.
      scaling: the factor on the logits in the loss: `None` (1, the plain attack), a number or an array [batch],
        `NetworkJacobianScaling` or `HessianNormScaling`.
      random_start: whether to start at a random point of the ball's bounding cube, projected, instead of at the image.
      num_restarts: attacks from different starts, >= 1; an image keeps its first success, or the last attempt.
      gradient_floor: shortest length by which a gradient of the L2 norms is divided; the authors' code has 1e-6, with
        which a network that hides its gradients is hardly attacked.

    Returns:
      An `AttackResult`.

    Raises:
      ValueError: radius < 0, a step size <= 0, fewer than one step or restart, an unknown norm, images outside the
        box, labels that are no class, or logits that are not finite; values under `jax.jit` are not looked at.
      TypeError: images that are not float32 or float64, or labels that are no integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlib_methods.robustness import network_jacobian_scaling
      >>> W = 200 * jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> apply_fn = lambda W, x: x @ W
      >>> x, k = jnp.array([[0.875, 0.0]]), jnp.array([0])
      >>> options = dict(radius=0.5, step_size=0.125, num_steps=10, random_start=False)
      >>> pgd(apply_fn, W, x, k, key=jax.random.key(0), **options).images.tolist()  # softmax is 1: no gradient
      [[0.875, 0.0]]
      >>> njs = network_jacobian_scaling(apply_fn, W, x)
      >>> result = pgd(apply_fn, W, x, k, key=jax.random.key(0), scaling=njs, **options)
      >>> result.images.tolist(), result.success.tolist()
      ([[0.375, 0.5]], [True])

    Source: Madry, Makelov, Schmidt, Tsipras, Vladu (ICLR 2018), arXiv:1706.06083; PGD++ of Gupta, Ajanthan (AAAI 2022),
    arXiv:2003.13511, Algorithm 1 [madry2018towards; gupta2022improved].
    """
    checks.one_of(AttackNorm, norm=norm)
    checks.at_least(1, num_steps=num_steps, num_restarts=num_restarts)
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    check_arrays(images, labels)
    low, high = (-np.inf, np.inf) if bounds is None else bounds
    amount = lambda name, value: amount_of(name, value, images, scalar=norm != "linf")
    radius, step_size = amount("radius", radius), amount("step_size", step_size)
    floor = amount("gradient_floor", gradient_floor)
    checks.not_negative(radius=radius)
    checks.positive(step_size=step_size)
    low, high = (amount_of("bounds", value, images, scalar=False) for value in (low, high))
    classes = jax.eval_shape(apply_fn, params, images).shape
    if len(classes) != 2 or classes[0] != len(images):
        raise ValueError(f"apply_fn must return logits [batch, d] for {len(images)} images, got shape {classes}")
    check_classes(classes[1])
    if isinstance(scaling, NetworkJacobianScaling):
        check_min_error(scaling.min_error, classes[1])
    elif scaling is not None and not isinstance(scaling, HessianNormScaling):
        scaling = jnp.asarray(scaling, images.dtype)
        checks.positive(scaling=scaling)
        checks.finite(scaling=scaling)
    raise_for(look_at(images, labels, low, high, classes[1]), classes[1], bounds)

    result, finite = _attack(
        apply_fn,
        params,
        images,
        labels,
        key,
        (radius, step_size, floor, low, high),
        scaling,
        norm=norm,
        num_steps=num_steps,
        num_restarts=num_restarts,
        random_start=random_start,
    )
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError(
            "the network returned logits that are NaN or infinite during the attack; look at params and at the images"
        )
    return result


@functools.partial(jax.jit, static_argnames=("apply_fn", "norm", "num_steps", "num_restarts", "random_start"))
def _attack(
    apply_fn: ApplyFn,
    params: PyTree,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    amounts: tuple[jax.Array, ...],
    scaling: Scaling,
    *,
    norm: str,
    num_steps: int,
    num_restarts: int,
    random_start: bool,
) -> tuple[AttackResult, jax.Array]:
    """The attack as one program, and whether all logits were finite."""
    radius, step_size, floor, low, high = amounts
    to = _feasible.feasible_set(images, radius, low, high, norm)

    def scale_at(x: jax.Array) -> jax.Array | None:
        """[batch], or None where every step has its own."""
        if isinstance(scaling, NetworkJacobianScaling):
            return None
        if isinstance(scaling, HessianNormScaling):
            logits, jacobian = logits_and_jacobian(apply_fn, params, x)
            grid = {"num_points": scaling.num_points, "margin": scaling.margin, "min_error": scaling.min_error}
            gram = logit_gram(logits, jacobian)
            return hessian_norm_scale(logits, gram, labels, **grid)
        return jnp.broadcast_to(jnp.ones((), x.dtype) if scaling is None else scaling, labels.shape)

    def loss(x: jax.Array, beta: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        logits = apply_fn(params, x)
        if beta is None:
            beta = network_jacobian_scale(logits, labels, scaling.scale, min_error=scaling.min_error)
        each = cross_entropy(beta[:, None].astype(logits.dtype) * logits, labels)
        return jnp.sum(each), jnp.isfinite(logits).all()

    def one_attack(best: tuple[jax.Array, ...], key: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        x = images
        if random_start:
            noise = jax.random.uniform(key, x.shape, x.dtype, -1, 1)
            x = _feasible.project(x + jnp.broadcast_to(radius, x.shape) * noise, to, norm)
        beta = scale_at(x)

        def step(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, finite = carry
            gradient, seen = jax.grad(loss, has_aux=True)(x, beta)
            ahead = jnp.broadcast_to(step_size, x.shape) * _feasible.unit_gradient(gradient, norm, floor)
            return _feasible.project(x + ahead, to, norm), finite & seen

        x, finite = jax.lax.fori_loop(0, num_steps, step, (x, jnp.array(True)))
        logits = apply_fn(params, x)
        success = jnp.argmax(logits, axis=1) != labels
        finite &= jnp.isfinite(logits).all()
        kept_x, kept_logits, done, all_finite = best
        select = lambda old, new: jnp.where(done.reshape(-1, *(1,) * (new.ndim - 1)), old, new)
        return (select(kept_x, x), select(kept_logits, logits), done | success, all_finite & finite), None

    logits = jax.eval_shape(apply_fn, params, images)
    start = (images, jnp.zeros(logits.shape, logits.dtype), jnp.zeros(labels.shape, bool), jnp.array(True))
    keys = jax.random.split(key, num_restarts) if num_restarts > 1 else key[None]
    (x, logits, success, finite), _ = jax.lax.scan(one_attack, start, keys)
    return AttackResult(x, logits, success), finite


# -------------------------------------------------------------------------------------------------------------- checks
