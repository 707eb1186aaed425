"""Bidirectional self-normalisation: the table of constants, orthogonality, and flat signal norms through 200 layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate

from jaxlib_methods.normalization import (
    apply_bsn,
    bjorck,
    gpn,
    init_bsn,
    orthogonal_retraction,
    rescale_inputs,
    signal_norms,
)
from jaxlib_methods.normalization.gaussian_poincare import gpn_constants
from jaxlib_methods.normalization.orthogonal import haar_orthogonal, orthogonality_error, riemannian_gradient

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky": lambda z: jax.nn.leaky_relu(z, 0.01),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "swish": jax.nn.swish,
    "softplus": jax.nn.softplus,
    "erf": jax.lax.erf,
    "sin": jnp.sin,
}
# f: a, b(+), chi(+), v(+), b(-), chi(-), v(-), |mean|, k by quadrature
TABLE = {
    "tanh": (1.46741359, 0.38854167, 0.3915, 0.6584, -0.38854167, 0.3915, 0.6584, 0.3885, 1.5835),
    "relu": (1.41421356, 0, 1.0, 3.0, -1.12837917, 0.3634, 0.5683, 0.5642, 2.0),
    "leaky": (1.41414286, 0, 1.0, 2.9988, -1.11703952, 0.3761, 0.5636, 0.5585, 1.9996),
    "elu": (1.22342856, 0.07422035, 0.8838, 1.3692, -0.46699125, 0.7106, 0.3456, 0.2706, 1.3317),
    "selu": (0.96602578, 0.25844574, 0.7747, 0.7239, -0.25844574, 0.6860, 0.2512, 0.2584, 1.3162),
    "gelu": (1.48111441, 0.07387708, 1.1135, 3.4783, -0.90950640, 0.4972, 0.8608, 0.4917, 2.0883),
    "gelu_tanh": (1.48116806, 0.07388055, None, None, -0.90937365, None, None, 0.4916, None),
    "swish": (1.62332026, 0.08288539, 1.1465, 3.4966, -0.75370939, 0.6701, 1.0310, 0.4183, 1.9900),
    "softplus": (1.84622855, -1.21517392, 1.0816, 2.0803, -1.76116503, 0.8733, 0.6670, 0.2730, 1.5289),
    "erf": (1.32521835, 0.42911499, 0.3333, 0.7514, -0.42911499, 0.3333, 0.7514, 0.4291, 1.6667),
    "sin": (1.32725060, 0.48826821, 0.2384, 0.9864, -0.48826821, 0.2384, 0.9864, 0.4883, 1.3738),
}


@functools.cache
def constants(name, root):
    return gpn_constants(ACTIVATIONS[name], root=root)


# Activations


@pytest.mark.contract
@pytest.mark.parametrize("name", TABLE)
def test_constants_are_the_table(name):
    a, *rest = TABLE[name]
    mean, k = rest[6:]
    for root, (b, chi, v) in {"plus": rest[:3], "minus": rest[3:6]}.items():
        c = constants(name, root)
        np.testing.assert_allclose((c.a, c.b), (a, b), atol=6e-9)
        for got, expected in ((c.chi, chi), (c.v, v), (abs(c.mean), mean), (c.k, k)):
            if expected is not None:
                np.testing.assert_allclose(got, expected, atol=6e-5)


@pytest.mark.parametrize("name", ["tanh", "relu", "elu", "gelu", "sin"])
@pytest.mark.parametrize("root", ["plus", "minus"])
def test_activation_and_derivative_have_unit_second_moment(name, root):
    """By SciPy's quadrature, split at the kink, of the function that users call."""
    a, b = constants(name, root)[:2]
    with jax.enable_x64(True):
        z = np.concatenate([half * np.linspace(1e-12, 1, 200_001) * 12 for half in (-1, 1)])
        phi = np.asarray(a * ACTIVATIONS[name](jnp.asarray(z)) + b)
        slope = np.asarray(a * jax.jvp(ACTIVATIONS[name], (jnp.asarray(z),), (jnp.ones(z.size),))[1])
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    for values in (phi, slope):
        halves = (values**2 * density).reshape(2, -1)
        np.testing.assert_allclose(integrate.simpson(halves, x=z[-200_001:]).sum(), 1, atol=1e-8)


def test_closed_forms():
    sin, erf, selu = constants("sin", "plus"), constants("erf", "plus"), constants("selu", "plus")
    np.testing.assert_allclose(sin.a, np.sqrt(2 / (1 + np.exp(-2))), rtol=1e-12)
    np.testing.assert_allclose((sin.b**2, sin.chi), 1 - np.tanh(1), rtol=1e-10)
    np.testing.assert_allclose(erf.a**2, np.pi * np.sqrt(5) / 4, rtol=1e-12)
    np.testing.assert_allclose(erf.b**2, 1 - erf.a**2 * (2 / np.pi) * np.arcsin(2 / 3), rtol=1e-10)
    np.testing.assert_allclose(erf.k, 5 / 3, rtol=1e-10)
    np.testing.assert_allclose(selu.a, 1 / np.sqrt(1.071575), rtol=1e-6)
    np.testing.assert_allclose(selu.b, selu.mean, atol=1e-8)  # E f = 0
    np.testing.assert_allclose(constants("relu", "minus").b, -2 / np.sqrt(np.pi), rtol=1e-12)
    np.testing.assert_allclose((constants("relu", "plus").b, constants("leaky", "plus").b), 0, atol=1e-7)


def test_identity_is_its_own_normalisation_and_affine_changes_cancel():
    c = gpn_constants(lambda z: z)
    np.testing.assert_allclose((c.a, c.b), (1, 0), atol=1e-7)
    phi, changed = gpn(jnp.tanh), gpn(lambda z: 3.0 * jnp.tanh(z) - 2.0)
    z = jnp.linspace(-3, 3, 50)
    np.testing.assert_allclose(phi(z), changed(z), atol=1e-5)
    assert phi(z.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_kinks_anywhere_are_found_without_being_told():
    f = lambda z: jnp.clip(z, -0.3217, 1.7)  # E f'^2 = P(-0.3217 < z < 1.7)
    from scipy.stats import norm

    np.testing.assert_allclose(gpn_constants(f).a ** -2, norm.cdf(1.7) - norm.cdf(-0.3217), rtol=1e-10)


def test_constants_can_be_asked_for_inside_jit():
    z = jnp.ones(3)
    np.testing.assert_allclose(jax.jit(lambda z: gpn(jnp.tanh)(z))(z), gpn(jnp.tanh)(z), rtol=1e-6)


# Orthogonal weights


def test_haar_law_and_both_signs_of_the_determinant():
    W = haar_orthogonal(jax.random.key(0), (4000, 3, 3))
    np.testing.assert_allclose(orthogonality_error(W), 0, atol=1e-5)
    assert abs(float(jnp.mean(jnp.linalg.det(W)))) < 4 / np.sqrt(4000)
    np.testing.assert_allclose(jnp.mean(W**2, axis=0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(jnp.mean(W, axis=0), 0, atol=0.04)  # QR without the sign fix has a negative first entry
    unfixed = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (4000, 3, 3)))[0]
    assert abs(float(jnp.mean(unfixed[:, 0, 0]))) > 0.3


def test_rectangular_matrices_are_semi_orthogonal_on_the_short_side():
    tall, wide = (haar_orthogonal(jax.random.key(0), shape) for shape in ((7, 4), (4, 7)))
    np.testing.assert_allclose(tall.T @ tall, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(wide @ wide.T, np.eye(4), atol=1e-5)
    noisy = wide + 0.05 * jax.random.normal(jax.random.key(1), (4, 7))
    assert orthogonality_error(bjorck(noisy, num_steps=5)) < 1e-5


def test_bjorck_converges_quadratically_as_published(x64):
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    W = jnp.asarray(Q + 0.1 * rng.standard_normal((64, 64)) / 8)
    errors = [float(orthogonality_error(bjorck(W, num_steps=s))) for s in range(5)]
    np.testing.assert_allclose(errors[:4], [1.15, 0.176, 5.6e-3, 8.1e-6], rtol=0.5)
    assert errors[4] < 1e-9
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        bjorck(W, num_steps=-1)


def test_riemannian_gradient_is_tangent_and_the_projection(x64):
    W = haar_orthogonal(jax.random.key(0), (5, 5), jnp.float64)
    G = jax.random.normal(jax.random.key(1), (5, 5), jnp.float64)
    R = riemannian_gradient(W, G)
    np.testing.assert_allclose(W.T @ R + R.T @ W, 0, atol=1e-12)
    np.testing.assert_allclose(R, (G @ W.T - W @ G.T) @ W / 2, atol=1e-12)
    np.testing.assert_allclose(riemannian_gradient(W, R), R, atol=1e-12)
    V = haar_orthogonal(jax.random.key(2), (3, 5), jnp.float64)
    R = riemannian_gradient(V, G[:3])
    np.testing.assert_allclose(V @ R.T + R @ V.T, 0, atol=1e-12)


@pytest.mark.parametrize(("method", "tolerance"), [("qr", 2e-6), ("bjorck", 1e-3)])
def test_training_stays_orthogonal_with_momentum_and_finds_the_rotation(method, tolerance):
    W = haar_orthogonal(jax.random.key(0), (2, 6, 6))
    A = 0.3 * jax.random.normal(jax.random.key(1), (2, 6, 6))
    target = W @ jax.scipy.linalg.expm(A - jnp.swapaxes(A, 1, 2))  # in the same component as W
    loss = lambda W: jnp.sum((W - target) ** 2)
    tx = orthogonal_retraction(optax.sgd(0.05, momentum=0.5), method=method)

    @jax.jit
    def run(W):
        def step(carry, _):
            W, state = carry
            updates, state = tx.update(jax.grad(loss)(W), state, W)
            W = optax.apply_updates(W, updates)
            return (W, state), orthogonality_error(W).max()

        return jax.lax.scan(step, (W, tx.init(W)), length=100)

    (reached, _), errors = run(W)
    assert float(errors.max()) < tolerance
    assert float(loss(reached)) < 0.05 * float(loss(W))


def test_vectors_pass_through_the_inner_optimizer():
    params = {"W": jnp.eye(3), "b": jnp.ones(3)}
    tx = orthogonal_retraction(optax.sgd(0.1))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["b"], -0.1)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="'cayley'"):
        orthogonal_retraction(optax.sgd(0.1), method="cayley")


# Signal norms


@functools.cache
def network(depth=200, width=64, seed=0):
    return init_bsn(key=jax.random.key(seed), depth=depth, width=width, num_inputs=width, num_outputs=10)


def norms(f, depth=200, width=64):
    x = rescale_inputs(jax.random.normal(jax.random.key(9), (4, width)))
    loss = lambda logits: jnp.sum(jax.nn.log_softmax(logits)[:, 0])
    return jax.jit(lambda p, x: signal_norms(p, x, loss, f))(network(depth, width), x)


def test_linear_network_preserves_both_norms_to_round_off():
    n = norms(lambda z: z, 60, 64)
    np.testing.assert_allclose(n.forward, 1, rtol=1e-4)
    np.testing.assert_allclose(n.backward, n.backward[-1], rtol=1e-4)


def test_two_hundred_layers_keep_their_norms_with_gpn_and_lose_them_without():
    tanh = norms(gpn(jnp.tanh))
    c, (L, n) = gpn_constants(jnp.tanh), (200, 64)
    assert abs(float(tanh.forward[-1]) - 1) < 4 * np.sqrt(
        c.v / (n * (1 - c.chi**2))
    )  # stationary deviation of ||x||^2/n
    assert abs(float(jnp.log(tanh.backward[0] / tanh.backward[-1]))) < 3 * np.sqrt(3 * (c.k - 1) * L / n) / 2
    assert 0.001 < float(norms(jnp.tanh).forward[-1]) < 0.006
    assert float(norms(jax.nn.relu).forward[-1]) < 1e-20


def test_unstable_root_drifts_away_from_norm_one_and_the_stable_one_does_not():
    stable, unstable = (norms(gpn(jax.nn.gelu, root=root)).forward for root in ("minus", "plus"))
    assert float(jnp.abs(jnp.log(stable)).max()) < 0.8
    assert float(jnp.abs(jnp.log(unstable)).max()) > 3


def test_signal_norms_are_the_gradients_of_a_plain_loop():
    params = network(4, 8)
    phi = gpn(jnp.tanh)
    x = rescale_inputs(jax.random.normal(jax.random.key(0), (3, 8)))
    loss = lambda logits: jnp.sum(logits**2)
    n = signal_norms(params, x, loss, phi)
    np.testing.assert_allclose(
        apply_bsn(params, x, phi), phi_loop(params, x, phi, [jnp.zeros((3, 8))] * 4)[0], rtol=1e-4, atol=1e-5
    )
    y = jax.grad(lambda probes: loss(phi_loop(params, x, phi, probes)[0]))([jnp.zeros((3, 8))] * 4)
    np.testing.assert_allclose(n.backward, [jnp.linalg.norm(g) for g in y], rtol=1e-4)
    np.testing.assert_allclose(n.forward, phi_loop(params, x, phi, [jnp.zeros((3, 8))] * 4)[1], rtol=1e-4)


def phi_loop(params, x, phi, probes):
    squares = []
    for W, probe in zip([params.first, *params.hidden], probes, strict=True):
        x = phi(x @ W.T + probe)
        squares.append(jnp.mean(x**2))
    return x @ params.last.T, squares


def test_a_widening_first_layer_enters_with_unit_norm():
    params = init_bsn(key=jax.random.key(0), depth=1, width=40, num_inputs=10, num_outputs=3)
    x = rescale_inputs(jax.random.normal(jax.random.key(1), (5, 10)))
    n = signal_norms(params, x, jnp.sum, lambda z: z)
    np.testing.assert_allclose(n.forward, 1, rtol=1e-5)
    np.testing.assert_allclose(rescale_inputs(jnp.zeros((1, 4))), 0)


def test_errors_name_the_argument_and_its_value():
    with pytest.raises(ValueError, match="'positive'"):
        gpn(jnp.tanh, root="positive")
    with pytest.raises(ValueError, match="not constant"):
        gpn(lambda z: 0.0 * z)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        init_bsn(key=jax.random.key(0), depth=0, width=4, num_inputs=2, num_outputs=2)
    with pytest.raises(ValueError, match="two axes"):
        haar_orthogonal(jax.random.key(0), (4,))
