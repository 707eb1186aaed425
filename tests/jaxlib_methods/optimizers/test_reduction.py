"""Reduction mappings against the chain rule, closed forms, dense Schur complements and the paper's Figure 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxlib_methods.classifiers import etf_weights, nearest_etf
from jaxlib_methods.optimizers import geoprec_gd, reduced_objective
from jaxlib_methods.optimizers.geoprec import pullback_metric, scale_by_pullback_metric
from jaxlib_methods.optimizers.reduction import argmin_mapping, small_slope
from tests.jaxlib_methods.optimizers.reduction_problems import dense_metric, figure1, normal, run, smooth_problem

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.contract
@pytest.mark.parametrize(
    ("psi", "F"),
    [
        (lambda x: x, lambda x: x**2),
        (lambda x: 0 * x, lambda x: 3 * x**2),
        (lambda x: x + 2 * jnp.sin(x), lambda x: x**2 + 8 * jnp.sin(x) ** 2),
    ],
)
def test_figure_1_reduced_objectives(psi, F):
    for x in (0.0, 0.3, np.pi / 2, -2.0):
        x = jnp.array(x)
        np.testing.assert_allclose(reduced_objective(figure1, psi)(x), F(x), rtol=1e-14)
    # The third mapping adds curvature: F'' = 2 + 16 cos 2 x1.
    bends = jax.grad(jax.grad(reduced_objective(figure1, lambda x: x + 2 * jnp.sin(x))))
    np.testing.assert_allclose([bends(0.0), bends(np.pi / 2)], [18, -14], rtol=1e-13)


# ------------------------------------------------------------------------------------------------ gradient and Hessian


def test_gradient_and_hessian_are_those_of_the_chain_rule():
    f, psi, x1 = smooth_problem()
    F, x2 = reduced_objective(f, psi), psi(x1)
    J = jax.jacobian(psi)(x1)
    grad1, grad2 = jax.grad(f, argnums=(0, 1))(x1, x2)
    np.testing.assert_allclose(jax.grad(F)(x1), grad1 + J.T @ grad2, atol=1e-10)
    DPhi = jnp.concatenate([jnp.eye(5), J])
    hess = jax.hessian(lambda x: f(x[:5], x[5:]))(jnp.concatenate([x1, x2]))
    C = jnp.einsum("j,jab->ab", grad2, jax.hessian(psi)(x1))
    assert jnp.abs(C).max() > 0.1
    np.testing.assert_allclose(jax.hessian(F)(x1), DPhi.T @ hess @ DPhi + C, atol=1e-10)


def test_constant_mapping_is_gradient_descent_and_small_slope_tends_to_it():
    f, psi, x1 = smooth_problem()
    fixed = psi(x1)
    constant = lambda x1: fixed
    F = reduced_objective(f, constant)
    np.testing.assert_array_equal(pullback_metric(constant, x1)(x1), x1)
    np.testing.assert_allclose(jax.hessian(F)(x1), jax.hessian(f)(x1, fixed), atol=1e-12)
    ours, plain = (run(tx, F, x1, 5)[-1] for tx in (geoprec_gd(0.01, constant), optax.sgd(0.01)))
    np.testing.assert_allclose(ours, plain, rtol=1e-12)
    gap = lambda alpha: np.linalg.norm(dense_metric(small_slope(psi, alpha), x1)[0] - np.eye(5))
    np.testing.assert_allclose([gap(0.1), gap(0.01)], [1e-2 * gap(1.0), 1e-4 * gap(1.0)], rtol=1e-9)


def test_auxiliary_values_and_further_arguments_pass_through():
    f = lambda x1, x2, batch, scale: (scale * jnp.sum(batch * (x1 - x2)), {"x2": x2})
    for argmin in (False, True):
        F = reduced_objective(f, lambda x1: 2 * x1, argmin=argmin)
        batch, x1 = jnp.arange(3), jnp.ones(3)
        with jax.numpy_dtype_promotion("standard"):  # an integer batch
            (value, aux), grad = jax.value_and_grad(F, has_aux=True)(x1, batch, 3.0)
        assert value == -9 and aux["x2"].tolist() == [2, 2, 2]
        assert grad.tolist() == ([0, 3, 6] if argmin else [0, -3, -6])  # this Psi is no minimiser


# ------------------------------------------------------------------------------------------------- variable projection


def factorisation(m=6, n=5, r=2):
    """f(A, B) = ||A B^T - M||_F^2 / 2, its exact Psi, and M of full rank."""
    M = normal(m, n, seed=1)
    f = lambda A, B: 0.5 * jnp.sum((A @ B.T - M) ** 2)
    psi = lambda A: jnp.linalg.solve(A.T @ A, A.T @ M).T
    return f, psi, M, normal(m, r, seed=2)


def hessian_matrix(F, A):
    flat, unravel = ravel_pytree(A)
    return jax.jit(jax.hessian(lambda v: F(unravel(v))))(flat)


def schur_complement(f, A, B):
    (a, of_a), (b, of_b) = ravel_pytree(A), ravel_pytree(B)
    hessian = jax.hessian(lambda x: f(of_a(x[: a.size]), of_b(x[a.size :])))
    H = np.asarray(jax.jit(hessian)(np.concatenate([a, b])))
    H11, H12, H22 = H[: a.size, : a.size], H[: a.size, a.size :], H[a.size :, a.size :]
    return H11 - H12 @ np.linalg.solve(H22, H12.T)


def test_varpro_identities():
    f, psi, M, A = factorisation()
    F, B = reduced_objective(f, psi), psi(A)
    np.testing.assert_allclose(F(A), 0.5 * np.sum((M - A @ np.linalg.pinv(A) @ M) ** 2), rtol=1e-12)
    grad = jax.grad(F)(A)
    np.testing.assert_allclose(grad, (A @ B.T - M) @ B, atol=1e-12)
    np.testing.assert_allclose(A.T @ grad, 0, atol=1e-12)
    np.testing.assert_allclose(F(A @ normal(2, 2, seed=7)), F(A), rtol=1e-12)
    np.testing.assert_allclose(hessian_matrix(F, A), schur_complement(f, A, B), atol=1e-10)


def test_implicit_mapping_has_the_derivatives_of_the_explicit_one():
    f, exact, M, A = factorisation()
    del M
    psi = argmin_mapping(f, exact, tolerance=1e-13)
    V, W = normal(6, 2, seed=8), normal(5, 2, seed=9)
    (_, forward), (_, expected) = (jax.jvp(g, (A,), (V,)) for g in (psi, exact))
    np.testing.assert_allclose(forward, expected, atol=1e-9)
    backward, expected = (jax.vjp(g, A)[1](W)[0] for g in (psi, exact))
    np.testing.assert_allclose(backward, expected, atol=1e-9)
    np.testing.assert_allclose(pullback_metric(psi, A)(V), pullback_metric(exact, A)(V), atol=1e-9)
    np.testing.assert_allclose(
        hessian_matrix(reduced_objective(f, psi), A), schur_complement(f, A, exact(A)), atol=1e-8
    )


def test_implicit_mapping_of_trees_by_an_iterative_solver():
    """G(x1, u) = sum(cosh(u - x1)) + |u|^2 / 2, solved by Newton in a loop that cannot be differentiated in reverse."""
    G = lambda x1, u: sum(jnp.sum(jnp.cosh(u[k] - x1[k])) + 0.5 * jnp.sum(u[k] ** 2) for k in u)

    def solve(x1):
        step = lambda u, x: u - (jnp.sinh(u - x) + u) / (jnp.cosh(u - x) + 1)
        settle = lambda x: jax.lax.while_loop(
            lambda c: jnp.max(jnp.abs(c[0] - c[1])) > 1e-14, lambda c: (step(c[0], x), c[0]), (x / 2, x + 1.0)
        )[0]
        return jax.tree.map(settle, x1)

    x1 = {"a": normal(3), "b": normal(2, 2, seed=1)}
    psi = argmin_mapping(G, solve, tolerance=1e-13)
    gradient = jax.grad(lambda x1: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(psi(x1))))(x1)
    u = solve(x1)
    for k in x1:
        cosh = jnp.cosh(u[k] - x1[k])
        np.testing.assert_allclose(gradient[k], cosh / (cosh + 1), atol=1e-10)  # -G_ux / G_uu


def test_implicit_mapping_may_depend_on_outer_variables():
    """Ridge regression u(x1; t) = argmin |u - x1|^2 / 2 + t |u|^2 / 2 = x1 / (1 + t), differentiated in t."""

    @jax.grad
    def outer(t):
        G = lambda x1, u: 0.5 * jnp.sum((u - x1) ** 2) + 0.5 * t * jnp.sum(u**2)
        return jnp.sum(argmin_mapping(G, lambda x1: x1 / (1 + t))(jnp.array([1.0, 3.0])))

    np.testing.assert_allclose(outer(1.0), -4 / 4, rtol=1e-6)


def test_envelope_leaves_psi_out_of_the_gradient_and_in_the_hessian():
    f, exact, _, A = factorisation()
    passes = []

    @jax.custom_vjp
    def psi(A):
        return exact(A)

    def backward(A, g):
        passes.append(None)
        return jax.vjp(exact, A)[1](g)

    psi.defvjp(lambda A: (exact(A), A), backward)
    cheap = reduced_objective(f, psi, argmin=True)
    plain = reduced_objective(f, psi)
    np.testing.assert_allclose(jax.grad(cheap)(A), jax.grad(reduced_objective(f, exact))(A), atol=1e-12)
    assert not passes
    jax.grad(plain)(A)
    assert passes
    exactly = reduced_objective(f, exact, argmin=True)
    np.testing.assert_allclose(hessian_matrix(exactly, A), schur_complement(f, A, exact(A)), atol=1e-10)
    frozen = lambda A: f(A, jax.lax.stop_gradient(exact(A)))
    assert jnp.abs(hessian_matrix(frozen, A) - schur_complement(f, A, exact(A))).max() > 0.1
    # Away from the inner optimum the gradient is wrong by as much.
    inexact = lambda error: reduced_objective(f, lambda A: exact(A) + error, argmin=True)
    gap = lambda error: jnp.linalg.norm(jax.grad(inexact(error))(A) - jax.grad(inexact(0.0))(A))
    np.testing.assert_allclose(gap(1e-3) / gap(1e-4), 10, rtol=2e-2)


# ----------------------------------------------------------------------------------------------------- other instances


def test_simplex_etf_as_a_reduction():
    """x1: features H (d x N), x2: the classifier; Psi is the nearest ETF of the class means, frame by frame."""
    d, K, per_class = 6, 4, 3
    members = jnp.repeat(jnp.eye(K), per_class, axis=0) / per_class  # N x K
    frame = lambda H: nearest_etf(H @ members, jnp.eye(d, K), method="svd")
    H = normal(d, K * per_class)
    U = frame(H)
    W = etf_weights(U)
    np.testing.assert_allclose(W @ W.T, np.where(np.eye(K, dtype=bool), 1, -1 / 3), atol=1e-12)
    np.testing.assert_allclose(W.sum(axis=0), 0, atol=1e-12)
    # The nearest ETF of an ETF is that ETF.
    again = nearest_etf(W.T, U, method="svd")
    np.testing.assert_allclose(etf_weights(again), W, atol=1e-10)
    # As a reduction: the chain rule through the polar factor, and GeoPrecGD against the dense metric.
    targets = jnp.repeat(jnp.eye(K) - 1 / K, per_class, axis=0)
    f = lambda H, W: 0.5 * jnp.sum((H.T @ W.T - targets) ** 2)
    psi = lambda H: etf_weights(frame(H))
    F = reduced_objective(f, psi, like=jax.ShapeDtypeStruct((K, d), H.dtype))
    R, J = dense_metric(psi, H)
    grad1, grad2 = jax.grad(f, argnums=(0, 1))(H, psi(H))
    grad = grad1.ravel() + J.T @ grad2.ravel()
    np.testing.assert_allclose(jax.grad(F)(H).ravel(), grad, atol=1e-10)
    rule = scale_by_pullback_metric(psi, solver="woodbury")
    z, _ = rule.update(jax.grad(F)(H), rule.init(H), H)
    np.testing.assert_allclose(z.ravel(), np.linalg.solve(R, grad), atol=1e-8)
    assert F(run(geoprec_gd(0.5, psi), F, H, 200)[-1]) < 1e-3 * F(H)


def test_weight_and_batch_normalisation_as_reductions():
    x, y = normal(20, 4), normal(20, seed=1)
    # w = g v / |v|: x1 = (g, v), x2 the direction. F ignores the length of v, and its gradient is orthogonal to v.
    f = lambda x1, direction: jnp.mean((x @ (x1["g"] * direction) - y) ** 2)
    F = reduced_objective(f, lambda x1: x1["v"] / jnp.linalg.norm(x1["v"]))
    x1 = {"g": jnp.array(1.3), "v": normal(4, seed=2)}
    np.testing.assert_allclose(F({**x1, "v": 7 * x1["v"]}), F(x1), rtol=1e-13)
    np.testing.assert_allclose(jax.grad(F)(x1)["v"] @ x1["v"], 0, atol=1e-13)
    # Batch norm: x2 the statistics of the batch, a function of the weights.
    f = lambda w, s: jnp.mean(((x @ w - s["mean"]) / s["std"] - y) ** 2)
    statistics = lambda w: {"mean": jnp.mean(x @ w), "std": jnp.std(x @ w)}
    F = reduced_objective(f, statistics)
    h = x @ x1["v"]
    np.testing.assert_allclose(F(x1["v"]), np.mean(((h - h.mean()) / h.std() - y) ** 2), rtol=1e-13)
    np.testing.assert_allclose(F(-5 * x1["v"]), F(-x1["v"]), rtol=1e-12)


def test_gauge_of_relu_rows_fixed_by_unit_norm():
    """a relu(V x) is the same for (V_i, a_i) -> (c V_i, a_i / c): x2 = V / |V| removes that freedom from F."""
    x, y = normal(20, 3), normal(20, seed=1)
    f = lambda x1, W: jnp.mean((jax.nn.relu(x @ W.T) @ x1["a"] - y) ** 2)
    rows = lambda V: V / jnp.linalg.norm(V, axis=1, keepdims=True)
    F = reduced_objective(f, lambda x1: rows(x1["V"]))
    x1 = {"a": normal(5, seed=2), "V": normal(5, 3, seed=3)}
    np.testing.assert_allclose(jnp.sum(jax.grad(F)(x1)["V"] * x1["V"], axis=1), 0, atol=1e-13)
    after = run(geoprec_gd(0.1, lambda x1: rows(x1["V"])), F, x1, 50)[-1]
    assert F(after) < 0.8 * F(x1)


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_input_is_named():
    double = lambda x: 2 * x
    for alpha in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"slope must lie in \(0, 1\], got {alpha}"):
            small_slope(double, alpha)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        argmin_mapping(lambda a, b: jnp.sum(a * b), double, tolerance=-1.0)
    wrong = reduced_objective(lambda a, b: jnp.sum(a * b), lambda x: x[:, None], like=jnp.ones(3))
    with pytest.raises(ValueError, match=r"mapping\(x1\) has shape \(3, 1\), like has \(3,\)"):
        wrong(jnp.ones(3))
