"""Low-rank features against their closed forms: the trailing eigenvalues, the gradient outside of the subspace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import low_rank


def features(n=200, m=6):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, m)) @ np.diag([3.0, 2.0, 1.0, 0.7, 0.5, 0.3]) @ rng.normal(size=(m, m)) + 1.0


def principal(a, rank):
    """The projector on the principal directions, the eigenvalues in ascending order, and minus the mean."""
    values, vectors = np.linalg.eigh(np.cov(a, rowvar=False, bias=True))
    return vectors[:, -rank:] @ vectors[:, -rank:].T, values, -a.mean(0)


@pytest.mark.contract
def test_the_least_loss_of_a_rank_is_the_sum_of_the_trailing_eigenvalues():
    with jax.enable_x64(True):
        a = jnp.asarray(features())
        for rank in (1, 3, 5):
            W, values, b = principal(np.asarray(a), rank)
            least = low_rank.low_rank_penalty(a, jnp.asarray(W), jnp.asarray(b)).projection.mean()
            np.testing.assert_allclose(least, values[:-rank].sum(), rtol=1e-11)
            other = low_rank.project_rank(jnp.asarray(W + 0.1 * np.random.default_rng(rank).normal(size=W.shape)), rank)
            assert low_rank.low_rank_penalty(a, other, jnp.asarray(b)).projection.mean() > least


def test_it_is_the_formula_written_slowly():
    rng = np.random.default_rng(1)
    a, W, b = features(5).astype(np.float32), rng.normal(size=(6, 6)).astype(np.float32), np.ones(6, np.float32)
    found = jax.jit(low_rank.low_rank_penalty)(a, W, b)
    for i in range(5):
        shifted = a[i].astype(np.float64) + b
        expected = sum((W[:, j].astype(np.float64) @ shifted - shifted[j]) ** 2 for j in range(6))
        np.testing.assert_allclose(found.projection[i], expected, rtol=1e-4)
        np.testing.assert_allclose(found.norm[i], abs(1 - np.linalg.norm(a[i].astype(np.float64))), rtol=1e-4)


def test_the_gradient_has_no_part_inside_the_subspace_and_none_at_zero():
    with jax.enable_x64(True):
        a = jnp.asarray(features(20))
        W, _, b = map(jnp.asarray, principal(np.asarray(a), 2))
        gradient = jax.grad(lambda a: low_rank.low_rank_penalty(a, W, b).projection.sum())(a)
        np.testing.assert_allclose(gradient, 2 * (a + b[None]) @ (jnp.eye(6) - W), atol=1e-10)
        np.testing.assert_allclose(gradient @ W, jnp.zeros((20, 6)), atol=1e-10)
    norm = jax.grad(lambda a: low_rank.low_rank_penalty(a, jnp.eye(2), jnp.zeros(2)).norm)
    np.testing.assert_array_equal(norm(jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_allclose(jnp.linalg.norm(norm(jnp.array([3.0, 4.0]))), 1.0, rtol=1e-6)


def test_the_projection_is_the_best_of_its_rank():
    W = np.random.default_rng(2).normal(size=(7, 4)).astype(np.float32)
    singular = np.linalg.svd(W.astype(np.float64), compute_uv=False)
    for rank in (1, 2, 4, 9):
        found = low_rank.project_rank(jnp.asarray(W), rank)
        assert np.linalg.matrix_rank(found, tol=1e-4) == min(rank, 4)
        np.testing.assert_allclose(np.linalg.norm(found - W), np.sqrt((singular[rank:] ** 2).sum()), atol=1e-5)


def test_parameters_are_projected_every_few_updates_and_the_others_are_left_alone():
    params = {"W": jnp.eye(4), "b": jnp.zeros(4)}
    mask = {"W": True, "b": False}
    tx = optax.chain(optax.sgd(0.1), optax.masked(low_rank.keep_rank(2, every=3), mask))
    state, ranks = tx.init(params), []
    update = jax.jit(tx.update)
    for step in range(7):
        gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(step), p.shape), params)
        updates, state = update(gradients, state, params)
        plain = jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, params, gradients)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["b"], plain["b"], rtol=1e-6)
        expected = low_rank.project_rank(plain["W"], 2) if step % 3 == 0 else plain["W"]
        np.testing.assert_allclose(params["W"], expected, atol=1e-5)
        ranks.append(int(np.linalg.matrix_rank(params["W"], tol=1e-4)))
    assert ranks == [2, 4, 4, 2, 4, 4, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: low_rank.low_rank_penalty(jnp.ones((3, 4)), jnp.eye(3), jnp.ones(4)), r"W must be \[4, 4\]"),
        (lambda: low_rank.project_rank(jnp.eye(2), 0), "rank must be at least 1, got 0"),
        (lambda: low_rank.keep_rank(1, every=0), "every must be at least 1, got 0"),
        (lambda: low_rank.keep_rank(1).update(jnp.eye(2), low_rank.keep_rank(1).init(jnp.eye(2))), "needs the param"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
