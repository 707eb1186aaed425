"""Corrections for delayed gradients against loops over their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import optimizers, trees
from jaxlib_methods.optimizers import delayed_nesterov, no_stash_nesterov, pipemare
from jaxlib_methods.optimizers.delay_corrections import delay_compensation, forecast_gradients, forecast_weights
from jaxlib_methods.optimizers.delays import stale_params
from jaxlib_methods.optimizers.no_stash import discrepancy_corrected, discrepancy_correction, scale_by_delay

TAUS = [("^a$", 3), ("^b$", 0), ("^c$", 1)]


def stream(count, seed=0, size=4):
    rng = np.random.default_rng(seed)
    return [{name: jnp.asarray(rng.normal(size=size), jnp.float32) for name in "abc"} for _ in range(count)]


def assert_close(ours, expected, rtol=1e-5):
    assert ours.keys() == expected.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], expected[name], rtol=rtol, atol=1e-6, err_msg=name)


def test_learning_rate_correction_by_stage_and_step():
    updates = stream(1)[0]
    link = scale_by_delay(TAUS, anneal_steps=4)
    state = link.init(updates)
    for t in range(7):
        scaled, state = jax.jit(link.update)(updates, state)
        rho = 1 - min(t / 4, 1)
        assert_close(scaled, {"a": updates["a"] / 3**rho, "b": updates["b"], "c": updates["c"]})


@pytest.mark.contract
@pytest.mark.parametrize("decay", [None, 0.95])
def test_delay_compensation_is_the_loop(decay):
    params, strength = stream(8, seed=1), 0.3
    link = delay_compensation(TAUS, strength, decay)
    state, mean_square = link.init(params[0]), dict.fromkeys("abc", 0.0)
    update = jax.jit(link.update)
    for t, (w, g) in enumerate(zip(params, stream(8, seed=2), strict=True)):
        stale = {name: params[max(t - tau, 0)][name] for name, tau in zip("abc", (3, 0, 1), strict=True)}
        jax.tree.map(np.testing.assert_array_equal, stale_params(state, w), stale)
        compensated, state = update(g, state, w)
        expected = {}
        for name in "abc":
            square = np.asarray(g[name], np.float64) ** 2
            size = strength
            if decay is not None:
                mean_square[name] = decay * mean_square[name] + (1 - decay) * square
                size = strength / np.sqrt(mean_square[name] + 1e-7)
            expected[name] = g[name] + size * square * (w[name] - stale[name])
        assert_close(compensated, expected)


def test_delay_compensation_is_exact_where_the_square_is_the_curvature():
    """f = sum h w^2 / 2 with h chosen so that lambda g^2 = h: the compensated gradient is the one at the new point."""
    old, new = jnp.array([1.0, -2.0]), jnp.array([1.5, -1.0])
    h = jnp.array([2.0, 0.5])
    g = h * old
    link = delay_compensation(1, strength=1.0)
    state = link.init(old)
    _, state = link.update(g, state, old)
    compensated, _ = link.update(jnp.sqrt(h), state, new)  # a gradient whose square is the curvature
    np.testing.assert_allclose(compensated - jnp.sqrt(h), h * (new - old), rtol=1e-6)


@pytest.mark.parametrize("tau", [0, 1, 3, 7])
def test_forecast_weights_reproduce_polynomials_and_are_least_squares(tau):
    table = forecast_weights(tau, length=5, order=2)
    for n in range(1, 6):
        degree = min(2, n - 1)
        times = -np.arange(n)
        for power in range(degree + 1):
            assert table[n - 1, :n] @ times.astype(float) ** power == pytest.approx(float(tau) ** power, abs=1e-9)
        noisy = np.random.default_rng(n).normal(size=n)
        fitted = np.polyval(np.polyfit(times, noisy, degree), tau)
        assert table[n - 1, :n] @ noisy == pytest.approx(fitted, rel=1e-8)
        assert not table[n - 1, n:].any()
    if tau == 7:  # the growth of noise that the docstring states
        assert np.linalg.norm(table[-1]) == pytest.approx(21, abs=1)


def test_forecast_is_the_loop_for_every_stage():
    gradients = stream(12, seed=3)
    link = forecast_gradients(TAUS, length=4, order=1)
    state, update = link.init(gradients[0]), jax.jit(link.update)
    for t, g in enumerate(gradients):
        made, state = update(g, state)
        expected = {"b": g["b"]}
        for name, tau in (("a", 3), ("c", 1)):
            times = np.arange(max(0, t - 3), t + 1)
            values = np.stack([np.asarray(gradients[s][name], np.float64) for s in times])
            expected[name] = np.polyval(np.polyfit(times - t, values, min(1, t)), tau) if t else values[0]
        assert_close(made, expected, rtol=1e-4)


def test_discrepancy_correction_is_the_loop():
    increments, tau, D = stream(9, seed=4), {"a": 3, "b": 0, "c": 1}, 0.2
    link = discrepancy_correction(TAUS, decay=D)
    w, state, delta = increments[0], link.init(increments[0]), dict.fromkeys("abc", 0.0)
    for step in increments[1:]:
        passed, state = link.update(step, state)
        jax.tree.map(np.testing.assert_array_equal, passed, step)
        w = optax.apply_updates(w, step)
        for name, delay in tau.items():
            keep = D ** (1 / delay) if delay else 0.0
            delta[name] = keep * delta[name] + (1 - keep) * np.asarray(step[name], np.float64)
        assert_close(discrepancy_corrected(state, w), {name: w[name] - tau[name] * delta[name] for name in "abc"})


def test_pipemare_slows_the_first_stage_and_keeps_the_average():
    params = stream(1)[0]
    optimizer = pipemare(optax.sgd(1.0), TAUS, anneal_steps=10)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert_close(updates, {"a": -params["a"] / 3, "b": -params["b"], "c": -params["c"]})
    corrected = discrepancy_corrected(state, params)
    assert (corrected["a"] != params["a"]).all() and (corrected["b"] == params["b"]).all()


def test_no_stash_gives_each_stage_its_momentum_and_learning_rate():
    P, params = 4, stream(1)[0]
    optimizer = no_stash_nesterov(0.1, TAUS, P, anneal_steps=5)
    state, w, alone = optimizer.init(params), params, {}
    for name, tau in zip("abc", (3, 0, 1), strict=True):
        alone[name] = delayed_nesterov(0.1, b1=0.9 + 0.09 * tau / P)
    own = {name: (params[name], alone[name].init(params[name])) for name in "abc"}
    for t, g in enumerate(stream(7, seed=5)):
        updates, state = optimizer.update(g, state, w)
        w = optax.apply_updates(w, updates)
        for name, tau in zip("abc", (3, 0, 1), strict=True):
            p, s = own[name]
            u, s = alone[name].update(g[name], s, p)
            own[name] = (p + u / max(tau, 1) ** (1 - min(t / 5, 1)), s)
    assert_close(w, {name: p for name, (p, _) in own.items()})


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize(
    "make", [lambda tau: pipemare(optax.sgd(0.1), tau, 5), lambda tau: no_stash_nesterov(0.1, tau, 4, 5)]
)
def test_a_delay_may_be_traced(make, delay):
    """One program for stages of different delays: the same numbers as with a delay that is known before."""

    def train(tau):
        w = stream(1)[0]
        state = make(tau).init(w)
        for g in stream(6, seed=5):
            updates, state = make(tau).update(g, state, w)
            w = optax.apply_updates(w, updates)
        found = trees.find_states(state, optimizers.no_stash.DiscrepancyCorrectionState)
        return (w, discrepancy_corrected(state, w)) if found else (w, w)

    traced, known = jax.jit(train)(jnp.int32(delay)), train(delay)
    for a, b in zip(traced, known, strict=True):
        assert_close(a, b)


PARAMS = {"first": jnp.zeros(2), "last": jnp.zeros(2)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_by_delay(-1), "delay must be a whole number"),
        (lambda: scale_by_delay(1, anneal_steps=0), "anneal_steps must be at least 1, got 0"),
        (lambda: scale_by_delay([("block", 1)]).init(PARAMS), "'block', matches no leaf"),
        (lambda: delay_compensation(1, decay=1.0), r"decay must lie in \[0, 1\), got 1.0"),
        (lambda: delay_compensation(1).update(PARAMS, delay_compensation(1).init(PARAMS)), "params must be given"),
        (lambda: forecast_gradients(2, length=2, order=2), "length must be at least 3, got 2"),
        (lambda: forecast_weights(-1), "delay must be at least 0, got -1"),
        (lambda: discrepancy_correction(1, decay=1.0), r"decay must lie in \(0, 1\), got 1.0"),
        (lambda: discrepancy_corrected(optax.sgd(0.1).init(PARAMS), PARAMS), "one discrepancy_correction, found 0"),
        (lambda: scale_by_delay(jnp.ones(2, jnp.int32)), r"must be an integer scalar, got int32\[2\]"),
        (lambda: no_stash_nesterov(0.1, 4, num_stages=4), "delays up to 3, got 4"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
