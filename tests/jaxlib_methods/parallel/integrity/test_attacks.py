"""The attacks send what their names say, from the worker, in the direction and at the steps of the plan alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.parallel.integrity import Attack, VerifierConfig, init_verifier, verify
from jaxlib_methods.parallel.integrity.attacks import check_attacks, init_attacks, tamper
from jaxlib_methods.parallel.integrity.distances import message_distances, message_summary
from jaxlib_methods.parallel.integrity.tampering import collude

X = 3.0 + 2.0 * jax.random.normal(jax.random.key(5), (2, 16, 8))


def sent(kind, value=None, x=X, **options):
    plan = [Attack(kind, stage=1, replica=0, value=value)]
    return tamper(
        plan, init_attacks(plan, x), x, key=jax.random.key(1), stage=1, replica=0, direction="forward", **options
    )[1]


@pytest.mark.contract
def test_attacks_without_memory():
    np.testing.assert_array_equal(sent("constant"), 0.0)
    np.testing.assert_array_equal(sent("constant", 1.0), 1.0)
    assert np.isnan(sent("constant", float("nan"))).all() and np.isinf(sent("constant", float("inf"))).all()
    np.testing.assert_array_equal(sent("scale"), -X)
    np.testing.assert_array_equal(sent("scale", 0.5), 0.5 * X)
    np.testing.assert_array_equal(sent("bias", 2.5), X + 2.5)
    np.testing.assert_array_equal(sent("random_sign", 0.0), X)
    np.testing.assert_array_equal(sent("random_sign", 1.0), -X)
    flipped = sent("random_sign", 0.3)
    np.testing.assert_array_equal(jnp.abs(flipped), jnp.abs(X))
    assert 0.2 < float((flipped != X).mean()) < 0.4


def test_random_values_are_standard_or_imitate_the_tensor():
    standard, matched = sent("random"), sent("random", 1)
    assert abs(float(standard.mean())) < 0.2 and 0.9 < float(standard.std()) < 1.1
    assert abs(float(matched.mean()) - 3) < 0.4 and 1.7 < float(matched.std()) < 2.3
    assert not np.array_equal(matched, X)


def test_invisible_noise_shifts_by_the_normal_quantile_of_the_level():
    np.testing.assert_allclose(sent("invisible_noise", 0.99), X + 2.3263478 * np.asarray(X).std(), rtol=1e-5)
    np.testing.assert_allclose(sent("invisible_noise", 0.5), X, rtol=1e-6)


def test_delay_is_silent_until_its_buffer_is_full_and_starts_late_if_told():
    plan = [Attack("delay", 1, 0, value=3, start=2), Attack("delay", 1, 1, value=5)]
    states = [init_attacks(plan, jnp.zeros(()))] * 2
    seen = []
    for t in range(12):
        outs = []
        for replica in range(2):
            states[replica], out = tamper(
                plan,
                states[replica],
                jnp.float32(t),
                key=jax.random.key(0),
                stage=1,
                replica=replica,
                direction="forward",
            )
            outs.append(float(out))
        seen.append(outs)
    assert [s[0] for s in seen] == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]
    assert [s[1] for s in seen] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]


def test_only_the_worker_the_direction_and_the_steps_of_the_plan_are_hit():
    plan = [Attack("bias", stage=1, replica=2, direction="backward", start=3, stop=5)]

    @jax.jit
    def one(state, stage, replica):  # traced, as on a mesh
        return tamper(
            plan, state, jnp.zeros(()), key=jax.random.key(0), stage=stage, replica=replica, direction="backward"
        )

    for stage in range(3):
        for replica in range(3):
            state, values = init_attacks(plan, jnp.zeros(())), []
            for _ in range(7):
                state, out = one(state, jnp.int32(stage), jnp.int32(replica))
                values.append(float(out))
            assert values == ([0, 0, 0, 1, 1, 0, 0] if (stage, replica) == (1, 2) else [0] * 7)
    state = init_attacks(plan, jnp.zeros(()))._replace(count=jnp.int32(3))
    arguments, key = (plan, state, jnp.zeros(())), jax.random.key(0)
    assert tamper(*arguments, key=key, stage=1, replica=2, direction="forward")[1] == 0
    assert tamper(*arguments, key=key, stage=1, replica=2, direction="backward", banned=jnp.array(True))[1] == 0


def test_an_adaptive_attacker_stays_within_the_fences_and_is_not_found():
    options = VerifierConfig(warmup_steps=30, window=20, num_directions=8, fence_factor=3.0)
    state = init_verifier(options, 4, X.shape, key=jax.random.key(0))
    step = jax.jit(lambda state, messages: verify(state, messages, jnp.zeros(4, bool), options))
    for t in range(40):
        state, accept, _ = step(state, X[None] + 0.3 * jax.random.normal(jax.random.key(t), (4, *X.shape)))
    attack = sent("adaptive", 0.9, verifier=state)
    distances = message_distances(message_summary(attack), state.reference, state.projections)
    share = np.asarray(distances / state.fences)
    assert 0.3 < share.max() <= 0.9 + 1e-4, share
    _, accept, _ = step(state, jnp.broadcast_to(attack[None], (4, *X.shape)))
    assert accept.all()
    channels = VerifierConfig(reduce_axes=(0, 1), threshold=0.5)
    state = init_verifier(channels, 4, X.shape, key=jax.random.key(0))._replace(reference=jnp.ones((1, 8)))
    flat = sent("adaptive", verifier=state, reduce_axes=(0, 1))
    np.testing.assert_array_equal(flat, jnp.broadcast_to(flat[0, 0], X.shape))  # the verifier sees means alone
    with pytest.raises(ValueError, match="adaptive attack needs the verifier"):
        sent("adaptive")


def test_colluding_workers_send_one_tensor():
    messages = jnp.arange(10.0).reshape(5, 2)
    malicious = jnp.array([False, True, True, False, True])
    np.testing.assert_array_equal(collude(messages, malicious, 0.0), messages)
    np.testing.assert_array_equal(collude(messages, malicious, 0.6)[jnp.array([2, 4])], messages[jnp.array([1, 4])])
    np.testing.assert_array_equal(collude(messages, malicious, 1.0)[jnp.array([2, 4])], messages[jnp.array([1, 1])])
    np.testing.assert_array_equal(collude(messages, jnp.zeros(5, bool), 1.0), messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "gaussian"}, "kind must be one of 'constant', 'random', .*, got 'gaussian'"),
        ({"direction": "sideways"}, "direction must be one of .*, got 'sideways'"),
        ({"start": 5, "stop": 5}, "0 <= start < stop, got start=5, stop=5"),
        ({"kind": "delay", "value": 0}, "the value of 'delay' is the age in steps; 0 is none"),
        ({"kind": "random_sign", "value": 1.5}, "the probability .*; 1.5 is none"),
        ({"kind": "invisible_noise", "value": 1.0}, "the level p .*; 1.0 is none"),
    ],
)
def test_bad_attacks_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Attack(**{"kind": "bias", "stage": 0, "replica": 0} | options)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Attack("bias", stage=6, replica=0), "on a stage that does not exist: the pipeline has 6, numbered from 0"),
        (Attack("bias", stage=-1, replica=0), "on a stage that does not exist"),
        (Attack("bias", stage=1, replica=8), "on a replica that does not exist: the pipeline has 8"),
        (Attack("bias", stage=5, replica=0, direction="forward"), "the last stage sends no activations"),
        (Attack("bias", stage=0, replica=0, direction="backward"), "the first stage sends no gradients"),
    ],
)
def test_attacks_on_workers_that_do_not_exist_are_refused(attack, message):
    with pytest.raises(ValueError, match=message):
        check_attacks([attack], num_stages=6, num_replicas=8)
