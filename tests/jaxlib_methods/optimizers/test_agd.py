"""Automatic gradient descent against a loop over the formulas of the paper, position by position."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods.optimizers import agd, agd_initializer, scale_by_agd


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"conv": (3, 2, 4, 6), "dense": (6, 5), "head": (5, 3)}
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


def paper_step(grads, gain):
    """-gain eta / L sigma / g grad with explicit loops."""
    L, Gbar, step = len(grads), 0.0, {}
    positions = {name: [()] if g.ndim == 2 else list(np.ndindex(g.shape[:2])) for name, g in grads.items()}
    sigma = {name: np.sqrt(g.shape[-1] / g.shape[-2] / len(positions[name])) for name, g in grads.items()}
    for name, g in grads.items():
        Gbar += sigma[name] * sum(np.linalg.norm(g[p]) for p in positions[name]) / L
    eta = np.log((1 + np.sqrt(1 + 4 * Gbar)) / 2)
    for name, g in grads.items():
        step[name] = np.zeros(g.shape)
        for p in positions[name]:
            norm = np.linalg.norm(g[p])
            step[name][p] = -gain * eta / L * np.nan_to_num(sigma[name] / norm if norm else 0.0) * g[p]
    return step


@pytest.mark.contract
@pytest.mark.parametrize("size", [1e-5, 1.0, 1e4])
def test_step_is_the_papers(size):
    grads = jax.tree.map(lambda x: size * x, weights())
    updates, _ = agd(gain=10.0).update(grads, agd().init(grads))
    expected = paper_step(jax.tree.map(lambda x: np.asarray(x, np.float64), grads), 10.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), updates, expected)


def test_a_position_without_gradient_stays_and_the_others_move():
    grads = weights()
    grads["conv"] = grads["conv"].at[1, 1].set(0)
    grads["head"] = jnp.zeros_like(grads["head"])
    updates, _ = scale_by_agd().update(grads, optax.EmptyState())
    assert not updates["conv"][1, 1].any() and not updates["head"].any()
    assert updates["conv"][0, 0].all() and jnp.isfinite(updates["conv"]).all()


def test_initializer_is_orthogonal_at_every_position_times_sigma():
    for shape in [(7, 4), (4, 7), (3, 3, 5, 2), (2, 2, 5)]:
        W = agd_initializer()(jax.random.key(0), shape)
        sigma = np.sqrt(shape[-1] / shape[-2] / np.prod(shape[:-2]))
        np.testing.assert_allclose(jnp.linalg.svd(W, compute_uv=False), sigma, rtol=1e-5)
    assert agd_initializer()(jax.random.key(0), (4, 4), jnp.bfloat16).dtype == jnp.bfloat16


def test_a_deep_linear_network_trains_without_a_learning_rate():
    keys = jax.random.split(jax.random.key(0), 6)
    init = agd_initializer()
    params = [init(k, shape) for k, shape in zip(keys, [(8, 16), (16, 16), (16, 16), (16, 2)], strict=False)]
    x = jax.random.normal(keys[4], (32, 8))
    y = x @ jax.random.normal(keys[5], (8, 2)) / jnp.sqrt(8.0)

    def loss(params):
        h = x
        for W in params:
            h = h @ W
        return jnp.mean((h - y) ** 2)

    tx = agd(gain=1.0)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, tx.init(params)), length=300)[1]

    losses = run(params)
    assert losses[-1] < 1e-2 * losses[0]


def test_vectors_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"shape \(3,\).*optax.partition"):
        agd().init({"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="rank 2"):
        agd_initializer()(jax.random.key(0), (3,))
