"""The orthogonal polar factor U of A = U P, batched, with a backward pass that is finite at a tiny singular value.

Forward, by `method`:
  svd             A = Q S V^T, U = Q V^T. Any A, also rank deficient (then one of several factors). The reference.
  qdwh            dynamically weighted Halley iteration: at most 6 steps of QR or Cholesky, whatever the condition.
  newton_schulz   X <- 3/2 X - 1/2 X X^T X, matrix products only. The first steps are stretched by the scalings that
                  are optimal on [1/condition, 1], so kappa = 200 takes 10 steps instead of 18. Full rank only.
  gram            U_0 = A V S^-1 V^T from the K x K problem A^T A = V S^2 V^T, then Newton steps on both conditions that
                  single U out, U^T U = I and U^T A symmetric: what squaring the condition number lost comes back.
                  Its S and V serve the backward pass. Full rank only.
  None            Where the condition is known and at most 2000: newton_schulz (on CPU: gram), and the SVD should it
                  not converge; on CPU svd below 32 columns. Where it is not known, or larger: svd on CPU, qdwh on GPU
                  and TPU.

Backward, for the cotangent G, with A = U V S V^T:
  Omega = V [ (V^T (U^T G - G^T U) V)_ij / (s_i + s_j) ] V^T
  dL/dA = U Omega + (G - U U^T G) V S^-1 V^T
Sums s_i + s_j of singular values stand where differentiating an SVD has differences s_i^2 - s_j^2: repeated singular
values (neural collapse makes K-1 of them equal) cost nothing. An eigensolver returns the V and S of a matrix
that is a few eps ||A|| away, many eps kappa in the terms of the smallest singular values: both terms solve an equation
in P, and one step of iterative refinement squares that error, whatever basis the solver chose.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods._core.linalg import eye_like, matmul, newton_schulz_step, transpose
from jaxlib_methods.typing import PolarMethod

# Above this, Newton-Schulz needs more passes over A than QDWH needs factorisations.
NEWTON_SCHULZ_MAX_CONDITION = 2e3
# Below this a CPU is faster with an SVD.
GRAM_MIN_COLUMNS = 32
_MAX_STEPS = 80


def _between(V: jax.Array, X: jax.Array) -> jax.Array:
    return matmul(matmul(V, X), transpose(V))


def _scalings(condition: float) -> list[float]:
    """Stretches a_k of x -> 3/2 (a x) - 1/2 (a x)^3 that raise the lower end l of [l, 1] the most, until l = 0.9."""
    l, scalings = 1.0 / condition, []
    while l < 0.9:
        a = math.sqrt(3.0 / (1.0 + l + l * l))
        scalings.append(a)
        l = 0.5 * a * l * (3.0 - (a * l) ** 2)
    return scalings


def _order_one(A: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A over its largest entry, and that: the Gram matrix squares what may be very small or large."""
    peak = jnp.max(jnp.abs(A), axis=(-2, -1), keepdims=True)
    peak = jnp.where(peak > 0, peak, 1)
    return A / peak, peak


def _newton_schulz(A: jax.Array, condition: float | None) -> tuple[jax.Array, jax.Array]:
    """U, and whether all matrices of the batch have converged."""
    K = A.shape[-1]
    X, _ = _order_one(A)
    # ||A^T A||_F^(1/2) bounds ||A||_2 more tightly than ||A||_F. It still overestimates it by up to K^(1/4).
    G = matmul(transpose(X), X)
    bound = jnp.sqrt(jnp.sqrt(jnp.sum(G * G, axis=(-2, -1), keepdims=True)))
    X = X / jnp.where(bound > 0, bound, 1)
    # Optimal stretches for a lower end that is too low only cost steps; for one too high the loop below goes on.
    stretches = jnp.asarray([*_scalings((condition or 1e3) * K**0.25), 1.0], A.dtype)
    tolerance = math.sqrt(float(jnp.finfo(A.dtype).eps))

    def residual(X):
        G = matmul(transpose(X), X)
        return G, jnp.sqrt(jnp.max(jnp.sum((G - eye_like(G)) ** 2, axis=(-2, -1))))

    def step(carry):
        X, G, _, i = carry
        a = stretches[jnp.minimum(i, len(stretches) - 1)]
        X = newton_schulz_step(X, G, (1.5 * a, -0.5 * a**3))
        return X, *residual(X), i + 1

    # Quadratic convergence: one step past a residual of sqrt(eps) reaches eps.
    X, G, r, _ = jax.lax.while_loop(lambda c: (c[2] > tolerance) & (c[3] < _MAX_STEPS), step, (X, *residual(X), 0))
    return newton_schulz_step(X, G, (1.5, -0.5)), r <= tolerance


def _gram(A: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """U, s, V with A = U V diag(s) V^T, and whether all matrices of the batch have converged."""
    X, peak = _order_one(A)
    w, V = jnp.linalg.eigh(matmul(transpose(X), X), symmetrize_input=False)
    eps = float(jnp.finfo(A.dtype).eps)
    top = jnp.maximum(w[..., -1:], eps)
    s = jnp.sqrt(jnp.maximum(w, eps * top))
    U = matmul(X, matmul(V / s[..., None, :], transpose(V)))
    tolerance = math.sqrt(eps)
    sums_inverse = 1 / (s[..., :, None] + s[..., None, :])

    def newton(U):
        # U (I + C) with C = Omega - E/2, E = U^T U - I and a skew Omega meets both conditions to second order.
        E, B = matmul(transpose(U), U), matmul(transpose(U), X)
        E = E - eye_like(E)
        D = B - matmul(E, B) / 2
        C = _between(V, matmul(matmul(transpose(V), D - transpose(D)), V) * sums_inverse) - E / 2
        return B, C, jnp.sqrt(jnp.max(jnp.sum(C * C, axis=(-2, -1))))

    def step(carry):
        U, _, C, _, i = carry
        U = U + matmul(U, C)
        return U, *newton(U), i + 1

    # What starts far off has a smaller singular value than A^T A can show: a matter for another method.
    going_on = lambda c: (c[3] > tolerance) & (c[3] < 0.25) & (c[4] < 5)
    U, B, C, r, _ = jax.lax.while_loop(going_on, step, (U, *newton(U), 0))
    U = U + matmul(U, C)
    P = B + matmul(transpose(C), B)
    P = (P + transpose(P)) / 2
    # The eigenvectors serve P as they do A^T A, unless two singular values are so small that it cannot tell them apart;
    # the eigenvalues are P's own.
    distinct = jnp.all(0.1 * tolerance * w[..., min(1, A.shape[-1] - 1)] > eps * top[..., 0])
    rayleigh = lambda: (jnp.sum(V * matmul(P, V), axis=-2), V)
    s, V = jax.lax.cond(distinct, rayleigh, lambda: tuple(jnp.linalg.eigh(P, symmetrize_input=False)))
    return U, jnp.maximum(s, 0) * peak[..., 0], V, r <= tolerance


def _qdwh(A: jax.Array) -> jax.Array:
    flat = A.reshape((-1, *A.shape[-2:]))
    return jax.lax.map(lambda a: jax.lax.linalg.qdwh(a)[0], flat).reshape(A.shape)


def _factors(
    A: jax.Array, method: PolarMethod | None, condition: float | None, *, spectrum: bool
) -> tuple[jax.Array, ...]:
    """(U,), or with the spectrum (U, s, V) with A = U V diag(s) V^T."""

    def with_spectrum(U: jax.Array) -> tuple[jax.Array, ...]:
        if not spectrum:
            return (U,)
        P = matmul(transpose(U), A)
        s, V = jnp.linalg.eigh((P + transpose(P)) / 2, symmetrize_input=False)
        return U, jnp.maximum(s, 0), V

    if method is None:
        by = lambda name: lambda A: _factors(A, name, condition, spectrum=spectrum)
        if not condition or condition > NEWTON_SCHULZ_MAX_CONDITION:
            return jax.lax.platform_dependent(A, cpu=by("svd"), default=by("qdwh"))

        def newton_schulz_or_svd(A: jax.Array) -> tuple[jax.Array, ...]:
            U, converged = _newton_schulz(A, condition)
            return jax.lax.cond(converged, lambda: with_spectrum(U), lambda: by("svd")(A))

        def gram_or_svd(A: jax.Array) -> tuple[jax.Array, ...]:
            *factors, converged = _gram(A)
            return jax.lax.cond(converged, lambda: tuple(factors if spectrum else factors[:1]), lambda: by("svd")(A))

        on_cpu = by("svd") if A.shape[-1] < GRAM_MIN_COLUMNS else gram_or_svd
        return jax.lax.platform_dependent(A, cpu=on_cpu, default=newton_schulz_or_svd)
    if method == "svd":
        Q, s, Vt = jnp.linalg.svd(A, full_matrices=False)
        return (matmul(Q, Vt), s, transpose(Vt)) if spectrum else (matmul(Q, Vt),)
    if method == "gram":
        factors = _gram(A)[:3]
        return factors if spectrum else factors[:1]
    return with_spectrum(_qdwh(A) if method == "qdwh" else _newton_schulz(A, condition)[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _polar(A: jax.Array, method: PolarMethod | None, condition: float | None) -> jax.Array:
    return _factors(A, method, condition, spectrum=False)[0]


def _polar_forward(A, method, condition):
    U, s, V = _factors(A, method, condition, spectrum=True)
    return U, (A, U, s, V)


def _polar_backward(method, condition, residuals, G):
    A, U, s, V = residuals
    d, K = U.shape[-2:]
    UtG = matmul(transpose(U), G)
    # What lies below round-off of A cannot carry a derivative: the minimum-norm answer drops it.
    floor = float(jnp.finfo(s.dtype).eps) * d * jnp.max(s, axis=-1, keepdims=True)
    sums = s[..., :, None] + s[..., None, :]
    sums_inverse = jnp.where(sums > floor[..., None], 1 / jnp.where(sums > 0, sums, 1), 0)
    # P in the basis V: diagonal up to the error of the eigensolver. One step of refinement per solution squares that.
    P = matmul(matmul(transpose(V), matmul(transpose(U), A)), V)
    P = (P + transpose(P)) / 2
    S = matmul(transpose(V), matmul(UtG - transpose(UtG), V))
    Omega = S * sums_inverse
    POmega = matmul(P, Omega)
    Omega = _between(V, Omega + (S - POmega + transpose(POmega)) * sums_inverse)
    if d == K:  # a square U leaves no orthogonal complement: round-off over s_min is all that would be added
        return (matmul(U, Omega),)
    s_inverse = jnp.where(s > floor, 1 / jnp.where(s > 0, s, 1), 0)
    P_inverse = 2 * s_inverse[..., None] * eye_like(P) - s_inverse[..., :, None] * P * s_inverse[..., None, :]
    return (matmul(U, Omega) + matmul(G - matmul(U, UtG), _between(V, P_inverse)),)


_polar.defvjp(_polar_forward, _polar_backward)


def polar(A: jax.Array, *, method: PolarMethod | None = None, condition: float | None = None) -> jax.Array:
    """The orthogonal polar factor of A: the matrix with orthonormal columns (rows, if A is wide) closest to A.

    U = argmin_{U^T U = I} ||A - U||_F = A (A^T A)^{-1/2} = Q V^T for A = Q S V^T. The backward pass divides by sums of
    singular values only (module docstring); it is finite at s_min = 0, where it gives the minimum-norm derivative.

    Args:
      A: (..., d, K), real. bfloat16 and float16 are computed in float32 and returned in their own type. Always at
        highest matmul precision.
      method: "svd", "qdwh", "newton_schulz", "gram", or None to choose by platform and conditioning (module docstring).
      condition: a bound or guess of the condition number of A, a Python float. It chooses the method and the
        stretches of Newton-Schulz, never the answer.

    Returns:
      U, the shape and type of A. Memory O(dK + K^2).

    Raises:
      ValueError: A is not a real matrix, an unknown method, a condition below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> A = jnp.array([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
      >>> polar(A).tolist()
      [[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]
      >>> jax.grad(lambda A: polar(A)[0, 1])(jnp.eye(3, 2)).round(3).tolist()  # s = (1, 1): an SVD's derivative is NaN
      [[0.0, 0.5], [-0.5, 0.0], [0.0, 0.0]]

    Source: for Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """
    if A.ndim < 2 or not jnp.issubdtype(A.dtype, jnp.floating):
        raise ValueError(f"A must be a real matrix (..., d, K), got shape {A.shape} of {A.dtype}")
    if method is not None:
        checks.one_of(PolarMethod, method=method)
    checks.at_least(1, remedy="leave it out when it is unknown", condition=condition)
    if A.shape[-2] < A.shape[-1]:
        return transpose(polar(transpose(A), method=method, condition=condition))
    compute = A.astype(compute_dtype(A.dtype))
    return _polar(compute, method, condition).astype(A.dtype)
