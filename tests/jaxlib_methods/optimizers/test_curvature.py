"""Curvature of reduced problems against dense eigenproblems, closed forms, and the bounds of the paper's theorems."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxlib_methods.optimizers.curvature import reduced_curvature
from jaxlib_methods.optimizers.reduction import small_slope
from tests.jaxlib_methods.optimizers.reduction_problems import figure1

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def quadratic(H):
    """f(x1, x2) = x^T H x / 2, least at 0."""
    H = jnp.asarray(H)

    def f(x1, x2):
        x = jnp.concatenate([x1, x2])
        return 0.5 * x @ H @ x

    return f


def rotated(eigenvalues, seed=0):
    """(H, Q) with H = Q diag(eigenvalues) Q^T."""
    Q, _ = np.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))
    return Q * np.asarray(eigenvalues, float) @ Q.T, Q


def graph_through(tangent):
    """The linear Psi whose graph is the span of the columns of `tangent` (n x n1)."""
    n1 = tangent.shape[1]
    slope = jnp.asarray(tangent[n1:] @ np.linalg.inv(tangent[:n1]))
    return lambda x1: slope @ x1


# ------------------------------------------------------------------------------------- the example of Figure 1, exact


@pytest.mark.contract
def test_figure_1_good_mapping_meets_both_bounds():
    found = reduced_curvature(figure1, lambda x: x, jnp.array(0.0))
    np.testing.assert_allclose([found.mu_f, found.beta_f], [5 - math.sqrt(17), 5 + math.sqrt(17)], rtol=1e-12)
    np.testing.assert_allclose([found.mu_f, found.beta_f, found.kappa_f], [0.876894, 9.123106, 10.4039], rtol=1e-5)
    np.testing.assert_allclose([found.m, found.M], 2, rtol=1e-12)
    np.testing.assert_allclose([found.beta_F, found.mu_F, found.kappa_F], 1, rtol=1e-12)
    np.testing.assert_allclose([found.beta_F_euclidean, found.mu_F_euclidean], 2, rtol=1e-12)
    np.testing.assert_allclose([found.eps_max, found.eps_min], [0.877817, 0.0074924], atol=1e-6)
    np.testing.assert_allclose([found.gap_max, found.gap_min], 8.246211, rtol=1e-6)
    np.testing.assert_allclose([found.beta_bound, found.mu_bound], 1, rtol=1e-12)


def test_figure_1_other_mappings():
    flat = reduced_curvature(figure1, lambda x: 0 * x, jnp.array(0.0))
    np.testing.assert_allclose([flat.m, flat.M, flat.beta_F, flat.mu_F], [1, 1, 6, 6], rtol=1e-12)
    np.testing.assert_allclose([flat.eps_max, flat.beta_bound], [0.211795, 6], rtol=1e-5)
    bent = lambda x: x + 2 * jnp.sin(x)
    at_zero = reduced_curvature(figure1, bent, jnp.array(0.0))
    np.testing.assert_allclose([at_zero.beta_F_euclidean, at_zero.beta_F], [18, 1.8], rtol=1e-12)
    assert at_zero.beta_F_euclidean > at_zero.beta_f
    assert reduced_curvature(figure1, bent, jnp.array(np.pi / 2), minimum=None).beta_F_euclidean == pytest.approx(-14)


# ------------------------------------------------------------------------------------------------------ affine mappings


@pytest.mark.parametrize("seed", range(5))
def test_an_affine_mapping_never_worsens_the_condition_in_the_pullback_metric(seed):
    n1, n2 = 6, 3
    H, _ = rotated(np.exp(np.random.default_rng(seed).uniform(-3, 3, n1 + n2)), seed)
    A = jnp.asarray(normal(n2, n1, seed=seed))
    found = reduced_curvature(quadratic(H), lambda x: A @ x, jnp.zeros(n1))
    # The dense oracle, by the inverse square root of R.
    DPhi = np.concatenate([np.eye(n1), A])
    R, hess = DPhi.T @ DPhi, DPhi.T @ H @ DPhi
    root = np.linalg.inv(scipy.linalg.sqrtm(R).real)
    pullback, euclidean = np.linalg.eigvalsh(root @ hess @ root), np.linalg.eigvalsh(hess)
    np.testing.assert_allclose([found.mu_F, found.beta_F], pullback[[0, -1]], rtol=1e-9)
    np.testing.assert_allclose([found.mu_F_euclidean, found.beta_F_euclidean], euclidean[[0, -1]], rtol=1e-9)
    np.testing.assert_allclose([found.m, found.M], np.linalg.eigvalsh(R)[[0, -1]], rtol=1e-9)
    assert found.m >= 1 - 1e-12 and found.curvature_term == 0
    assert found.beta_F <= found.beta_bound * (1 + 1e-9) < found.beta_f  # Theorem 1
    assert found.mu_F >= found.mu_bound * (1 - 1e-9) > found.mu_f  # Theorem 3
    assert found.beta_F_euclidean <= found.M * found.beta_F * (1 + 1e-9)  # Corollary 1
    assert found.mu_F_euclidean >= found.m * found.mu_F * (1 - 1e-9)
    # The cosine by an orthonormal basis of the graph.
    v = np.linalg.eigh(H)[1][:, -1]
    assert found.eps_max == pytest.approx(1 - np.linalg.norm(np.linalg.qr(DPhi)[0].T @ v), abs=1e-9)


def test_without_a_gap_or_an_angle_there_is_no_strict_gain():
    n1 = 4
    tangent = np.eye(6)[:, :n1]  # Psi = 0: the graph contains the first four axes
    psi = lambda x: jnp.zeros(2)
    assert tangent.shape == (6, 4)
    along = reduced_curvature(quadratic(np.diag([9.0, 1, 2, 3, 4, 5])), psi, jnp.zeros(n1))
    assert along.eps_max == along.eps_min == 0 and along.beta_F == along.beta_f and along.mu_F == along.mu_f
    isotropic = reduced_curvature(quadratic(3 * np.eye(6)), psi, jnp.zeros(n1))
    assert isotropic.gap_max == isotropic.gap_min == 0 and isotropic.beta_bound == isotropic.beta_F == 3


def test_a_repeated_extreme_eigenvalue_is_taken_as_a_space():
    """The graph contains one direction of the top plane: the cosine of the plane is 1, whatever basis comes out."""
    H, Q = rotated([10, 10, 4, 3, 2, 1])
    tangent = np.stack([Q[:, 0] + 0 * Q[:, 1], Q[:, 3], Q[:, 4]], axis=1)
    found = reduced_curvature(quadratic(H), graph_through(tangent), jnp.zeros(3))
    np.testing.assert_allclose([found.eps_max, found.gap_max, found.beta_bound], [0, 6, 10], atol=1e-9)
    np.testing.assert_allclose([found.beta_F, found.mu_F], [10, 2], rtol=1e-9)


def test_small_slope_distorts_less():
    A = jnp.asarray(normal(3, 5))
    distortion = lambda alpha: (
        reduced_curvature(quadratic(np.diag(np.arange(1.0, 9.0))), small_slope(lambda x: A @ x, alpha), jnp.zeros(5)).M
    )
    np.testing.assert_allclose(distortion(0.1) - 1, 1e-2 * (distortion(1.0) - 1), rtol=1e-9)


# ---------------------------------------------------------------------------------------------------- matrix-free route


def large_problem():
    """n1 = 60, n2 = 20: distinct outliers at both ends, a nonlinear Psi with a nonlinear minimiser set."""
    n1, n2 = 60, 20
    H, _ = rotated(np.concatenate([[0.02, 0.05], np.linspace(1, 3, 76), [20, 30]]))
    A, B = jnp.asarray(normal(n2, n1, seed=1) / 5), jnp.asarray(normal(n2, n1, seed=2) / 5)
    psi = lambda x1: {"a": jnp.sin(A @ x1["u"]), "b": (B @ x1["u"])[:1] ** 2}
    quadratic_f = quadratic(np.pad(H, ((0, 1), (0, 1)), constant_values=0) + np.diag([0.0] * 80 + [2.0]))
    f = lambda x1, x2: quadratic_f(x1["u"], jnp.concatenate([x2["a"], x2["b"]])) + jnp.sum(x2["b"])
    return f, psi, {"u": jnp.zeros(n1)}


def test_lanczos_agrees_with_the_dense_solution():
    f, psi, x1 = large_problem()
    dense = reduced_curvature(f, psi, x1)
    free = reduced_curvature(f, psi, x1, num_eigenvalues=4, max_dense=8)
    assert dense.curvature_term > 0.1  # grad_2 f and Hess Psi are not zero at this point
    for name, value in dense._asdict().items():
        assert getattr(free, name) == pytest.approx(value, rel=1e-6, abs=1e-7), name
    assert dense.beta_F <= dense.beta_bound and dense.mu_F >= dense.mu_bound


def test_lanczos_leaves_zeros_out_and_says_when_it_sees_no_gap():
    f = quadratic(np.diag([0.0] * 10 + list(range(1, 51))))
    psi = lambda x: jnp.zeros(30)
    found = reduced_curvature(f, psi, jnp.zeros(30), num_eigenvalues=12, max_dense=4)
    np.testing.assert_allclose([found.mu_f, found.beta_f, found.mu_F, found.beta_F], [1, 50, 1, 20], rtol=1e-8)
    with pytest.raises(ValueError, match="the 3 eigenvalues of Hess f at one end are zero or all the same; raise"):
        reduced_curvature(quadratic(np.eye(60)), psi, jnp.zeros(30), num_eigenvalues=3, max_dense=4)


# ------------------------------------------------------------------------------------------- non-isolated minimisers


def test_varpro_of_an_exact_factorisation():
    """S = {A B^T = M} lies in the graph; its r^2 flat directions are not counted."""
    m, n, r = 5, 4, 2
    A, B = jnp.asarray(normal(m, r)), jnp.asarray(normal(n, r, seed=1))
    M = A @ B.T
    f = lambda A, B: 0.5 * jnp.sum((A @ B.T - M) ** 2)
    psi = lambda A: jnp.linalg.solve(A.T @ A, A.T @ M).T
    found = reduced_curvature(f, psi, A)
    H = np.asarray(jax.hessian(lambda x: f(x[: m * r].reshape(m, r), x[m * r :].reshape(n, r)))(
        jnp.concatenate([A.ravel(), B.ravel()])
    ))  # fmt: skip
    values = np.linalg.eigvalsh(H)
    assert np.sum(np.abs(values) < 1e-9) == r * r
    np.testing.assert_allclose([found.mu_f, found.beta_f], values[[r * r, -1]], rtol=1e-8)
    # Hess F in closed form: the Schur complement (I - A A^+) x B^T B, of rank (m - r) r.
    spectrum = np.linalg.eigvalsh(B.T @ B)
    np.testing.assert_allclose([found.mu_F_euclidean, found.beta_F_euclidean], spectrum[[0, -1]], rtol=1e-8)
    assert found.beta_F <= found.beta_bound * (1 + 1e-9) and found.mu_F >= found.mu_bound * (1 - 1e-9)
    assert found.kappa_F < found.kappa_f and found.curvature_term < 1e-9


def test_a_gauge_that_cuts_the_minimisers_obliquely_can_lower_mu():
    """f = (ab - 1)^2 / 2: the balanced gauge b = a is orthogonal to the hyperbola S, the gauge b = 1 is not."""
    f = lambda a, b: 0.5 * (a * b - 1) ** 2
    balanced = reduced_curvature(f, lambda a: a, jnp.array(1.0))
    np.testing.assert_allclose([balanced.mu_f, balanced.mu_F, balanced.mu_bound], 2, rtol=1e-9)
    fixed = reduced_curvature(f, lambda a: 1 + 0 * a, jnp.array(1.0))
    np.testing.assert_allclose([fixed.mu_f, fixed.mu_F], [2, 1], rtol=1e-9)
    assert math.isnan(fixed.mu_bound)


# ----------------------------------------------------------------------------------------------- warnings and errors


def test_a_graph_that_misses_the_minimisers_warns():
    f = lambda x1, x2: jnp.sum((x1 - 1) ** 2) + jnp.sum(x2**2)
    away, through = (lambda x: x), (lambda x: x - 1)
    with pytest.warns(UserWarning, match=r"does not meet the minimisers of f"):
        found = reduced_curvature(f, away, jnp.full(2, 0.5))
    assert found.value == 1.0  # F's own minimum, above min f = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reduced_curvature(f, away, jnp.full(2, 0.5), minimum=1)
        reduced_curvature(f, away, jnp.full(2, 0.5), minimum=None)
        reduced_curvature(f, through, jnp.ones(2))
        reduced_curvature(f, through, jnp.array([1.0, 3.0]))  # not stationary: F can still fall to 0


def test_bad_input_is_named():
    f = lambda x1, x2: jnp.sum(x1**2) + jnp.sum(x2**2)
    with pytest.raises(ValueError, match="num_eigenvalues must be at least 2, got 1"):
        reduced_curvature(f, lambda x: x, jnp.ones(2), num_eigenvalues=1)
    with pytest.raises(ValueError, match="F\\(x1\\) = nan or its gradient is not finite"):
        reduced_curvature(f, lambda x: jnp.log(x - 2), jnp.ones(2))
    with pytest.raises(ValueError, match="x1 must hold real floating arrays, got int"):
        reduced_curvature(f, lambda x: x, jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="Hess f is zero at x1"):
        reduced_curvature(lambda x1, x2: jnp.sum(x1) + jnp.sum(x2), lambda x: x, jnp.ones(2), minimum=None)
