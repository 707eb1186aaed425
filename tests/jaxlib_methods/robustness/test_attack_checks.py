"""Checks of temperature-scaled attacks, with numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import robustness as rb
from tests.jaxlib_methods.robustness import small_network as net

close = np.testing.assert_allclose
HNS = rb.HessianNormScaling()
log_hessian_norm, hns_temperature = jax.jit(rb.scaling.log_hessian_norm), jax.jit(rb.scaling.hessian_norm_scale)
njs_temperature = jax.jit(rb.scaling.network_jacobian_scale)
OPTIONS = {"radius": 0.1, "step_size": 0.02, "num_steps": 10}


def numpy_log_hessian_norm(a, J, beta):
    """log |beta^2 J^T S J|_F with the N x N matrix written out, and S as a sum over pairs of labels, in float64."""
    p = net.numpy_softmax(beta * a)
    S = np.zeros((len(a), len(a)))
    for i in range(len(a)):
        for j in range(i):
            e = np.eye(len(a))[i] - np.eye(len(a))[j]
            S += p[i] * p[j] * np.outer(e, e)  # diag(p) - p p^T without a difference of large numbers
    return np.log(np.linalg.norm(beta**2 * J.T @ S @ J))


@jax.jit
def look(params, images):
    logits, J = rb.jacobians.logits_and_jacobian(net.apply, params, images)
    return logits, rb.jacobians.logit_gram(logits, J)


@pytest.fixture(scope="module")
def attacked():
    params = net.network(scale=20.0)
    images, labels = net.batch(params=params)
    return params, images, labels, rb.network_jacobian_scaling(net.apply, params, images)


@pytest.mark.contract
def test_1_predictions_do_not_depend_on_the_temperature(attacked):
    params, images, labels, njs = attacked
    logits, gram = look(params, images)
    for beta in (
        njs_temperature(logits, labels, 20 * njs.scale),
        hns_temperature(logits, gram, labels),
    ):
        beta, a = np.asarray(beta), np.asarray(logits)
        assert (beta > 0).all() and np.ptp(beta) > 0
        assert ((beta[:, None] * a).argmax(axis=1) == labels).all()


@pytest.mark.parametrize(("d", "numerator"), [(2, 4.59512), (10, 6.79234), (100, 9.19024)])
def test_2_the_bound_of_njs_is_tight(d, numerator):
    close(rb.scaling.confidence_scale(1.0, d), numerator, atol=1e-5)
    logits = 37 * np.eye(d, dtype=np.float32)[:1]  # all others equal: certain to exactly 1 - rho
    beta = njs_temperature(logits, np.array([0]), 1.0)
    close(net.numpy_softmax(np.float64(beta[0]) * logits[0])[0], 0.99, atol=1e-6)
    spread = np.random.default_rng(0).normal(size=(500, d))
    below = 0.999 * np.asarray(rb.scaling.confidence_scale(np.ptp(spread, axis=1), d))
    assert all(1 - net.numpy_softmax(beta * a).max() > 0.01 for beta, a in zip(below, spread, strict=True))


def test_3_where_njs_steps_in_it_lowers_the_temperature():
    logits = np.random.default_rng(0).normal(scale=8, size=(100_000, 10)).astype(np.float32)
    labels = logits.argmax(axis=1)
    beta = np.asarray(njs_temperature(logits, labels, 1.0))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    error_signal = 1 - 1 / p.sum(axis=1)
    saturated = error_signal <= 0.01
    assert saturated.sum() > 10_000
    assert beta[saturated].max() < 1
    assert (beta[error_signal > 0.0101] == 1).all()
    misclassified = (labels + 1) % 10
    assert (np.asarray(njs_temperature(logits, misclassified, 0.5)) == 0.5).all()


def test_4_njs_scales_the_mean_singular_value_to_one(attacked):
    params, images, _, njs = attacked
    W = jax.random.normal(jax.random.key(0), (16, 5))
    scale = rb.network_jacobian_scaling(net.linear, W, images).scale
    close(np.linalg.svd(scale * W, compute_uv=False).mean(), 1, rtol=1e-5)
    singular = [np.linalg.svd(net.numpy_logits_and_jacobian(params, x)[1], compute_uv=False) for x in images]
    close(rb.jacobians.logit_singular_values(net.apply, params, images), singular, rtol=1e-4)
    close(njs.scale, 1 / np.mean(singular), rtol=1e-5)


@pytest.mark.parametrize("model", ["linear", "relu"])
def test_4_the_hessian_formula_is_the_hessian(model, x64):
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), net.network())
    f, params = (net.linear, params["first"][:, :5]) if model == "linear" else (net.apply, params)

    @jax.jit
    def both(images, beta):
        logits, J = rb.jacobians.logits_and_jacobian(f, params, images)
        rows = J.reshape(len(images), 5, -1)
        loss = lambda x, b: -jax.nn.log_softmax(b * f(params, x[None]))[0, 2]
        hessian = jax.vmap(jax.hessian(loss))(images, beta)
        return rb.scaling.log_hessian_norm(logits, rows @ rows.mT, beta[:, None])[:, 0], hessian

    found, hessian = both(np.random.default_rng(1).random((3, *net.SHAPE)), np.array([0.3, 1.0, 2.0]))
    close(found, np.log(np.linalg.norm(np.asarray(hessian).reshape(3, 16, 16), axis=(1, 2))), rtol=1e-9)


def test_5_the_small_matrices_give_the_large_ones_norm_far_into_saturation(attacked):
    params, images, _, _ = attacked
    logits, gram = look(params, images)
    top = np.sort(np.asarray(logits), axis=1)[:, ::-1]
    beta = np.linspace(0.1, 160, 7, dtype=np.float32)[None] / (top[:, :1] - top[:, 1:2])
    found = log_hessian_norm(logits, gram, beta)
    for i in range(len(images)):
        a, rows = net.numpy_logits_and_jacobian(params, images[i])
        # In float32 the logits themselves are known to seven digits: at beta a = 1e4, log p to 1e-3.
        atol = 3e-7 * float(beta[i].max() * np.abs(top[i]).max()) + 1e-5
        close(found[i], [numpy_log_hessian_norm(a, rows, float(b)) for b in beta[i]], atol=atol)


@pytest.mark.parametrize(("d", "ends"), [(2, (0.040005, 165.786)), (10, (0.10648, 167.983)), (100, (0.70330, 170.381))])
def test_6_the_ends_of_the_grid(d, ends):
    close(rb.scaling.grid_ends(d), ends, rtol=1e-4)


def test_6_two_labels_have_a_closed_optimum_that_the_grid_misses():
    gap = 5.0
    logits, J = jnp.array([[gap, 0.0]]), jnp.eye(2)[None]
    beta = np.linspace(0.01, 5, 20_001, dtype=np.float32)[None] / gap
    objective = np.asarray(log_hessian_norm(logits, J @ J.mT, beta))
    close(beta[0, objective.argmax()], 2.3993573 / gap, rtol=2e-3)
    value = lambda z: z**2 / (1 + np.exp(-z)) / (1 + np.exp(z))  # beta^2 s (1 - s) at z = beta gap
    close(np.exp(objective), 2 * value(beta * gap) / gap**2, rtol=1e-4)
    close((value(2.3993573), value(1.7142086)), (0.4392, 0.3800), atol=1e-4)
    close(hns_temperature(logits, J @ J.mT, jnp.array([0])), [1.7142086 / gap], rtol=1e-5)
    z = 2.3993573 / 2
    close(z * np.tanh(z), 1, atol=1e-6)


def test_6_hns_is_one_where_there_is_nothing_to_choose():
    logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])  # correct, misclassified, a tie
    J = jnp.broadcast_to(jnp.eye(2), (3, 2, 2))
    beta = hns_temperature(logits, J @ J.mT, jnp.zeros(3, jnp.int32))
    assert beta[0] != 1 and (beta[1:] == 1).all()
    flat = hns_temperature(logits, jnp.ones((3, 2, 2)), jnp.zeros(3, jnp.int32))
    assert (flat == 1).all()  # equal rows: the logits' difference does not depend on the image


def test_6_hns_equals_a_loop_with_the_whole_hessian(attacked):
    params, images, labels, _ = attacked
    labels = labels.at[0].set((labels[0] + 1) % 5)
    found = hns_temperature(*look(params, images), labels)
    expected = []
    for i in range(len(images)):
        a, rows = net.numpy_logits_and_jacobian(params, images[i])
        top = np.sort(a)[::-1]
        grid = np.linspace(*rb.scaling.grid_ends(5), 100) / (top[0] - top[1])
        best = int(np.argmax([numpy_log_hessian_norm(a, rows, beta) for beta in grid]))
        inner = a.argmax() == labels[i] and 0 < best < 99
        expected.append(grid[best] if inner else 1.0)
    close(found, expected, rtol=1e-3)
    assert np.unique(expected).size > 10 and expected[0] == 1


def test_7_a_saturated_network_has_no_gradient_until_it_is_scaled():
    W = 200 * jnp.eye(2)
    x, label, key = jnp.array([[0.99, 0.01]]), jnp.array([0]), jax.random.key(0)
    loss = lambda x: -jax.nn.log_softmax(net.linear(W, x))[0, 0]
    assert not jax.grad(loss)(x).any()
    options = {"radius": 0.1, "step_size": 0.025, "num_steps": 8}
    start = rb.pgd(net.linear, W, x, label, key=key, **(options | {"num_steps": 1})).images
    assert (rb.pgd(net.linear, W, x, label, key=key, **options).images == start).all()  # it keeps its random start
    for scaling in (rb.network_jacobian_scaling(net.linear, W, x), HNS):
        moved = rb.pgd(net.linear, W, x, label, key=key, scaling=scaling, **options).images
        close(moved, [[0.89, 0.11]], atol=1e-6)


def test_9_a_temperature_of_one_is_the_plain_attack_to_the_bit(attacked):
    params, images, labels, _ = attacked
    plain = rb.pgd(net.apply, params, images, labels, key=jax.random.key(3), **OPTIONS)
    for one in (1.0, jnp.ones(len(images))):
        scaled = rb.pgd(net.apply, params, images, labels, key=jax.random.key(3), scaling=one, **OPTIONS)
        assert (scaled.images == plain.images).all()


def test_10_njs_does_not_see_the_scale_of_the_last_layer(attacked):
    params, images, labels, _ = attacked
    key = jax.random.key(0)
    found = {}
    for factor in (1, 50):
        scaled = params | {"second": params["second"] * factor}
        njs = rb.network_jacobian_scaling(net.apply, scaled, images)
        found[factor] = [
            rb.pgd(net.apply, scaled, images, labels, key=key, scaling=scaling, **OPTIONS) for scaling in (None, njs)
        ]
    close(found[50][1].images, found[1][1].images, atol=1e-6)
    assert (found[50][1].success == found[1][1].success).all()
    assert found[50][0].success.mean() < found[1][0].success.mean() < found[1][1].success.mean()
