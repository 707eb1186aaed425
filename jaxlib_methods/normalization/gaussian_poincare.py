"""Gaussian-Poincare normalised (GPN) activations phi = a f + b with E[phi(z)^2] = E[phi'(z)^2] = 1 for z ~ N(0, 1).

  a = 1 / sqrt(E[f'(z)^2]),   b = -a E[f] -+ sqrt(1 - a^2 Var f).

The discriminant is never negative: that is the Gaussian Poincare inequality Var f <= E[f'^2]. The map of
q = ||x||^2 / n through a layer of orthogonal weights has slope chi = E[z phi phi'] at its fixed point 1: below 1
deviations die out, above 1 they grow. The root "minus" has the smaller slope for every activation in use.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods.typing import ActivationRoot

__all__ = ["GPNConstants", "gpn", "gpn_constants"]

_RANGE = 14.0  # exp(-14^2 / 2) = 3e-43: nothing that grows polynomially is left outside


class GPNConstants(NamedTuple):
    """phi = a f + b and what it does to a standard normal input.

    Example:
      >>> c = gpn_constants(jax.nn.relu)
      >>> round(c.a, 8), round(c.b, 8)
      (1.41421356, -1.12837917)

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """

    a: float  # scale
    b: float  # shift
    mean: float  # E[phi]
    chi: float  # E[z phi phi'], slope of the map of ||x||^2 / n at 1; above 1 norms drift away exponentially
    v: float  # E[phi^4] - 1 - 2 chi^2: the norm's stationary variance is v / (n (1 - chi^2)) for chi < 1
    k: float  # E[phi'^4]: the backward norm's logarithm has variance ~ 3 (k - 1) L / n after L layers


def _gaussian_moments(f: Callable[[Any], Any]) -> Callable[[Callable[..., np.ndarray]], float]:
    """E[g(z, f(z), f'(z))] as a function of g: Gauss-Legendre on panels that are halved where f or f' has a kink."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    chunk = 2048  # one shape, compiled once
    jvp = jax.jit(lambda z: jax.jvp(f, (z,), (jnp.ones_like(z),)))

    def evaluate(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padded = np.pad(z, (0, -len(z) % chunk)).reshape(-1, chunk)
        with jax.ensure_compile_time_eval(), jax.enable_x64(True):
            pairs = [jvp(row) for row in padded]
        value, slope = (np.concatenate([np.asarray(p[i], np.float64) for p in pairs])[: len(z)] for i in (0, 1))
        return value, slope

    def sample(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, ...]:
        half = (right - left)[:, None] / 2
        z = (left + right)[:, None] / 2 + half * nodes[None, :]
        value, slope = evaluate(z.ravel())
        density = half * weights[None, :] * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return z, value.reshape(z.shape), slope.reshape(z.shape), density

    def content(panels: tuple[np.ndarray, ...]) -> np.ndarray:
        z, value, slope, density = panels
        return np.stack([np.sum(m * density, axis=1) for m in (value, value**2, slope**2, slope**4, z * value * slope)])

    left = np.arange(-_RANGE, _RANGE, 0.5)
    right = left + 0.5
    accepted: list[tuple[np.ndarray, ...]] = []
    for _ in range(60):
        whole = sample(left, right)
        middle = (left + right) / 2
        first, second = sample(left, middle), sample(middle, right)
        off = np.max(np.abs(content(whole) - content(first) - content(second)), axis=0)
        good = off < 1e-14
        accepted += [tuple(x[good] for x in part) for part in (first, second)]
        left, right = np.concatenate([left[~good], middle[~good]]), np.concatenate([middle[~good], right[~good]])
        if not left.size:
            break
    z, value, slope, density = (np.concatenate(parts) for parts in zip(*accepted, strict=True))
    return lambda g: float(np.sum(g(z, value, slope) * density))


def gpn_constants(f: Callable[[Any], Any], *, root: ActivationRoot = "minus") -> GPNConstants:
    """Constants a, b for which phi = a f + b is Gaussian-Poincare normalised, in float64 by adaptive quadrature.

    Args:
      f: an elementwise activation that JAX can differentiate; kinks are found and need not be told.
      root: "minus" (smaller b, smaller chi: stable) or "plus" (the published table for tanh, ReLU, LeakyReLU, ELU,
        SELU; unstable, chi > 1, for GELU, Swish and Softplus).

    Returns:
      `GPNConstants`.

    Raises:
      ValueError: unknown root, a constant activation, or one whose moments are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> round(gpn_constants(jnp.tanh, root="plus").b, 8)
      0.38854167

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    checks.one_of(ActivationRoot, root=root)
    moment = _gaussian_moments(f)
    slope2, mean, square = moment(lambda z, f, df: df**2), moment(lambda z, f, df: f), moment(lambda z, f, df: f**2)
    if not np.isfinite([slope2, mean, square]).all() or slope2 <= 0:
        raise ValueError(
            f"the activation has E[f'^2] = {slope2}, E[f^2] = {square}; it must be finite and not constant"
        )
    a = 1 / math.sqrt(slope2)
    discriminant = math.sqrt(max(1 - a * a * (square - mean * mean), 0.0))
    b = -a * mean + (discriminant if root == "plus" else -discriminant)
    phi = lambda f: a * f + b
    chi = moment(lambda z, f, df: z * phi(f) * a * df)
    v = moment(lambda z, f, df: phi(f) ** 4) - 1 - 2 * chi**2
    return GPNConstants(a, b, a * mean + b, chi, v, moment(lambda z, f, df: (a * df) ** 4))


def gpn(f: Callable[[Any], Any], *, root: ActivationRoot = "minus") -> Callable[[jax.Array], jax.Array]:
    """The activation phi = a f + b with E[phi^2] = E[phi'^2] = 1 under a standard normal input.

    Args:
      f: an elementwise activation, e.g. `jnp.tanh`.
      root: see `gpn_constants`.

    Returns:
      phi, which keeps the type of its argument; a and b are Python floats, one multiply-add after f.

    Raises:
      ValueError: see `gpn_constants`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> phi = gpn(jax.nn.gelu)
      >>> z = jax.random.normal(jax.random.key(0), (100_000,))
      >>> abs(float(jnp.mean(phi(z) ** 2)) - 1) < 0.02
      True

    Source: Lu, Gould, Ajanthan (2020), arXiv:2006.12169 [lu2020bidirectionally].
    """
    constants = gpn_constants(f, root=root)
    return lambda z: constants.a * f(z) + constants.b
