"""SENTINEL's distances, fences and state machine against numbers worked by hand and NumPy loops."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.parallel.integrity import VerifierConfig, init_verifier, verify
from jaxlib_methods.parallel.integrity.distances import (
    DISTANCES,
    message_distances,
    message_summary,
    random_directions,
    sliced_wasserstein,
    sorting_network,
    tukey_fence,
)
from jaxlib_methods.parallel.integrity.verification import reroute, verify_summaries

D1, D2, D3, D4 = range(4)


@pytest.fixture(scope="module")
def m():
    return jax.random.normal(jax.random.key(7), (64, 8))


@pytest.fixture(scope="module")
def projections():
    return random_directions(8, 64, key=jax.random.key(8))


@pytest.mark.contract
def test_distances_of_the_worked_example():
    x, m = jnp.array([[1.0, 2.0], [3.0, -4.0]]), jnp.array([[1.0, -2.0], [3.0, -4.0]])
    distances = message_distances(x, m, jnp.eye(2))
    np.testing.assert_allclose(distances[:3], [1.0, 4 / math.sqrt(30), 0.25], rtol=1e-6)
    assert float(distances[D2]) == pytest.approx(0.730297, abs=1e-6)


@pytest.mark.parametrize("sigma", [-1.0, 0.5, 2.0, 10.0, 0.0])
def test_distances_of_a_scaled_reference(m, projections, sigma):
    distances = message_distances(sigma * m, m, projections)
    assert float(distances[D2]) == pytest.approx(abs(sigma - 1), rel=1e-5)
    assert float(distances[D3]) == (1.0 if sigma <= 0 else 0.0)
    assert float(distances[D1]) == pytest.approx(abs(sigma - 1) * float(jnp.abs(m).mean()), rel=1e-5)


@pytest.mark.parametrize("points", [1, 2, 7, 64, 100])
def test_the_network_sorts(points):
    y = jax.random.normal(jax.random.key(points), (3, points, 4)).round(1).at[0, 0, 0].set(jnp.inf)  # with ties
    np.testing.assert_array_equal(jax.jit(sorting_network)(y), np.sort(y, axis=1))


def test_only_what_is_asked_for_is_computed(m, projections):
    x, asked = m + 1.0, ("sign", "euclidean")
    distances = message_distances(x, m, projections, asked)
    expected = np.where([name in asked for name in DISTANCES], message_distances(x, m, projections), np.nan)
    np.testing.assert_array_equal(distances, expected)
    traced = jax.make_jaxpr(lambda x: message_distances(x, m, projections, asked))(x)
    assert "dot_general" not in str(traced) and "sort" not in str(traced)


def test_wasserstein_does_not_see_the_order_of_tokens_and_sees_a_shift_by_its_projection(m, projections):
    permuted = message_distances(m[jax.random.permutation(jax.random.key(1), len(m))], m, projections)
    assert float(permuted[D4]) == 0.0
    assert float(permuted[D2]) == pytest.approx(math.sqrt(2), abs=0.1)
    assert float(permuted[D3]) == pytest.approx(0.5, abs=0.1)
    v = jnp.arange(8.0)
    shifted = sliced_wasserstein(m + v[None], m, projections)
    np.testing.assert_allclose(shifted, jnp.abs(v @ projections).mean(), rtol=1e-5)
    np.testing.assert_allclose(sliced_wasserstein(m, m + v[None], projections), shifted, rtol=1e-6)


def test_wasserstein_of_numbers_is_that_of_their_sorted_values_and_matches_a_loop(m, projections):
    x, y = m[:, :1], m[:, 1:2]
    np.testing.assert_allclose(
        sliced_wasserstein(x, y, jnp.ones((1, 1))),
        np.abs(np.sort(np.asarray(x[:, 0])) - np.sort(np.asarray(y[:, 0]))).mean(),
        rtol=1e-6,
    )
    batch = jnp.stack([m + 0.3, -2 * m])
    loop = [
        np.mean([np.abs(np.sort(np.asarray(b @ w)) - np.sort(np.asarray(m @ w))).mean() for w in projections.T])
        for b in batch
    ]
    np.testing.assert_allclose(sliced_wasserstein(batch, m, projections), loop, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(projections, axis=0), 1.0, rtol=1e-6)


def test_fence_of_one_to_nine_and_of_a_gaussian():
    samples = jnp.concatenate([jnp.arange(1.0, 10.0), jnp.array([jnp.nan])])
    assert float(tukey_fence(samples, 1.5)) == 13.0
    assert float(tukey_fence(samples, 0.0)) == 7.0
    gaussian = jax.random.normal(jax.random.key(0), (200_000, 1))
    fence = float(tukey_fence(gaussian)[0])
    assert fence == pytest.approx(2.698, abs=0.03)
    assert float((gaussian > fence).mean()) == pytest.approx(0.0035, abs=5e-4)
    assert np.isnan(tukey_fence(jnp.full(4, jnp.nan)))


def test_summaries_average_what_they_are_told_to():
    message = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(message_summary(message), np.asarray(message).mean(0))
    np.testing.assert_array_equal(message_summary(message, (0, 1)), np.asarray(message).mean((0, 1))[None])
    assert message_summary(message.astype(jnp.bfloat16)).dtype == jnp.float32
    for axes in ((2,), (0, 3), (-1,)):
        with pytest.raises(ValueError, match="reduce_axes must be axes before the last one"):
            message_summary(message, axes)


# ------------------------------------------------------------------------------ the state machine

SHAPE = (2, 6, 4)  # B, N, D
SHORT = VerifierConfig(
    warmup_steps=40, window=20, num_directions=8, fence_factor=6.0
)  # no false alarms in a short test


@functools.partial(jax.jit, static_argnums=(3,))
def step(state, messages, taint, options):
    return verify(state, messages, taint, options)


def honest(t, replicas=5, spread=0.2):
    """Messages around a common structured mean, which the batch mean does not remove."""
    mean = jnp.linspace(-2, 2, math.prod(SHAPE[1:])).reshape(SHAPE[1:])
    return mean[None, None] + spread * jax.random.normal(jax.random.fold_in(jax.random.key(3), t), (replicas, *SHAPE))


def run(options, steps, change=lambda t, x: x, taint=lambda t: jnp.zeros(5, bool)):
    state, accepted = init_verifier(options, 5, SHAPE, key=jax.random.key(0)), []
    for t in range(steps):
        state, accept, replacement = step(state, change(t, honest(t)), taint(t), options)
        accepted.append(np.asarray(accept))
    return state, np.array(accepted), replacement


def test_reference_is_the_moving_average_from_the_first_message_on():
    options = VerifierConfig(threshold=math.inf)
    one = init_verifier(options, 1, (1, 1, 1), key=jax.random.key(0))._replace(started=jnp.array(True))
    for _ in range(10):
        one, _, replacement = step(one, jnp.ones((1, 1, 1, 1)), jnp.zeros(1, bool), options)
    assert float(one.reference[0, 0]) == pytest.approx(0.6513215599, abs=1e-6)
    assert float(replacement[0, 0, 0]) == pytest.approx(1 - 0.9**9, abs=1e-6)  # before the step
    state, _, _ = run(options, 4)
    expected = np.asarray(honest(0)).mean((0, 1))
    for t in range(1, 4):
        expected = 0.9 * expected + 0.1 * np.asarray(honest(t)).mean((0, 1))
    np.testing.assert_allclose(state.reference, expected, rtol=1e-5, atol=1e-6)


def test_a_flipped_message_is_rejected_replaced_and_its_sender_banned_after_five():
    flip = lambda t, x: x.at[3].multiply(-1.0) if t >= 50 else x
    state, accepted, replacement = run(SHORT, 54, flip)
    assert accepted[:50].all() and not accepted[50:, 3].any() and np.delete(accepted[50:], 3, axis=1).all()
    assert state.violations.tolist() == [0, 0, 0, 4, 0] and state.bans.tolist() == [0] * 5
    np.testing.assert_allclose(replacement, np.broadcast_to(honest(0).mean((0, 1))[None], SHAPE), atol=0.2)
    state, accepted, _ = run(SHORT, 55, flip)
    assert state.bans.tolist() == [0, 0, 0, 1, 0] and state.violations.tolist() == [0] * 5
    assert not state.flags.any()  # the newcomer starts with a clean record


def test_violations_that_lie_further_apart_than_the_horizon_ban_nobody():
    rare = lambda t, x: x.at[3].multiply(-1.0) if t >= 50 and t % 5 == 0 else x
    state, _, _ = run(SHORT, 100, rare)
    assert state.violations[3] == 10 and not state.bans.any()  # four of 20 steps at any time
    often = lambda t, x: x.at[3].multiply(-1.0) if t >= 50 and t % 4 == 0 else x
    assert run(SHORT, 73, often)[0].bans.tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("threshold", [None, math.inf])
def test_what_is_not_finite_is_contained_in_the_warm_up_too(value, threshold):
    options = VerifierConfig(warmup_steps=10, window=20, num_directions=8, threshold=threshold)
    poison = lambda t, x: x.at[1, 0, 2, 3].set(value) if t in (0, 5, 20, 21) else x
    state, accepted, replacement = run(options, 22, poison)
    assert [t for t in range(22) if not accepted[t, 1]] == [0, 5, 20, 21]
    assert np.isfinite(replacement).all() and np.isfinite(state.reference).all()
    assert state.violations.tolist() == [0, 2, 0, 0, 0]  # those after the warm-up
    expected = np.asarray(honest(0))[[0, 2, 3, 4]].mean((0, 1))  # the first step without replica 1
    first, _, _ = run(options, 1, poison)
    np.testing.assert_allclose(first.reference, expected, rtol=1e-5, atol=1e-6)


def test_tainted_messages_are_relayed_untested_and_teach_nothing_but_are_contained():
    garbage = lambda t, x: x.at[2].set(jnp.inf if t == 52 else 100.0) if t >= 50 else x
    tainted = lambda t: jnp.zeros(5, bool).at[2].set(t >= 50)
    state, accepted, _ = run(SHORT, 60, garbage, tainted)
    assert accepted[:52].all() and not accepted[52, 2] and accepted[53:].all() and not state.violations.any()
    clean, _, _ = run(SHORT, 60, lambda t, x: x.at[2].set(0.0) if t >= 50 else x, tainted)
    np.testing.assert_array_equal(state.reference, clean.reference)
    assert np.isnan(state.window[(jnp.arange(50, 60)) % 20][:, 2]).all()


def test_threshold_infinity_accepts_all_and_zero_nobody_after_the_warm_up():
    flip = lambda t, x: x.at[3].multiply(-1.0)
    _, accepted, _ = run(VerifierConfig(warmup_steps=5, threshold=math.inf, num_directions=8), 12, flip)
    assert accepted.all()
    _, accepted, _ = run(VerifierConfig(warmup_steps=5, threshold=0.0, num_directions=8), 12)
    assert accepted[:5].all() and not accepted[5:].any()


def test_votes_and_the_choice_of_distances():
    """A permutation of the tokens is seen by all distances but Wasserstein's."""
    permute = lambda t, x: x.at[0].set(x[0][:, ::-1]) if t >= 50 else x
    seen = lambda **options: not run(dataclasses.replace(SHORT, **options), 51, permute)[1][50, 0]
    assert seen(num_votes=3) and not seen(num_votes=4) and not seen(distances=("wasserstein",))


def test_a_worker_within_the_fences_moves_the_reference_by_its_share_at_most():
    options = VerifierConfig(warmup_steps=0, threshold=math.inf, num_directions=8, decay=0.9)
    delta, base = 0.3, jnp.ones((5, *SHAPE))
    state = init_verifier(options, 5, SHAPE, key=jax.random.key(0))
    state, _, _ = step(state, base, jnp.zeros(5, bool), options)
    for _ in range(5):
        before = state.reference
        poisoned = base.at[0].set(before[None] + delta)
        state, _, _ = step(state, poisoned, jnp.zeros(5, bool), options)
        honest_pull = 0.1 * (4 * (1 - before) + 0 * before) / 5
        np.testing.assert_allclose(state.reference - before - honest_pull, 0.1 * delta / 5, rtol=1e-3)


def test_sign_flips_from_a_third_shrink_an_average_that_includes_them_to_a_third():
    options = VerifierConfig(warmup_steps=0, num_directions=8, threshold=1.0)  # d2 of a sign flip is 2
    flip = lambda x: x.at[:2].multiply(-1.0)
    messages = jnp.ones((6, 2, 3, 4))
    state = init_verifier(options, 6, (2, 3, 4), key=jax.random.key(0))
    state, _, _ = step(state, messages, jnp.zeros(6, bool), options)
    included = state
    accept_all = VerifierConfig(warmup_steps=0, num_directions=8, threshold=math.inf)
    for _ in range(120):
        state, accept, _ = step(state, flip(messages), jnp.zeros(6, bool), options)
        included, _, _ = step(included, flip(messages), jnp.zeros(6, bool), accept_all)
    assert accept.tolist() == [False, False, True, True, True, True]
    np.testing.assert_allclose(state.reference, 1.0, rtol=1e-6)
    np.testing.assert_allclose(included.reference, 1 / 3, rtol=1e-4)


def test_honest_workers_pass_ten_thousand_steps():
    options, replicas, shape = VerifierConfig(), 4, (1, 4, 8)
    mean = jax.random.normal(jax.random.key(2), shape[1:])

    @jax.jit
    def simulate(state, key):
        def one(state, key):
            x = mean[None] + 0.3 * jax.random.normal(key, (replicas, *shape[1:]))
            return verify_summaries(state, x, jnp.zeros(replicas, bool), options)

        return jax.lax.scan(one, state, jax.random.split(key, 10_000))

    state, accept = simulate(init_verifier(options, replicas, shape, key=jax.random.key(0)), jax.random.key(1))
    assert accept[:1000].all()
    rate = 1 - float(accept[1000:].mean())
    assert 0 < rate < 0.01, rate
    assert not state.bans.any()


def test_rerouting_in_turn():
    assert reroute(jnp.zeros(3, bool)).tolist() == [0, 1, 2]
    assert reroute(jnp.array([True, True, False, True, False])).tolist() == [2, 4, 2, 2, 4]
    assert reroute(jnp.ones(3, bool)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"distances": ()}, r"distances must be some of .*, got \(\)"),
        ({"num_votes": 5}, r"num_votes must lie in \[1, 4\], got 5"),
        ({"fence_factor": 0.5}, "fence_factor must lie in fence_range"),
        ({"growth": 0.9}, "growth above 1"),
        ({"threshold": -1.0}, "threshold must not be negative"),
        ({"num_violations": 30}, "num_violations must fit into the horizon of 20 steps, got 30"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VerifierConfig(**options)


def test_a_verifier_needs_replicas_and_axes_that_exist():
    with pytest.raises(ValueError, match="num_replicas must be at least 1, got 0"):
        init_verifier(VerifierConfig(), 0, SHAPE, key=jax.random.key(0))
    with pytest.raises(ValueError, match="reduce_axes must be axes before the last one"):
        init_verifier(VerifierConfig(reduce_axes=(2,)), 3, SHAPE, key=jax.random.key(0))
    assert len(DISTANCES) == 4
