"""What a reduction mapping does to the curvature: beta, mu and kappa of f and of F, and the bounds of the theorems.

At a minimiser x = Phi(x1), with H = Hess f(x) and P_T the projection on T = range(DPhi), the tangents of the graph:

  beta_f, mu_f  largest and smallest eigenvalue of H, the zeros along the minimisers S left out; kappa_f = beta_f / mu_f
  beta_F, mu_F  the same for Hess F v = lambda R v (pullback metric); beta_F_euclidean, ... for Hess F v = lambda v
  m, M          extreme eigenvalues of R: beta_F_euclidean <= M beta_F, mu_F_euclidean >= m mu_F
  1 - eps       cos(E, T) = max ||P_T v|| over the unit vectors v of an eigenspace E,
                ||P_T v||^2 = (DPhi^T v)^T R^{-1} (DPhi^T v)

Theorem 1 and 2:  beta_F <= beta_f - D_max (2 eps - eps^2) + c   E of the largest eigenvalue, D_max the gap below it
Theorem 3:        mu_F   >= mu_f   + D_min (2 eps - eps^2) - c   E of the smallest one, D_min the gap above it

c = max |lambda| of C v = lambda R v is zero where Psi is affine or grad_2 f = 0, hence at every minimiser of f, and at
most Q Z / m, the paper's worst case over a neighbourhood. Everything here is at one point.

The bound on mu needs, in addition, that the graph contains each direction of S or is orthogonal to it. A graph that
cuts S obliquely can lower mu: f = (x1 x2 - 1)^2 / 2 has mu_f = 2 at (1, 1), and Psi = 1 has F'' / R = 1 there.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxlib_methods._core import checks
from jaxlib_methods.optimizers._spectra import Metric, Operator, Spectrum, spectrum_ends
from jaxlib_methods.optimizers.reduction import Mapping, check_floating, check_output, linearize
from jaxlib_methods.typing import PyTree

__all__ = ["ReducedCurvature", "reduced_curvature"]


class ReducedCurvature(NamedTuple):
    """Curvature of f and of F at one point; Python floats, symbols as in the docstring of `reduced_curvature`.

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428, Theorems 1 to 3 [markou2025sharper].
    """

    value: float  # F(x1)
    beta_f: float
    mu_f: float
    beta_F: float  # pullback metric
    mu_F: float
    beta_F_euclidean: float
    mu_F_euclidean: float
    m: float  # smallest eigenvalue of R
    M: float  # largest eigenvalue of R
    curvature_term: float  # c
    eps_max: float  # 1 - cosine of the top eigenspace of H and T
    gap_max: float  # D_max, 0 where all eigenvalues are equal
    beta_bound: float  # beta_F is at most this
    eps_min: float  # 1 - cosine of the bottom eigenspace of H and T
    gap_min: float  # D_min, 0 where all nonzero eigenvalues are equal
    mu_bound: float  # mu_F is at least this; NaN where the graph cuts the minimisers obliquely

    @property
    def kappa_f(self) -> float:
        """beta_f / mu_f."""
        return self.beta_f / self.mu_f

    @property
    def kappa_F(self) -> float:
        """beta_F / mu_F, pullback metric."""
        return self.beta_F / self.mu_F

    @property
    def kappa_F_euclidean(self) -> float:
        """The condition number that gradient descent on F meets."""
        return self.beta_F_euclidean / self.mu_F_euclidean


def reduced_curvature(
    f: Callable[[PyTree, PyTree], jax.Array],
    mapping: Mapping,
    x1: PyTree,
    *,
    minimum: float | int | None = 0.0,
    rtol: float | None = None,
    num_eigenvalues: int = 8,
    max_dense: int = 512,
) -> ReducedCurvature:
    """Measures beta, mu and kappa of f and F at x1, and what Theorems 1 to 3 promise there.

    The operators are products with Hess f, Hess F and R. Spaces of at most `max_dense` dimensions are solved whole,
    larger ones by implicitly restarted Lanczos (ARPACK) at both ends of the spectrum. Lanczos may miss copies of a
    repeated eigenvalue; if an extreme one is repeated, eps can then come out too large. In float32 a condition number
    above some 1e4 drowns in round-off: use `jax.enable_x64` for those.

    Args:
      f: `f(x1, x2)`, twice differentiable, returning a scalar.
      mapping: the reduction mapping; exact in its second derivatives (`argmin_mapping` with a small tolerance, if it is
        implicit).
      x1: a minimiser of F, concrete floating arrays. mu and its bound mean little elsewhere; beta is right anywhere.
      minimum: min f. A warning tells if F is stationary above it: then the graph misses the minimisers, against the
        assumption that S_F is not empty. None for no such check.
      rtol: eigenvalues that differ by less, relative to the largest, are one, and those below it are zero; None for
        1e-6 in float64 and 3.5e-4 in float32.
      num_eigenvalues: computed at each end by Lanczos, at least 2.
      max_dense: largest dimension that is solved whole.

    Returns:
      A `ReducedCurvature`.

    Raises:
      ValueError: arrays that are not finite or not floating; no curvature; too few eigenvalues to see a gap.

    Example:
      >>> import jax.numpy as jnp
      >>> f = lambda x1, x2: x1**2 + 2 * (x2 - x1) ** 2
      >>> found = reduced_curvature(f, lambda x1: x1, jnp.array(0.0))
      >>> round(found.kappa_f, 3), round(found.kappa_F, 3)
      (10.404, 1.0)
      >>> round(found.beta_f, 3), round(found.beta_bound, 3), round(found.beta_F, 3)
      (9.123, 1.0, 1.0)

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428, Theorems 1 to 3 [markou2025sharper].
    """
    checks.at_least(2, num_eigenvalues=num_eigenvalues, remedy="a gap lies between two of them")
    problem = _Problem.of(f, mapping, x1)
    eps = float(np.finfo(problem.dtype).eps)
    rtol = max(1e-6, math.sqrt(eps)) if rtol is None else rtol
    R = Metric(problem.R, problem.n1, eps, max_dense)
    ends = lambda operator, size, metric=None: spectrum_ends(operator, size, metric, num_eigenvalues, max_dense)
    spectrum = lambda name, *args: Spectrum.of(name, *ends(*args), rtol, num_eigenvalues)

    H = spectrum("Hess f", problem.hess_f, problem.n)
    pullback = spectrum("Hess F", problem.hess_F, problem.n1, R)
    euclidean = spectrum("Hess F", problem.hess_F, problem.n1)
    of_R = ends(problem.R, problem.n1)[0]
    C = lambda v: problem.hess_F(v) - problem.lower(problem.hess_f(problem.lift(v)))
    probe = np.random.default_rng(0).standard_normal(problem.n1)
    affine = np.linalg.norm(C(probe)) <= 100 * eps * H.scale * np.linalg.norm(problem.lift(probe))
    c = 0.0 if affine else float(np.abs(ends(C, problem.n1, R)[0]).max())

    def cosine_squares(V: np.ndarray) -> np.ndarray:
        """Of the principal angles between span(V) and T, ascending."""
        U = np.stack([problem.lower(v) for v in V.T], axis=1)
        Z = np.stack([R.solve(u) for u in U.T], axis=1)
        return np.clip(np.linalg.eigvalsh(U.T @ Z), 0.0, 1.0)

    top, bottom = cosine_squares(H.top_vectors)[-1], cosine_squares(H.bottom_vectors)[-1]
    along = cosine_squares(H.null_vectors) if H.null_vectors.size else np.zeros(1)
    oblique = np.max(along * (1 - along)) > rtol  # sin^2 cos^2 of the angles between the minimisers and the graph
    _warn_above_minimum(problem, R, pullback.bottom, minimum, eps)
    return ReducedCurvature(
        value=problem.value,
        beta_f=H.top,
        mu_f=H.bottom,
        beta_F=pullback.top,
        mu_F=pullback.bottom,
        beta_F_euclidean=euclidean.top,
        mu_F_euclidean=euclidean.bottom,
        m=float(of_R[0]),
        M=float(of_R[-1]),
        curvature_term=c,
        eps_max=1 - math.sqrt(top),
        gap_max=H.gap_top,
        beta_bound=float(H.top - H.gap_top * (1 - top) + c),  # 2 eps - eps^2 = 1 - cos^2
        eps_min=1 - math.sqrt(bottom),
        gap_min=H.gap_bottom,
        mu_bound=math.nan if oblique else float(H.bottom + H.gap_bottom * (1 - bottom) - c),
    )


class _Problem(NamedTuple):
    """The operators on flat vectors."""

    dtype: np.dtype
    n1: int
    n: int
    value: float  # F(x1)
    gradient: np.ndarray  # grad F(x1)
    hess_f: Operator
    hess_F: Operator
    R: Operator
    lift: Operator  # v -> DPhi v
    lower: Operator  # w -> DPhi^T w

    @classmethod
    def of(cls, f: Callable[[PyTree, PyTree], jax.Array], mapping: Mapping, x1: PyTree) -> "_Problem":
        x1 = jax.tree.map(jnp.asarray, x1)
        check_floating(x1, "x1")
        x2 = mapping(x1)
        check_output(x2)
        flat1, unravel1 = ravel_pytree(x1)
        flat2, unravel2 = ravel_pytree(x2)
        dtype = jnp.float64 if jnp.float64 in (flat1.dtype, flat2.dtype) else jnp.float32
        n1 = flat1.size
        in_x1 = lambda v: unravel1(v.astype(flat1.dtype))
        at = jnp.concatenate([flat1.astype(dtype), flat2.astype(dtype)])
        psi_flat = lambda v: ravel_pytree(mapping(in_x1(v)))[0].astype(dtype)
        f_flat = lambda x: f(in_x1(x[:n1]), unravel2(x[n1:].astype(flat2.dtype)))
        F_flat = lambda v: f(in_x1(v), mapping(in_x1(v)))
        value, gradient = jax.value_and_grad(F_flat)(at[:n1])
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            raise ValueError(f"F(x1) = {float(value)} or its gradient is not finite; x1 must be a minimiser of F")
        _, jvp, vjp = linearize(psi_flat, at[:n1])
        hvp = lambda function, point: lambda v: jax.jvp(jax.grad(function), (point,), (v,))[1]
        operators = (
            hvp(f_flat, at),
            hvp(F_flat, at[:n1]),
            lambda v: v + vjp(jvp(v)),
            lambda v: jnp.concatenate([v, jvp(v)]),
            lambda w: w[:n1] + vjp(w[n1:]),
        )
        compiled = [_on_numpy(operator, dtype) for operator in operators]
        return cls(np.dtype(dtype), n1, at.size, float(value), np.asarray(gradient, np.float64), *compiled)


def _on_numpy(operator: Callable[[jax.Array], jax.Array], dtype: jax.typing.DTypeLike) -> Operator:
    compiled = jax.jit(operator)
    return lambda v: np.asarray(compiled(jnp.asarray(v, dtype)), np.float64)


def _warn_above_minimum(problem: _Problem, R: Metric, mu: float, minimum: float | int | None, eps: float) -> None:
    """F can fall by about ||grad F||^2 / (2 mu_F), in the norm of R^{-1}; what lies further above min f stays."""
    if minimum is None or not mu > 0:
        return
    excess = problem.value - minimum
    can_fall = problem.gradient @ R.solve(problem.gradient) / (2 * mu)
    if excess > 2 * can_fall + 100 * eps * max(1.0, abs(minimum)):
        warnings.warn(
            f"F(x1) = {problem.value:.6g} can fall by some {can_fall:.1g} only and stays above min f = {minimum:.6g}: "
            "the graph of mapping does not meet the minimisers of f, which the theorems assume; F has other minimisers "
            "than f",
            stacklevel=3,
        )
