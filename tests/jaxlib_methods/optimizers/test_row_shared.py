"""AdamW with one second moment a row: it stays in the subspace where Adam leaves it, and is AdamW on coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import optimizers


@pytest.mark.contract
def test_adam_leaves_the_subspace_and_a_shared_second_moment_does_not():
    U = np.array([0.6, 0.8])
    m = jnp.array([[0.6, 0.8]])  # with b1 = b2 = 0 the moments are the gradient and its square
    with jax.numpy_dtype_promotion("standard"):
        elementwise, _ = optax.scale_by_adam(0.0, 0.0, 0.0).update(m, optax.scale_by_adam(0.0, 0.0, 0.0).init(m))
    np.testing.assert_allclose(elementwise, [[1.0, 1.0]], rtol=1e-6)
    residual = np.asarray(elementwise[0]) - U * (U @ np.asarray(elementwise[0]))
    np.testing.assert_allclose(residual, [0.16, -0.12], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(residual), 0.2, atol=1e-6)

    rule = optimizers.row_shared.scale_by_row_shared_adam(0.0, 0.0, 0.0)
    shared, state = rule.update(m, rule.init(m))
    np.testing.assert_allclose(state.r, [[0.5]])
    np.testing.assert_allclose(shared, [[0.848528, 1.131371]], atol=1e-6)
    np.testing.assert_allclose(shared[0, 0] * U[1], shared[0, 1] * U[0], rtol=1e-6)


def numpy_row_shared_adamw(W, gradients, eta, b1, b2, eps, decay, row_size):
    m, r = np.zeros_like(W), np.zeros((len(W), 1))
    for t, G in enumerate(gradients, start=1):
        for i in range(len(W)):
            m[i] = b1 * m[i] + (1 - b1) * G[i]
            r[i] = b2 * r[i] + (1 - b2) * (G[i] @ G[i]) / row_size
            step = (m[i] / (1 - b1**t)) / (np.sqrt(r[i] / (1 - b2**t)) + eps)
            W[i] = (1 - eta * decay) * W[i] - eta * step
    return W


def run(optimizer, gradient, W, gradients):
    """A step of `gradient(W, G)` for each G."""

    def step(carry, G):
        W, state = carry
        updates, state = optimizer.update(gradient(W, G), state, W)
        return (W + updates, state), None

    return jax.jit(lambda W: jax.lax.scan(step, (W, optimizer.init(W)), gradients)[0][0])(W)


@pytest.mark.parametrize("row_size", [None, 12])
def test_against_a_loop_over_rows(x64, row_size):
    rng = np.random.default_rng(0)
    W, gradients = rng.normal(size=(4, 6)), rng.normal(size=(5, 4, 6)) * np.arange(1, 5)[:, None]
    optimizer = optimizers.row_shared_adamw(0.1, 0.9, 0.99, 1e-3, weight_decay=0.1, row_size=row_size)
    expected = numpy_row_shared_adamw(W.copy(), gradients, 0.1, 0.9, 0.99, 1e-3, 0.1, row_size or 6)
    np.testing.assert_allclose(
        run(optimizer, lambda W, G: G, jnp.asarray(W), jnp.asarray(gradients)), expected, rtol=1e-12
    )


def test_weights_with_projected_gradients_equal_their_coordinates(x64):
    """(a) on W is AdamW on Z with the mean over d and not over k, to 1e-15."""
    rng = np.random.default_rng(1)
    d, k, f = 12, 3, 5
    U = jnp.asarray(np.linalg.qr(rng.normal(size=(d, k)))[0])
    Z, target = jnp.asarray(rng.normal(size=(f, k))), jnp.asarray(rng.normal(size=(f, d)))
    G_W = jax.grad(lambda W: jnp.sum(jnp.cos(W - target)))
    G_Z = jax.grad(lambda Z: jnp.sum(jnp.cos(Z @ U.T - target)))
    adamw = lambda **options: optimizers.row_shared_adamw(0.05, weight_decay=0.1, **options)
    of_W = run(
        optax.chain(optimizers.row_shared.project_rows(U, True), adamw()), lambda W, _: G_W(W), Z @ U.T, jnp.arange(20)
    )
    of_Z = run(adamw(row_size=d), lambda Z, _: G_Z(Z), Z, jnp.arange(20))
    np.testing.assert_allclose(of_W, of_Z @ U.T, atol=1e-14)
    divided_by_k = run(adamw(), lambda Z, _: G_Z(Z), Z, jnp.arange(20))
    assert float(jnp.max(jnp.abs(divided_by_k - of_Z))) > 0.01


def test_leaves_that_do_not_share_get_adam():
    params = {"kernel": jnp.ones((2, 3)), "embed": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    gradients = jax.tree.map(lambda p: jnp.arange(1.0, p.size + 1).reshape(p.shape), params)
    rule = optimizers.row_shared.scale_by_row_shared_adam(shared={"kernel": True, "embed": False, "bias": False})
    updates, state = rule.update(gradients, rule.init(params))
    with jax.numpy_dtype_promotion("standard"):
        adam, _ = optax.scale_by_adam().update(gradients, optax.scale_by_adam().init(params))
    for name in ("embed", "bias"):
        np.testing.assert_allclose(updates[name], adam[name], rtol=1e-5)
    assert float(jnp.max(jnp.abs(updates["kernel"] - adam["kernel"]))) > 0.1
    assert jax.tree.map(jnp.shape, state.r) == {"kernel": (2, 1), "embed": (4, 3), "bias": (3,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"b1": 1.0}, "b1"), ({"b2": -0.1}, "b2"), ({"eps": -1.0}, "eps"), ({"row_size": 0}, "row_size")],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        optimizers.row_shared.scale_by_row_shared_adam(**options)
