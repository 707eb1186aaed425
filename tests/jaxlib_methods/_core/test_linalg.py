"""The shared factors against numpy, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods._core import linalg


@pytest.mark.contract
@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 4, 6), (5, 5)])
def test_haar_matrices_are_orthonormal_along_the_shorter_side(shape, key):
    W = np.asarray(linalg.haar(key, shape), np.float64)
    gram = W @ W.swapaxes(-1, -2) if shape[-2] < shape[-1] else W.swapaxes(-1, -2) @ W
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(min(shape[-2:])), gram.shape), atol=1e-5)


def test_haar_matrices_are_uniform_also_where_the_signs_of_qr_are_not(key):
    # QR alone fixes the sign of R's diagonal by convention: its Q has entries of one sign more often than the other.
    # Here the mean of 4000 entries of variance 1/3 has standard deviation 1 / sqrt(12000) = 0.0091.
    W = linalg.haar(key, (4000, 3, 3))
    assert np.abs(np.asarray(W.mean(0))).max() < 5 * 0.0092
    assert abs(float(jnp.mean(jnp.linalg.det(W)))) < 5 / np.sqrt(4000)


def test_orthonormal_columns_span_the_same_and_r_has_a_positive_diagonal(x64):
    A = np.random.default_rng(0).standard_normal((2, 5, 3))
    Q = np.asarray(linalg.orthonormal(jnp.asarray(A)))
    R = Q.swapaxes(-1, -2) @ A
    np.testing.assert_allclose(Q @ R, A, atol=1e-13)
    assert np.all(np.diagonal(R, axis1=-2, axis2=-1) > 0)


def test_a_newton_schulz_step_acts_on_the_singular_values(x64):
    rng = np.random.default_rng(1)
    U, s, Vt = np.linalg.svd(rng.standard_normal((5, 3)), full_matrices=False)
    X = jnp.asarray(U * s @ Vt)
    for coefficients in ((1.5, -0.5), (3.0, -4.0, 2.0)):
        a, b, c = (*coefficients, 0.0)[:3]
        expected = U * (a * s + b * s**3 + c * s**5) @ Vt
        np.testing.assert_allclose(
            linalg.newton_schulz_step(X, X.T @ X, coefficients), expected, atol=1e-12 * s[0] ** 5
        )
    assert jax.eval_shape(lambda X: linalg.newton_schulz_step(X, X.T @ X, (1.5, -0.5)), X).shape == X.shape
