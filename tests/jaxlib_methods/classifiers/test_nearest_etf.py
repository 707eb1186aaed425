"""The nearest simplex ETF: worked examples of the spec, symmetries, optimality, and the authors' route as oracle."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.classifiers import etf_weights, nearest_etf, nearest_etf_objective, simplex_etf
from jaxlib_methods.classifiers._nearest_etf import first_prox
from jaxlib_methods.classifiers.simplex import centering_matrix, distance_to_nearest_etf, helmert_basis
from jaxlib_methods.typing import PolarMethod

DELTA = 1e-3


def stiefel(seed, d, K):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, K)))[0]


def problem(seed, d, K):
    """Y with unit norm, U_prox near the solution as in training, and a cotangent G."""
    rng = np.random.default_rng(seed)
    Y = rng.standard_normal((d, K))
    return Y / np.linalg.norm(Y), stiefel(seed + 1, d, K), rng.standard_normal((d, K))


def dense_declarative_vjp(U, Y, U_prox, G, delta=DELTA):
    """dL/dY by the official route (a): implicit function theorem with all K(K+1)/2 constraints, everything dense."""
    d, K = U.shape
    M = np.eye(K) - 1 / K
    fY = 2 / (K - 1) * U @ M - 2 / np.sqrt(K - 1) * Y @ M + delta * (U - U_prox)
    Sigma = fY.T @ U
    block = 2 / (K - 1) * M + delta * np.eye(K) - (Sigma + Sigma.T) / 2
    H = np.kron(np.eye(d), block)  # row-major vec of d x K
    rows = []
    for i in range(K):
        for j in range(i, K):
            J = np.zeros((d, K))
            J[:, i] += U[:, j]
            J[:, j] += U[:, i]
            rows.append(J.reshape(-1))
    A = np.stack(rows)
    v = G.reshape(-1)
    w = -np.linalg.solve(H, v)
    t = np.linalg.solve(H, A.T)
    s = -np.linalg.solve(A @ t, A @ w)
    return -2 / np.sqrt(K - 1) * (w + t @ s).reshape(d, K) @ M


def vjp(Y, U_prox, G, **kwargs):
    @jax.jit
    def pull(Y, U_prox, G):
        return jax.vjp(lambda Y: nearest_etf(Y, U_prox, **{"normalize": False, **kwargs}), Y)[1](G)[0]

    return pull(jnp.asarray(Y), jnp.asarray(U_prox), jnp.asarray(G))


# Geometry


@pytest.mark.parametrize(("K", "d"), [(2, 1), (2, 2), (3, 2), (5, 4), (5, 5), (10, 64)])
@pytest.mark.parametrize("rotated", [False, True])
def test_etf_rows_are_unit_equiangular_and_sum_to_zero(K, d, rotated):
    W = simplex_etf(K, d, key=jax.random.key(3) if rotated else None)
    expected = K / (K - 1) * centering_matrix(K)
    np.testing.assert_allclose(W @ W.T, expected, atol=1e-6)
    np.testing.assert_allclose(W.sum(0), 0, atol=1e-6)


def test_canonical_etf_is_the_centred_identity():
    np.testing.assert_allclose(simplex_etf(3, 4), np.sqrt(1.5) * np.eye(3, 4) - np.sqrt(1.5) / 3 * np.eye(4)[:3].sum(0))


@pytest.mark.parametrize("K", [2, 3, 10])
def test_helmert_basis_is_orthonormal_and_spans_the_sum_zero_vectors(K, x64):
    H = helmert_basis(K, jnp.float64)
    np.testing.assert_allclose(H.T @ H, np.eye(K - 1), atol=1e-14)
    np.testing.assert_allclose(H @ H.T, centering_matrix(K, jnp.float64), atol=1e-14)


@pytest.mark.parametrize(("K", "d"), [(4, 3), (4, 4), (4, 7)])
def test_distance_to_nearest_etf_is_the_minimum_that_the_solver_reaches(K, d, x64):
    Y, _, _ = problem(0, d, K)
    distance = distance_to_nearest_etf(jnp.asarray(5 * Y))
    U = nearest_etf(jnp.asarray(Y), proximal_weight=1e-9)
    reached = nearest_etf_objective(U, jnp.asarray(Y), U, proximal_weight=1e-9)
    np.testing.assert_allclose(distance, reached, atol=1e-8)
    for seed in range(4):
        random = simplex_etf(K, d, key=jax.random.key(seed), dtype=jnp.float64).T / np.sqrt(K)
        assert float(jnp.sum((Y - random) ** 2)) >= float(distance)
    np.testing.assert_allclose(distance_to_nearest_etf(random), 0, atol=1e-12)


# The worked examples


def test_two_classes_in_the_plane_rotate_by_44_95951_degrees(x64):
    Y = np.array([[1.0, -1.0], [0.0, 0.0]]) / np.sqrt(2)
    U = nearest_etf(jnp.asarray(Y), jnp.eye(2, dtype=jnp.float64), proximal_weight=DELTA)
    angle = np.degrees(np.arctan2(U[1, 0], U[0, 0]))
    np.testing.assert_allclose(angle, np.degrees(np.arctan2(np.sqrt(2), np.sqrt(2) + 2 * DELTA)), rtol=1e-12)
    assert round(angle, 5) == 44.95951
    np.testing.assert_allclose(jnp.linalg.det(U), 1, rtol=1e-12)
    A = 2 * Y @ (np.eye(2) - 0.5) + DELTA * np.eye(2)
    np.testing.assert_allclose(np.linalg.svd(A)[1], [2.000707, 7.0736e-4], rtol=1e-5)


def test_worked_two_by_two_gradient(x64):
    """Square U: dL/dY from the angle alone. theta(Y) solves the plane's Procrustes problem."""
    Y = np.array([[1.0, -1.0], [0.0, 0.0]]) / np.sqrt(2)
    M = np.eye(2) - 0.5

    def angle(Y):
        A = 2 * Y @ M + DELTA * jnp.eye(2)
        return jnp.arctan2(A[1, 0] - A[0, 1], A[0, 0] + A[1, 1])

    expected = jax.grad(lambda Y: jnp.cos(angle(Y)) + 2 * jnp.sin(angle(Y)))(jnp.asarray(Y))
    G = np.array([[1.0, 0.0], [2.0, 0.0]])  # L = U[0, 0] + 2 U[1, 0]
    np.testing.assert_allclose(vjp(Y, np.eye(2), G), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.contract
@pytest.mark.parametrize("method", typing.get_args(PolarMethod))
def test_worked_three_by_three_solution_objective_and_gradient(method, x64):
    Y = np.diag([3.0, 2.0, 1.0]) @ (np.eye(3) - 1 / 3)
    Y /= np.linalg.norm(Y)
    eye = jnp.eye(3, dtype=jnp.float64)
    U = nearest_etf(jnp.asarray(Y), eye, proximal_weight=DELTA, method=method)
    expected = [[0.940889, -0.133691, -0.311213], [0.048333, 0.962400, -0.267302], [0.335248, 0.236460, 0.911974]]
    np.testing.assert_allclose(U, expected, atol=6e-7)
    np.testing.assert_allclose(
        nearest_etf_objective(U, jnp.asarray(Y), eye, proximal_weight=DELTA), 0.068334, atol=6e-7
    )
    G = np.zeros((3, 3))
    G[0, 1] = 1
    dY = [[-0.233419, 0.502332, -0.268912], [-0.643919, 0.276560, 0.367359], [-0.330066, 0.183727, 0.146338]]
    np.testing.assert_allclose(vjp(Y, eye, G, proximal_weight=DELTA, method=method), dY, atol=6e-7)


@pytest.mark.parametrize(("K", "d"), [(3, 3), (5, 9), (10, 16)])
def test_fixed_point_and_its_gradient(K, d, x64):
    U0, M = stiefel(0, d, K), np.eye(K) - 1 / K
    Y = U0 @ M / np.sqrt(K - 1)
    U = nearest_etf(jnp.asarray(Y), jnp.asarray(U0), proximal_weight=DELTA)
    np.testing.assert_allclose(U, U0, atol=1e-12)
    np.testing.assert_allclose(nearest_etf_objective(U, jnp.asarray(Y), jnp.asarray(U0)), 0, atol=1e-12)
    lam = 2 / (K - 1) + DELTA
    s = np.linalg.svd(2 / np.sqrt(K - 1) * Y @ M + DELTA * U0, compute_uv=False)
    np.testing.assert_allclose(s, [lam] * (K - 1) + [DELTA], rtol=1e-9)

    G = np.random.default_rng(1).standard_normal((d, K)) @ M
    Z, q = U0.T @ G, np.ones((K, 1)) / np.sqrt(K)
    inside = (M @ Z @ M - M @ Z.T @ M) / (2 * lam) + q @ q.T @ Z / (lam + DELTA)
    expected = 2 / np.sqrt(K - 1) * (U0 @ inside + (G - U0 @ Z) / lam)
    np.testing.assert_allclose(vjp(Y, U0, G, proximal_weight=DELTA), expected, rtol=1e-8, atol=1e-9)


# Symmetries and optimality


@pytest.mark.parametrize(("K", "d"), [(4, 3), (4, 6)])
def test_rotating_the_means_rotates_the_frame_and_permuting_classes_permutes_it(K, d, x64):
    Y, U_prox, _ = problem(3, d, K) if d >= K else (*problem(3, d, K)[:1], stiefel(4, K, d).T, None)
    R = stiefel(5, d, d)
    U = nearest_etf(jnp.asarray(Y), jnp.asarray(U_prox))
    rotated = nearest_etf(jnp.asarray(R @ Y), jnp.asarray(R @ U_prox))
    np.testing.assert_allclose(rotated, R @ np.asarray(U), atol=1e-10)
    p = np.array([2, 0, 3, 1])
    permuted = nearest_etf(jnp.asarray(Y[:, p]), jnp.asarray(U_prox[:, p]))
    np.testing.assert_allclose(permuted, np.asarray(U)[:, p], atol=1e-10)


def test_optimality_stationary_symmetric_and_no_feasible_point_is_better(x64):
    Y, U_prox, _ = problem(0, 7, 4)
    M = np.eye(4) - 1 / 4
    U = np.asarray(nearest_etf(jnp.asarray(Y), jnp.asarray(U_prox)))
    H = U.T @ (2 / np.sqrt(3) * Y @ M + DELTA * U_prox)
    np.testing.assert_allclose(H, H.T, atol=1e-12)
    assert np.linalg.eigvalsh((H + H.T) / 2).min() > 0
    value = lambda U: float(nearest_etf_objective(jnp.asarray(U), jnp.asarray(Y), jnp.asarray(U_prox)))
    best = value(U)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.3):
        for _ in range(10):
            perturbed = np.linalg.svd(U + size * rng.standard_normal(U.shape), full_matrices=False)
            assert value(perturbed[0] @ perturbed[2]) > best


@pytest.mark.parametrize(("K", "d"), [(3, 2), (4, 4), (4, 7)])
@pytest.mark.parametrize("normalize", [False, True])
def test_vjp_matches_finite_differences_to_1e_minus_7(K, d, normalize, x64):
    Y, _, G = problem(11, d, K)
    U_prox = np.asarray(nearest_etf(jnp.asarray(Y), proximal_weight=1e-2))
    G = G @ (np.eye(K) - 1 / K)
    D = np.random.default_rng(0).standard_normal((d, K))
    loss = jax.jit(
        lambda Y: jnp.sum(nearest_etf(Y, jnp.asarray(U_prox), proximal_weight=DELTA, normalize=normalize) * G)
    )
    h = 1e-5
    # Fourth order: the scale h that beats round-off is too coarse for the second-order quotient.
    f = lambda k: float(loss(jnp.asarray(Y + k * h * D)))
    finite = (8 * (f(1) - f(-1)) - (f(2) - f(-2))) / (12 * h)
    exact = float(jnp.sum(jax.grad(loss)(jnp.asarray(Y)) * D))
    assert abs(finite - exact) < 1e-7 * max(abs(exact), 1.0)


@pytest.mark.parametrize(("K", "d"), [(3, 3), (4, 6), (6, 6)])
def test_cheap_gradient_equals_the_dense_declarative_one(K, d, x64):
    Y, U_prox, G = problem(7, d, K)
    U = np.asarray(nearest_etf(jnp.asarray(Y), jnp.asarray(U_prox), proximal_weight=DELTA))
    dense = dense_declarative_vjp(U, Y, U_prox, G)
    np.testing.assert_allclose(
        vjp(Y, U_prox, G, proximal_weight=DELTA), dense, rtol=1e-7, atol=1e-8 * np.abs(dense).max()
    )


# The authors' route


@pytest.mark.parametrize(("K", "d"), [(4, 6), (10, 16)])
def test_agrees_with_the_riemannian_trust_region_solver(K, d):
    enabled = jax.config.jax_enable_x64
    pymanopt = pytest.importorskip("pymanopt", reason="pymanopt (test extra) is the trust-region oracle")
    jax.config.update("jax_enable_x64", enabled)  # importing pymanopt switches the whole process to float64
    Y, U_prox, _ = problem(0, d, K)
    M = np.eye(K) - 1 / K
    manifold = pymanopt.manifolds.Stiefel(d, K)

    @pymanopt.function.numpy(manifold)
    def cost(U):
        return np.sum((Y - U @ M / np.sqrt(K - 1)) ** 2) + DELTA / 2 * np.sum((U - U_prox) ** 2)

    @pymanopt.function.numpy(manifold)
    def gradient(U):
        return 2 / (K - 1) * U @ M - 2 / np.sqrt(K - 1) * Y @ M + DELTA * (U - U_prox)

    @pymanopt.function.numpy(manifold)
    def hessian(U, V):
        return 2 / (K - 1) * V @ M + DELTA * V

    optimizer = pymanopt.optimizers.TrustRegions(
        max_iterations=300, min_gradient_norm=1e-10, kappa=0.1, theta=1, rho_prime=0.1, verbosity=0
    )
    solved = optimizer.run(
        pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian),
        initial_point=U_prox,
        Delta_bar=np.sqrt(K),
        Delta0=np.sqrt(K) / 8,
    )
    with jax.enable_x64(True):
        U = np.asarray(nearest_etf(jnp.asarray(Y), jnp.asarray(U_prox), proximal_weight=DELTA))
    assert cost(U) <= solved.cost + 1e-12
    np.testing.assert_allclose(U, solved.point, atol=1e-5)


# Interface


def test_first_step_completes_the_free_direction_and_ignores_the_scale_of_the_means():
    Z = jax.random.normal(jax.random.key(0), (6, 4))
    solve = jax.jit(nearest_etf)
    U = solve(Z)
    np.testing.assert_allclose(U.T @ U, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(solve(100 * Z), U, atol=1e-4)
    collapsed = solve(jnp.zeros((6, 4)))
    np.testing.assert_allclose(collapsed.T @ collapsed, np.eye(4), atol=1e-5)


@pytest.mark.parametrize(("K", "d"), [(4, 6), (4, 4)])
def test_first_proximal_point_is_the_limit_of_a_vanishing_delta(K, d, x64):
    Y = problem(2, d, K)[0]
    A = 2 / np.sqrt(K - 1) * Y @ (np.eye(K) - 1 / K) + 1e-6 * np.eye(d, K)
    Q, _, Vt = np.linalg.svd(A, full_matrices=False)
    np.testing.assert_allclose(first_prox(jnp.asarray(Y)), Q @ Vt, atol=1e-4)
    held = np.eye(d, K) @ centering_matrix(K, jnp.float64) + np.eye(d, K).sum(1, keepdims=True) @ np.eye(K)[:1]
    U = first_prox(jnp.asarray(held))  # eye q lies in the span of the means
    np.testing.assert_allclose(U.T @ U, np.eye(K), atol=1e-10)


@pytest.mark.parametrize(("K", "d"), [(8, 32), (40, 160), (160, 160), (20, 2000)])
def test_memory_of_both_passes_is_of_the_order_of_the_means_and_a_square_of_classes(K, d):
    Z = jax.ShapeDtypeStruct((d, K), jnp.float32)

    @jax.jit
    def both(Z, prox, G):
        U, vjp = jax.vjp(lambda Z: nearest_etf(Z, prox), Z)
        return U, vjp(G)[0]

    m = both.lower(Z, Z, Z).compile().memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    assert peak < 14 * 4 * (d * K + K * K)  # the dense backward has a Jacobian of 4 d K^2 (K + 1) / 2 bytes


def test_gradient_does_not_reach_the_proximal_point():
    Y, U_prox, _ = problem(0, 5, 3)
    Y, U_prox = jnp.asarray(Y, jnp.float32), jnp.asarray(U_prox, jnp.float32)
    assert not jax.jit(jax.grad(lambda P: jnp.sum(nearest_etf(Y, P) ** 3)))(U_prox).any()
    at_zero = jax.jit(jax.grad(lambda Y: jnp.sum(nearest_etf(Y) ** 3)))(jnp.zeros_like(Y))
    assert jnp.isfinite(at_zero).all()


def test_bfloat16_means_are_solved_in_float32():
    Z = jax.random.normal(jax.random.key(0), (12, 4), jnp.bfloat16)
    U = nearest_etf(Z, jnp.eye(12, 4, dtype=jnp.bfloat16))
    assert U.dtype == jnp.bfloat16
    exact = nearest_etf(Z.astype(jnp.float32), jnp.eye(12, 4))
    np.testing.assert_array_equal(U, exact.astype(jnp.bfloat16))


def test_one_dimension_less_than_classes_uses_the_helmert_basis():
    Z = jax.random.normal(jax.random.key(1), (3, 4))
    U = nearest_etf(Z, method="svd")
    W = etf_weights(U)
    np.testing.assert_allclose(W @ W.T, 4 / 3 * centering_matrix(4), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: nearest_etf(jnp.ones((2, 5))), "num_features=2"),
        (lambda: nearest_etf(jnp.ones((5, 1))), "at least 2, got 1"),
        (lambda: nearest_etf(jnp.ones((5, 3)), proximal_weight=0.0), "proximal_weight must be positive, got 0.0"),
        (lambda: nearest_etf(jnp.ones((5, 3)), jnp.ones((3, 5))), r"\(3, 5\) and \(5, 3\)"),
        (lambda: nearest_etf(jnp.ones((5, 3), jnp.int32)), "int32"),
        (lambda: simplex_etf(5, 3), "spans 4 dimensions"),
        (lambda: distance_to_nearest_etf(jnp.ones((3, 5))), "num_features=3"),
    ],
)
def test_errors_name_the_argument_and_its_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()
