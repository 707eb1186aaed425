"""Reduction mappings: a known part of the solution as a function of the rest.

Symbols: f(x1, x2) is the objective and Psi: x1 -> x2 the reduction mapping, x2 = Psi(x1) at the optimum; x1 and x2 are
pytrees of n1 and n2 numbers. Phi(x1) = (x1, Psi(x1)) parametrises the graph M_F of Psi, and F = f o Phi is f on it.

  DPhi   = [I; DPsi]
  grad F = grad_1 f + DPsi^T grad_2 f
  Hess F = DPhi^T (Hess f) DPhi + C,  C = sum_j (df/dx2_j) Hess Psi_j

For an implicit mapping, Psi(x1) = argmin_u G(x1, u), DPsi = -G_uu^{-1} G_{u x1}. If G = f (variable projection),
grad_2 f = 0 on the graph, C = 0, and Hess F = f_11 - f_12 f_22^{-1} f_21.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.trees import path_names
from jaxlib_methods.typing import PyTree

__all__ = ["argmin_mapping", "reduced_objective", "small_slope"]

Mapping = Callable[[PyTree], PyTree]


def reduced_objective(
    f: Callable[..., Any], mapping: Mapping, *, argmin: bool = False, like: PyTree | None = None
) -> Callable[..., Any]:
    """F(x1) = f(x1, Psi(x1)), the objective restricted to the graph of the reduction mapping.

    grad F = grad_1 f + DPsi^T grad_2 f comes out of one reverse pass. Where Psi(x1) minimises f(x1, .) itself (variable
    projection), grad_2 f = 0 and grad F = grad_1 f: `argmin` leaves the pass through Psi out. Second derivatives are
    those of F in both cases, with `argmin` f_11 + f_12 DPsi.

    Args:
      f: `f(x1, x2, *args)`, the original objective; it may return auxiliary values for `has_aux`.
      mapping: the reduction mapping x1 -> x2.
      argmin: promises that Psi(x1) minimises f(x1, .). The gradient is then wrong by O(error of the minimiser). What f
        and Psi close over is a constant then; what is to be differentiated goes through `args`.
      like: an x2 of the original problem (arrays or `jax.ShapeDtypeStruct`). Psi is held against its structure and
        shapes: a wrong shape may broadcast in f without an error.

    Returns:
      `F(x1, *args)`.

    Raises:
      ValueError: on call, if Psi returns something else than floating arrays, or not what `like` shows.

    Example:
      >>> import jax
      >>> f = lambda x1, x2: x1**2 + 2 * (x2 - x1) ** 2
      >>> F = reduced_objective(f, lambda x1: x1)
      >>> float(F(3.0)), float(jax.grad(F)(3.0))  # F = x1^2
      (9.0, 6.0)

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428 [markou2025sharper].
    """

    def checked(x1: PyTree) -> PyTree:
        x2 = mapping(x1)
        check_output(x2)
        if like is not None:
            check_same(x2, like, "mapping(x1)", "like", "let mapping return x2 as f takes it")
        return x2

    if not argmin:
        return lambda x1, *args: f(x1, checked(x1), *args)

    @jax.custom_jvp
    def F(x1: PyTree, *args: Any) -> Any:
        return f(x1, checked(x1), *args)

    @F.defjvp
    def envelope(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
        x2 = checked(primals[0])  # a constant of this derivative, a variable of the next one
        return jax.jvp(lambda x1, *args: f(x1, x2, *args), primals, tangents)

    return F


def small_slope(mapping: Mapping, slope: float) -> Mapping:
    """The mapping alpha Psi, whose metric R = I + alpha^2 DPsi^T DPsi is closer to the identity.

    It leaves the minimisers where they are only if the structure that Psi encodes is scale invariant (a subspace, a
    cone, a direction); otherwise a small alpha moves the graph away from them. For alpha -> 0 GeoPrecGD becomes
    gradient descent on x1.

    Args:
      mapping: the reduction mapping x1 -> x2.
      slope: alpha, in (0, 1].

    Returns:
      `x1 -> alpha mapping(x1)`, to be used in `reduced_objective` and in the optimizer alike.

    Raises:
      ValueError: a slope outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlib_methods.optimizers.geoprec import pullback_metric
      >>> R = pullback_metric(small_slope(lambda x1: 3 * x1, 0.5), jnp.ones(2))
      >>> R(jnp.array([1.0, 2.0])).tolist()  # 1 + 0.25 * 9
      [3.25, 6.5]

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428 [markou2025sharper].
    """
    checks.within("(0, 1]", slope=slope, remedy="1 is the mapping itself")
    return lambda x1: jax.tree.map(lambda leaf: slope * leaf, mapping(x1))


def argmin_mapping(
    inner_objective: Callable[[PyTree, PyTree], jax.Array],
    solve: Mapping,
    *,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
) -> Mapping:
    """The implicit mapping Psi(x1) = argmin_u G(x1, u), differentiated by the implicit function theorem.

    DPsi = -G_uu^{-1} G_{u x1}, in both modes and to any order, by conjugate gradients on products with G_uu; the steps
    of the inner solver are not differentiated. G_uu must be positive definite at the minimiser (strict second-order
    sufficiency).

    Args:
      inner_objective: `G(x1, u)`.
      solve: `solve(x1)` returns the minimiser u; any code that JAX can trace. DPsi is that at the point returned, so
        an inexact minimiser gives an inexact derivative.
      tolerance: relative residual at which conjugate gradients stop; 1e-10 for exact second derivatives in float64.
      max_iterations: of conjugate gradients; None for ten times the number of unknowns.

    Returns:
      The mapping.

    Raises:
      ValueError: tolerance or max_iterations not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> G = lambda a, u: 0.5 * jnp.sum((a * u - 1.0) ** 2)
      >>> psi = argmin_mapping(G, lambda a: 1 / a)
      >>> round(float(jax.grad(psi)(2.0)), 6)  # -1 / a^2
      -0.25

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428 [markou2025sharper].
    """
    check_cg(tolerance, max_iterations)

    by_cg = functools.partial(conjugate_gradients, tolerance=tolerance, max_iterations=max_iterations)

    def psi(x1: PyTree) -> PyTree:
        u = jax.lax.stop_gradient(solve(jax.lax.stop_gradient(x1)))
        stationarity = lambda u: jax.grad(inner_objective, argnums=1)(x1, u)
        tangent = lambda G_uu, b: jax.lax.custom_linear_solve(G_uu, b, by_cg, symmetric=True)
        return jax.lax.custom_root(stationarity, u, lambda _, u: u, tangent)

    return psi


def linearize(mapping: Mapping, x1: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """Psi(x1), v -> DPsi v and w -> DPsi^T w, by reverse mode alone: that is what grad F needs of Psi anyway."""
    x1 = jax.tree.map(jnp.asarray, x1)
    check_floating(x1, "x1")
    x2, vjp = jax.vjp(mapping, x1)
    check_output(x2)
    transposed = lambda w: vjp(w)[0]
    _, jvp = jax.vjp(transposed, jax.tree.map(jnp.zeros_like, x2))  # linear, so where it is transposed does not matter
    return x2, lambda v: jvp(v)[0], transposed


def conjugate_gradients(
    A: Callable[[PyTree], PyTree],
    b: PyTree,
    start: PyTree | None = None,
    *,
    tolerance: float,
    max_iterations: int | None,
) -> PyTree:
    """A^{-1} b for positive definite A on trees of one type, until |residual| <= tolerance |b|; NaN if A or b have any.

    From t start with t = start^T b / start^T A start, which minimises the error in the norm of A. The function of
    jax.scipy takes its inner products as matrix products of flattened leaves, which explicit sharding refuses.
    """
    limit = 10 * sum(leaf.size for leaf in jax.tree.leaves(b)) if max_iterations is None else max_iterations
    add = lambda x, c, y: jax.tree.map(lambda u, v: u + c * v, x, y)
    if start is None:
        z, r = jax.tree.map(jnp.zeros_like, b), b
    else:
        A_start = A(start)
        length = inner(start, A_start)
        t = jnp.where(length > 0, inner(start, b) / jnp.where(length > 0, length, 1), 0)
        z, r = jax.tree.map(lambda v: t * v, start), add(b, -t, A_start)
    enough = tolerance**2 * inner(b, b)

    def step(carry: tuple) -> tuple:
        z, r, p, rr, k = carry
        Ap = A(p)
        a = rr / inner(p, Ap)
        r = add(r, -a, Ap)
        new = inner(r, r)
        return add(z, a, p), r, add(r, new / rr, p), new, k + 1

    unfinished = lambda carry: (carry[3] > enough) & (carry[4] < limit)
    z, *_, rr, _ = jax.lax.while_loop(unfinished, step, (z, r, r, inner(r, r), 0))
    return jax.tree.map(lambda v: jnp.where(jnp.isnan(rr), jnp.nan, v), z)


def total(tree: PyTree) -> jax.Array:
    """The sum of the leaves."""
    return functools.reduce(jnp.add, jax.tree.leaves(tree))


def inner(a: PyTree, b: PyTree) -> jax.Array:
    """a^T b."""
    return total(jax.tree.map(lambda u, v: jnp.sum(u * v), a, b))


def check_cg(tolerance: float, max_iterations: int | None) -> None:
    checks.positive(tolerance=tolerance, remedy="it is the relative residual at which the solver stops")
    checks.at_least(1, max_iterations=max_iterations)


def check_floating(tree: PyTree, name: str) -> None:
    for path, leaf in zip(jax.tree.leaves(path_names(tree)), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            got = f"{jnp.result_type(leaf)} at {path!r}" if path else f"{jnp.result_type(leaf)}"
            raise ValueError(f"{name} must hold real floating arrays, got {got}; keep other values out of it")


def check_output(x2: PyTree) -> None:
    if not jax.tree.leaves(x2):
        raise ValueError(f"mapping(x1) must hold at least one array, got {x2!r}")
    check_floating(x2, "mapping(x1)")


def check_same(tree: PyTree, like: PyTree, name: str, like_name: str, remedy: str) -> None:
    """Raises unless both trees have one structure and the same shapes."""
    ours, theirs = jax.tree.structure(tree), jax.tree.structure(like)
    if ours != theirs:
        raise ValueError(f"{name} has the structure {ours}, {like_name} has {theirs}; {remedy}")
    shapes = zip(jax.tree.leaves(path_names(like)), jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
    for path, a, b in shapes:
        if jnp.shape(a) != jnp.shape(b):
            where = f" at {path!r}" if path else ""
            raise ValueError(f"{name} has shape {jnp.shape(a)}{where}, {like_name} has {jnp.shape(b)}; {remedy}")
