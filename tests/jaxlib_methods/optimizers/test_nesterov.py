"""NAdam against PyTorch's numbers and a float64 loop; the theory's update against eq. 10 written out; stability."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods.optimizers import delayed_nesterov, nadam
from jaxlib_methods.optimizers.delays import keep_param_history, stale_params
from jaxlib_methods.optimizers.discounted import discounted_nesterov
from jaxlib_methods.optimizers.nesterov import scale_by_nadam
from jaxlib_methods.optimizers.schedules import momentum_schedule, theory_momentum


def iterates(optimizer, gradients, start=0.0):
    """The parameter after each of the given gradients."""
    w, path = jnp.asarray(start), []
    state = optimizer.init(w)
    for g in gradients:
        updates, state = jax.jit(optimizer.update)(jnp.asarray(g, w.dtype), state, w)
        w = optax.apply_updates(w, updates)
        path.append(float(w))
    return path


NUMBERS = [
    (0.99, (1.0, 1.0, 1.0), (-0.100656, -0.168657, -0.227672)),
    (0.99, (1.0, -1.0, 2.0), (-0.100656, -0.033771, -0.115740)),
    (0.9, (1.0, 1.0, 1.0), (-0.105645, -0.184014, -0.257235)),
]


@pytest.mark.contract
@pytest.mark.parametrize(("b1", "gradients", "expected"), NUMBERS)
def test_numbers_worked_by_hand(b1, gradients, expected):
    np.testing.assert_allclose(iterates(nadam(0.1, b1=b1), gradients), expected, atol=6e-7)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_is_torchs_nadam(x64):
    import torch

    gradients = np.random.default_rng(0).normal(size=50)
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.NAdam([w], lr=0.05, betas=(0.99, 0.999), weight_decay=0.1, decoupled_weight_decay=True)
    path = []
    for g in gradients:
        w.grad = torch.tensor(g, dtype=torch.float64)
        theirs.step()
        path.append(float(w))
    ours = iterates(delayed_nesterov(0.05, weight_decay=0.1), gradients, start=np.float64(0.3))
    np.testing.assert_allclose(ours, path, rtol=1e-12)


def nadam_loop(gradients, lr=0.1, b1=0.99, b2=0.999, eps=1e-8, psi=0.004, decay=0.01, start=0.5):
    """The update line by line in float64."""
    w, m, v, Pi, path = start, 0.0, 0.0, 1.0, []
    for t, g in enumerate(np.asarray(gradients, np.float64), start=1):
        w *= 1 - lr * decay
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * psi)) for s in (t, t + 1))
        Pi *= mu
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w -= lr * ((1 - mu) / (1 - Pi) * g + mu_next / (1 - Pi * mu_next) * m) / (np.sqrt(v / (1 - b2**t)) + eps)
        path.append(w)
    return np.array(path)


def test_follows_the_float64_loop_exactly_in_float64(x64):
    gradients = np.random.default_rng(1).normal(size=100)
    ours = iterates(delayed_nesterov(0.1), gradients, start=np.float64(0.5))
    np.testing.assert_allclose(ours, nadam_loop(gradients), rtol=1e-12)


def test_float32_follows_float64_for_50k_steps():
    gradients = np.random.default_rng(2).normal(size=50_000).astype(np.float32) + np.float32(0.2)
    optimizer = delayed_nesterov(1e-3)

    @jax.jit
    def run(w, gradients):
        def step(carry, g):
            w, state = carry
            updates, state = optimizer.update(g, state, w)
            return (optax.apply_updates(w, updates), state), w

        return jax.lax.scan(step, (w, optimizer.init(w)), gradients)

    (w, state), _ = run(jnp.float32(0.5), gradients)
    expected = nadam_loop(gradients, lr=1e-3)
    np.testing.assert_allclose(w, expected[-1], rtol=1e-3)
    assert abs(expected[-1]) > 3  # the walk was long
    assert float(state[0].mu_product) == 0.0  # underflown, and nothing happened


def test_momentum_schedule_and_its_product():
    steps = jnp.array([1.0, 100.0, 1000.0, 5000.0, 10_000.0, 30_000.0, 50_000.0])
    expected = [0.495081, 0.503017, 0.569573, 0.771209, 0.893293, 0.986309, 0.989859]
    np.testing.assert_allclose(momentum_schedule(steps), expected, atol=1e-6)  # cut after six digits
    np.testing.assert_allclose(np.prod(momentum_schedule(jnp.arange(1.0, 6.0))), 0.029791, atol=6e-7)
    rule = scale_by_nadam(b1=0.99)
    state = rule.init(jnp.zeros(()))
    for _ in range(5):
        _, state = rule.update(jnp.ones(()), state)
    np.testing.assert_allclose(state.mu_product, 0.029791, atol=6e-7)


def test_optax_nadam_is_another_optimizer():
    with jax.numpy_dtype_promotion("standard"):
        theirs = iterates(optax.nadam(0.1, b1=0.99), (1.0, 1.0, 1.0))
    np.testing.assert_allclose(theirs, (-0.149749, -0.266331, -0.374622), rtol=2e-5)  # its float32


def test_discounts_are_what_they_say():
    """With psi infinite, mu = b1 and Pi vanishes; then the three forms are simple sums."""
    gradients = np.random.default_rng(3).normal(size=400).astype(np.float32)
    b1, seen = 0.9, {}
    for discount in ("both", "momentum", "none"):
        rule = scale_by_nadam(b1, b2=0.0, momentum_decay=np.inf, discount=discount)
        state, update = rule.init(jnp.zeros(())), jax.jit(rule.update)
        for g in gradients:
            direction, state = update(jnp.asarray(g), state)
        seen[discount] = float(direction) * abs(gradients[-1])  # b2 = 0: the denominator is |g|
    m = sum(0.1 * b1**k * g for k, g in enumerate(gradients[::-1]))
    assert seen["both"] == pytest.approx(0.1 * gradients[-1] + b1 * m, rel=1e-4)
    assert seen["momentum"] == pytest.approx(gradients[-1] + b1 * m, rel=1e-4)
    assert seen["none"] == pytest.approx(10 * seen["both"], rel=1e-4)


def test_half_precision_parameters_keep_moments_in_float32():
    params = jnp.zeros(3, jnp.bfloat16)
    rule = scale_by_nadam()
    state, update = rule.init(params), jax.jit(rule.update)
    for _ in range(300):  # an average of squares in bfloat16 would stop after some ten steps
        updates, state = update(jnp.full(3, 0.5, jnp.bfloat16), state)
    assert updates.dtype == jnp.bfloat16 and state.v.dtype == jnp.float32
    np.testing.assert_allclose(state.v, 0.25 * (1 - 0.999**300), rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ the theory


def equation_10(curvature, start, steps, eta, gamma, tau):
    """w_{t+1} = w_t + d_t - eta (1 - gamma_t) grad f(wbar_t + dbar_t), written with w and d; returns w_t + d_t."""
    w, lookahead = [start, start], []  # w_{-1} = w_0: at rest
    for t in range(steps):
        d = gamma(t + 1) * (w[-1] - w[-2])
        lookahead.append(w[-1] + d)
        delayed = lookahead[max(t - tau, 0)]
        w.append(w[-1] + d - eta * (1 - gamma(t + 1)) * curvature @ delayed)
    return np.array(lookahead)


@pytest.mark.parametrize("tau", [0, 3, 7])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99, "theory"])
def test_equation_10_is_the_nadam_form(gamma, tau, x64):
    rng = np.random.default_rng(4)
    A = rng.normal(size=(4, 4))
    A = A @ A.T / 4
    start, eta, steps = rng.normal(size=4), 0.05, 80
    schedule = gamma if gamma != "theory" else theory_momentum
    optimizer = optax.chain(keep_param_history(tau), discounted_nesterov(eta, schedule))
    y, path = jnp.asarray(start), []
    state = optimizer.init(y)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        path.append(y)
        updates, state = update(jnp.asarray(A) @ stale_params(state, y), state, y)
        y = optax.apply_updates(y, updates)
    at = (lambda t: gamma) if gamma != "theory" else (lambda t: max((t - 2) / t, 0.0))
    # gamma as a schedule goes through float32, as every schedule in optax; a number stays exact.
    tolerance = 1e-12 if gamma != "theory" else 1e-6
    np.testing.assert_allclose(np.array(path), equation_10(A, start, steps, eta, at, tau), rtol=0, atol=tolerance)


def test_without_delay_the_theory_gives_one_over_t():
    """f convex and smooth: t (f - f*) stays bounded with gamma_t = (t - 2) / t, eta = 1 / beta."""
    curvature = jnp.array([1.0, 0.1, 0.01, 0.001])
    optimizer = discounted_nesterov(1.0, theory_momentum)
    y, values = jnp.ones(4), []
    state = optimizer.init(y)
    update = jax.jit(optimizer.update)
    for _ in range(400):
        values.append(float(jnp.sum(curvature * y**2)) / 2)
        updates, state = update(curvature * y, state, y)
        y = optax.apply_updates(y, updates)
    scaled = np.arange(1, 401) * np.array(values)
    assert scaled.max() < 2 * float(jnp.sum(jnp.ones(4) ** 2))  # ||y_0 - y*||^2 / (2 eta), with room


# --------------------------------------------------------------------------------------------------- stability


def largest_root(step, gamma, tau, discount=True):
    """Spectral radius of y_{t+1} = y_t - step [(1 - gamma) g + gamma m_t], m_t = gamma m_{t-1} + (1 - gamma) g.

    Here g = y_{t-tau}. With z the shift by one update,
    (z - 1) (z - gamma) z^tau + step (1 - gamma) ((1 + gamma) z - gamma) = 0.
    """
    into = 1 - gamma if discount else 1.0
    polynomial = np.polymul(np.polymul([1, -1], [1, -gamma]), [1] + [0] * tau)
    polynomial = np.polyadd(polynomial, step * into * np.array([1 + gamma, -gamma]))
    return np.abs(np.roots(polynomial)).max()


def threshold(gamma, tau, discount=True):
    """The step at which the first root leaves the unit circle, by bisection."""
    low, high = 1e-9, 1e4
    for _ in range(200):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if largest_root(middle, gamma, tau, discount) < 1 else (low, middle)
    return low


@pytest.mark.parametrize("tau", [1, 2, 3, 7, 15])
def test_gradient_descent_is_stable_up_to_the_closed_form(tau):
    expected = 2 * np.sin(np.pi / (2 * (2 * tau + 1)))
    assert threshold(0.0, tau) == pytest.approx(expected, rel=1e-6)
    if tau == 7:
        assert expected == pytest.approx(0.20906, abs=5e-6)


THRESHOLDS = {0: 133.56, 1: 9.137, 3: 0.49517, 7: 0.16768}


@pytest.mark.parametrize("tau", THRESHOLDS)
def test_thresholds_of_discounted_momentum(tau):
    assert threshold(0.99, tau) == pytest.approx(THRESHOLDS[tau], rel=5e-5)
    assert threshold(0.99, tau, discount=False) == pytest.approx(THRESHOLDS[tau] / 100, rel=5e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.99])
@pytest.mark.parametrize("discount", [True, False])
@pytest.mark.parametrize("tau", [0, 1, 3, 7])
def test_the_optimizer_is_stable_below_its_threshold_and_not_above(tau, discount, gamma, x64):
    """The transformations themselves, simulated with the delay on f(y) = y^2 / 2."""
    limit = threshold(gamma, tau, discount)

    def energy(step):
        optimizer = optax.chain(keep_param_history(tau), discounted_nesterov(step, gamma, discounted=discount))

        def one(carry, _):
            y, state = carry
            updates, state = optimizer.update(stale_params(state, y), state, y)
            y = optax.apply_updates(y, updates)
            return (y, state), jnp.abs(y)

        y = jnp.float64(1.0)
        sizes = jax.jit(lambda y: jax.lax.scan(one, (y, optimizer.init(y)), length=40_000)[1])(y)
        return np.asarray(sizes)

    stable, unstable = energy(0.95 * limit), energy(1.05 * limit)
    assert stable[-1000:].max() < 1e-3 * stable[:1000].max()
    assert not unstable[-1000:].max() < 1e3 * unstable[:1000].max()  # also where it has overflown


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nadam(0.1, b1=1.0), r"b1 must lie in \[0, 1\), got 1.0"),
        (lambda: scale_by_nadam(b2=-0.1), r"b2 must lie in \[0, 1\), got -0.1"),
        (lambda: nadam(0.1, eps=-1e-8), "eps must not be negative"),
        (lambda: nadam(0.1, momentum_decay=-1.0), "momentum_decay must not be negative"),
        (lambda: delayed_nesterov(0.1, discount="half"), "'both', 'momentum', 'none', got 'half'"),
        (lambda: discounted_nesterov(0.1, momentum=1.5), r"momentum must lie in \[0, 1\), got 1.5"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
