"""polar(): every method against the SVD in float64, its derivative against finite differences and a Sylvester solve."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.classifiers import polar
from jaxlib_methods.classifiers._polar import GRAM_MIN_COLUMNS, NEWTON_SCHULZ_MAX_CONDITION
from jaxlib_methods.typing import PolarMethod

METHODS = typing.get_args(PolarMethod)


def matrix_with_spectrum(s, d, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    K = len(s)
    Q = np.linalg.qr(rng.standard_normal((d, K)))[0]
    V = np.linalg.qr(rng.standard_normal((K, K)))[0]
    return (Q * np.asarray(s)) @ V.T, Q @ V.T


def frechet_oracle(A, G):
    """dL/dA from the definition, one direction at a time: dU solves P dOmega + dOmega P = U^T dA - dA^T U."""
    d, K = A.shape
    Q, s, Vt = np.linalg.svd(A, full_matrices=False)
    U, P = Q @ Vt, Vt.T @ np.diag(s) @ Vt
    eye = np.eye(K)
    sylvester = np.kron(P, eye) + np.kron(eye, P.T)
    out = np.zeros_like(A)
    for i in range(d):
        for j in range(K):
            dA = np.zeros_like(A)
            dA[i, j] = 1
            skew = U.T @ dA - dA.T @ U
            Omega = np.linalg.solve(sylvester, skew.reshape(-1)).reshape(K, K)
            dU = U @ Omega + (dA - U @ (U.T @ dA)) @ np.linalg.inv(P)
            out[i, j] = np.sum(dU * G)
    return out


@pytest.mark.contract
@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("spectrum", [np.ones(5), np.geomspace(1, 1e-2, 5), [2.0, 2.0, 2.0, 1e-3, 1e-3]])
def test_value_matches_svd_in_float64(method, spectrum, x64):
    A, U = matrix_with_spectrum(spectrum, 9)
    np.testing.assert_allclose(polar(jnp.asarray(A), method=method), U, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [None, 10.0, 1e3])
def test_a_wrong_condition_never_changes_the_answer(method, condition):
    A, U = matrix_with_spectrum(np.geomspace(7, 7 / 200, 6), 8)
    np.testing.assert_allclose(polar(jnp.asarray(A, jnp.float32), method=method, condition=condition), U, atol=3e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method, scale):
    A, U = matrix_with_spectrum([3.0, 2.0, 1.0], 4)
    np.testing.assert_allclose(polar(jnp.asarray(scale * A, jnp.float32), method=method), U, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [4, 6])
def test_gradient_matches_the_sylvester_definition(method, d, x64):
    A, _ = matrix_with_spectrum([2.0, 1.0, 1.0, 0.05], d, seed=1)
    G = np.random.default_rng(2).standard_normal((d, 4))
    dA = jax.vjp(lambda A: polar(A, method=method), jnp.asarray(A))[1](jnp.asarray(G))[0]
    np.testing.assert_allclose(dA, frechet_oracle(A, G), rtol=1e-9, atol=1e-9)


def test_gradient_matches_finite_differences_to_1e_minus_7(x64):
    A, _ = matrix_with_spectrum([2.0, 1.0, 1.0, 0.3], 6)
    rng = np.random.default_rng(3)
    G, D = rng.standard_normal((2, 6, 4))
    loss = lambda A: jnp.sum(polar(A) * G)
    h = 1e-5
    finite = (loss(jnp.asarray(A + h * D)) - loss(jnp.asarray(A - h * D))) / (2 * h)
    exact = jnp.sum(jax.grad(loss)(jnp.asarray(A)) * D)
    assert abs(float(finite - exact)) < 1e-7 * abs(float(exact))


def test_repeated_singular_values_have_a_finite_gradient_where_the_svd_has_none():
    A = jnp.eye(5, 3)
    G = jnp.arange(15.0).reshape(5, 3)

    def by_svd(A):
        Q, _, Vt = jnp.linalg.svd(A, full_matrices=False)
        return jnp.sum(Q @ Vt * G)

    ours = jax.jit(jax.grad(lambda A: jnp.sum(polar(A) * G)))(A)
    np.testing.assert_allclose(ours, frechet_oracle(np.eye(5, 3), np.asarray(G)), atol=1e-5)
    assert not np.isfinite(jax.jit(jax.grad(by_svd))(A)).all()


def test_a_zero_singular_value_gives_the_finite_minimum_norm_gradient(x64):
    A, _ = matrix_with_spectrum([2.0, 1.0, 0.0], 5)
    G = np.random.default_rng(0).standard_normal((5, 3))
    dA = jax.vjp(polar, jnp.asarray(A))[1](jnp.asarray(G))[0]
    assert np.isfinite(dA).all()
    Q, _, Vt = np.linalg.svd(A, full_matrices=False)
    U, v = Q @ Vt, Vt[2]
    # Nothing leaves the column space of U along the null direction: there the derivative is unbounded.
    assert np.abs((np.eye(5) - U @ U.T) @ np.asarray(dA) @ v).max() < 1e-9


def test_float32_gradient_is_stable_at_a_tiny_singular_value():
    """kappa = 1e3 and G without a component along the small direction, as in the ETF head."""
    A, _ = matrix_with_spectrum([1.0, 1.0, 1.0, 1e-3], 8)
    v = np.linalg.svd(A)[2][3]
    G = np.random.default_rng(0).standard_normal((8, 4))
    G -= np.outer(G @ v, v)
    dA = jax.vjp(polar, jnp.asarray(A, jnp.float32))[1](jnp.asarray(G, jnp.float32))[0]
    expected = frechet_oracle(A, G)
    assert np.abs(np.asarray(dA, np.float64) - expected).max() < 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("method", METHODS)
def test_batched_equals_one_by_one(method):
    A = jax.random.normal(jax.random.key(0), (2, 3, 6, 4))
    solve = jax.jit(lambda A: polar(A, method=method))
    batched = solve(A)
    one_by_one = jnp.stack([solve(a) for a in A.reshape(6, 6, 4)]).reshape(A.shape)
    np.testing.assert_allclose(batched, one_by_one, atol=1e-5)
    G = jax.random.normal(jax.random.key(1), A.shape)
    grad = jax.jit(jax.grad(lambda A, G: jnp.sum(polar(A, method=method) * G)))
    grads, one = grad(A, G), grad(A[1, 2], G[1, 2])
    np.testing.assert_allclose(grads[1, 2], one, atol=1e-4)
    mapped = jax.jit(jax.vmap(lambda a: polar(a, method=method)))(A[0])
    np.testing.assert_allclose(mapped, batched[0], atol=1e-5)


def test_wide_matrices_get_orthonormal_rows():
    A = jax.random.normal(jax.random.key(0), (3, 7))
    U = polar(A)
    np.testing.assert_allclose(U @ U.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(U, polar(A.T).T, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_half_precision_is_computed_in_float32_and_keeps_its_type(dtype):
    A = jax.random.normal(jax.random.key(0), (6, 4)).astype(dtype)
    U = polar(A)
    assert U.dtype == dtype
    np.testing.assert_array_equal(U, polar(A.astype(jnp.float32)).astype(dtype))
    assert jax.grad(lambda A: jnp.sum(polar(A)).astype(jnp.float32))(A).dtype == dtype


def test_newton_schulz_is_made_of_matrix_products_and_stretching_saves_steps():
    A, _ = matrix_with_spectrum(np.geomspace(1, 1 / 200, 6), 8)
    text = jax.jit(lambda A: polar(A, method="newton_schulz")).lower(jnp.asarray(A, jnp.float32)).as_text()
    assert "custom_call" not in text

    def steps(stretched):  # the smallest singular value alone decides
        from jaxlib_methods.classifiers._polar import _scalings

        x, n = 1 / 200, 0
        scalings = _scalings(200.0) if stretched else []
        while abs(x * x - 1) > 1e-7:
            a = scalings[n] if n < len(scalings) else 1.0
            x, n = 1.5 * a * x - 0.5 * (a * x) ** 3, n + 1
        return n

    assert steps(True) <= 11 < 17 <= steps(False)


@pytest.mark.parametrize(
    ("columns", "condition", "iterates_on_cpu"),
    [
        (GRAM_MIN_COLUMNS, NEWTON_SCHULZ_MAX_CONDITION, True),
        (GRAM_MIN_COLUMNS - 1, NEWTON_SCHULZ_MAX_CONDITION, False),
        (GRAM_MIN_COLUMNS, 2 * NEWTON_SCHULZ_MAX_CONDITION, False),
        (GRAM_MIN_COLUMNS, None, False),
    ],
)
def test_method_none_chooses_by_platform_size_and_conditioning(columns, condition, iterates_on_cpu):
    traced = jax.jit(lambda A: polar(A, condition=condition)).trace(jnp.ones((64, columns)))
    cpu, tpu = (traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu"))
    assert ("stablehlo.while" in cpu) == iterates_on_cpu
    assert "gesdd" in cpu  # the method, or what stands by should the iteration not converge
    assert "stablehlo.while" in tpu and "gesdd" not in tpu


EIGENSOLVER_ERROR = 40  # eps ||A||: what LAPACK's bound p(K) eps ||A|| lets an eigensolver for K = 40 be away


def eigh_of_another_machine(eigh):
    """The exact eigenvectors of A + E, ||E|| = p eps ||A||, where a small E turns the basis most: in the lower half."""

    def perturbed(A, *, symmetrize_input=True):
        w, V = eigh(A, symmetrize_input=symmetrize_input)
        small = jnp.where(w < w[-1] / 4, V, 0)
        E = jnp.asarray(np.random.default_rng(7).standard_normal(A.shape), A.dtype)
        E = small @ (small.T @ (E + E.T) @ small) @ small.T
        size = EIGENSOLVER_ERROR * jnp.finfo(A.dtype).eps * w[-1]
        E = E * size / jnp.maximum(jnp.linalg.norm(E), 1e-30)
        return eigh(A + jnp.where(w[0] > 2 * size, E, 0), symmetrize_input=symmetrize_input)

    return perturbed


@pytest.mark.parametrize("eigensolver", ["this machine's", "another machine's"])
@pytest.mark.parametrize(
    "small",
    [[1 / 200], [1 / 150, 1 / 200], [1 / 198, 1 / 199, 1 / 200], np.geomspace(1 / 20, 1 / 200, 12)],
    ids=["as in the ETF head", "two near another", "three nearer", "many"],
)
def test_gram_recovers_what_squaring_the_condition_number_lost(small, eigensolver, monkeypatch):
    """U and its derivative, to the conditioning of both: kappa eps for a backward stable algorithm, times ten."""
    A, U = matrix_with_spectrum(np.r_[np.ones(40 - len(small)), small], 50)
    G = np.random.default_rng(2).standard_normal((50, 40))

    def both(method, dtype):
        solve = lambda A: polar(A, method=method)
        return jax.jit(lambda A, G: (solve(A), jax.vjp(solve, A)[1](G)[0]))(
            jnp.asarray(A, dtype), jnp.asarray(G, dtype)
        )

    with jax.enable_x64(True):
        exact = [np.asarray(x) for x in both("svd", jnp.float64)]
    np.testing.assert_allclose(exact[0], U, atol=1e-12)
    if eigensolver == "another machine's":
        monkeypatch.setattr(jnp.linalg, "eigh", eigh_of_another_machine(jnp.linalg.eigh))
    kappa_eps = 200 * float(jnp.finfo(jnp.float32).eps)
    for got, reference in zip(both("gram", jnp.float32), exact, strict=True):
        error = np.abs(np.asarray(got, np.float64) - reference).max()
        assert error < 10 * kappa_eps * np.abs(reference).max()


def test_an_iteration_that_does_not_converge_gives_way_to_the_svd():
    A = np.diag(np.r_[np.ones(35), 0.0]).astype(np.float32)  # rank deficient, whatever the caller believes
    U = polar(jnp.asarray(A), condition=10.0)
    np.testing.assert_allclose(U.T @ U, np.eye(36), atol=1e-5)
    for method in ("newton_schulz", "gram"):
        assert jnp.abs(polar(jnp.asarray(A), condition=10.0, method=method)[35, 35]) < 1e-3
    gradient = jax.jit(jax.grad(lambda A: jnp.sum(polar(A, condition=10.0))))(jnp.asarray(A))
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("condition", [None, 300.0])
def test_many_columns_match_the_svd(condition, x64):
    A, U = matrix_with_spectrum(np.geomspace(1, 1 / 200, 40), 50)
    np.testing.assert_allclose(polar(jnp.asarray(A), condition=condition), U, atol=1e-11)
    G = jnp.asarray(np.random.default_rng(0).standard_normal((50, 40)))
    grads = [jax.vjp(lambda A: polar(A, method=m, condition=condition), jnp.asarray(A))[1](G)[0] for m in (None, "svd")]
    np.testing.assert_allclose(*grads, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((jnp.ones(3),), {}, "real matrix"),
        ((jnp.ones((3, 3), jnp.int32),), {}, "int32"),
        ((jnp.ones((3, 3)),), {"method": "sdv"}, "'sdv'"),
        ((jnp.ones((3, 3)),), {"condition": 0.5}, "0.5"),
    ],
)
def test_errors_name_the_argument(args, kwargs, words):
    with pytest.raises(ValueError, match=words):
        polar(*args, **kwargs)
