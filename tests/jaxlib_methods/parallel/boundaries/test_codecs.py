"""Codecs against loops in NumPy: what is lost, how many bytes it takes, what is remembered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.parallel import boundaries

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 8)), jnp.float32)


def there_and_back(codec, x, sender, receiver):
    message, sender = codec.encode(x, sender)
    x, receiver = codec.decode(message, receiver)
    return x, sender, receiver


def once(codec, x):
    return there_and_back(codec, x, codec.init(x), codec.init(x))[0]


CODECS = {
    "identity": (boundaries.identity_codec(), 32.0, 0.0),
    "bfloat16": (boundaries.cast_codec(), 16.0, 2**-8),
    "int8": (boundaries.int8_codec(), 8 + 4.0, 1 / 254),
    "int8 in blocks": (boundaries.int8_codec(4), 8 + 2 * 4.0, 1 / 254),
    "top-k": (boundaries.top_k_codec(3), 3 * (4 + 1.0), 1.0),
    "delta, 4 bits": (boundaries.delta_codec(4, 2), 4 + 4.0, 1 / 14),
    "delta, 2 bits": (boundaries.delta_codec(2, 2), 2 + 4.0, 1 / 2),
    "delta, first epoch": (boundaries.delta_codec(None, 2), 32.0, 0.0),
}


@pytest.mark.contract
@pytest.mark.parametrize("name", CODECS)
def test_bytes_of_a_token_and_largest_error(name):
    """The error is bounded by a share of the token's largest entry; integers and the tree's form are kept."""
    codec, bytes_per_token, share = CODECS[name]
    assert boundaries.payload_bytes(codec, X) / 12 == bytes_per_token
    tree = {"x": X, "ids": jnp.arange(12).reshape(3, 4), "g": [X[0].astype(jnp.bfloat16)]}
    decoded = jax.jit(lambda tree: once(codec, tree))(tree)
    np.testing.assert_array_equal(decoded["ids"], tree["ids"])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), decoded) == jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    bound = share * np.max(np.abs(X), axis=-1, keepdims=True)
    assert np.all(np.abs(decoded["x"] - X) <= bound * (1 + 1e-5))
    assert np.any(decoded["x"] != X) == (share > 0)


def test_int8_against_a_loop_and_zeros_stay_zeros():
    x = np.array(X)
    x[0, 0] = 0
    expected = np.zeros_like(x)
    for index in np.ndindex(3, 4):
        for block in (slice(0, 4), slice(4, 8)):
            scale = np.max(np.abs(x[index][block]))
            expected[index][block] = np.round(x[index][block] * np.float32(127 / (scale or 1))) * (scale / 127)
    np.testing.assert_allclose(once(boundaries.int8_codec(4), jnp.asarray(x)), expected, rtol=1e-6, atol=1e-7)


def test_top_k_against_a_sort_and_error_feedback_loses_nothing_in_the_sum():
    sent = np.asarray(once(boundaries.top_k_codec(3), X))
    for index in np.ndindex(3, 4):
        order = np.argsort(-np.abs(np.asarray(X[index])))
        np.testing.assert_array_equal(sent[index][order[:3]], np.asarray(X[index])[order[:3]])
        np.testing.assert_array_equal(sent[index][order[3:]], 0)

    def total(codec):
        sender, receiver = codec.init(X), codec.init(X)
        step = jax.jit(lambda sender, receiver: there_and_back(codec, X, sender, receiver))
        out = jnp.zeros_like(X)
        for _ in range(20):
            x, sender, receiver = step(sender, receiver)
            out += x
        return out, sender

    with_memory, (residual,) = total(boundaries.top_k_codec(3))
    np.testing.assert_allclose(with_memory + residual, 20 * X, rtol=1e-4, atol=1e-4)
    without, _ = total(boundaries.top_k_codec(3, error_feedback=False))
    assert float(jnp.max(jnp.abs(without - 20 * X))) > 10 * float(jnp.max(jnp.abs(with_memory - 20 * X)))


def test_deltas_shrink_with_the_changes_and_both_ends_agree():
    """Two micro-batches that converge: the coded ones follow, much closer than the same bits of x itself."""
    first, later = boundaries.delta_codec(None, 2), boundaries.delta_codec(4, 2)
    rng = np.random.default_rng(1)
    direction = jnp.asarray(rng.normal(size=(2, *X.shape)), jnp.float32)
    at = lambda epoch, slot: X + direction[slot] * 0.5**epoch
    sender, receiver = first.init(X), first.init(X)
    encode_decode = jax.jit(lambda x, s, r: there_and_back(later, x, s, r))
    errors = []
    for epoch in range(6):
        for slot in range(2):
            x = at(epoch, slot)
            step = encode_decode if epoch else lambda x, s, r: there_and_back(first, x, s, r)
            decoded, sender, receiver = step(x, sender, receiver)
            errors.append(float(jnp.max(jnp.abs(decoded - x))))
    np.testing.assert_array_equal(sender[0].cache, receiver[0].cache)
    assert errors[0] == errors[1] == 0
    assert max(errors[-2:]) < 0.1 * max(errors[2:4])
    fresh, x = boundaries.delta_codec(4, 1), at(5, 0)
    assert float(jnp.max(jnp.abs(once(fresh, x) - x))) > 10 * errors[-2]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_bits_use_every_level(bits):
    levels = 2 ** (bits - 1) - 1
    x = jnp.linspace(-1, 1, 2 * levels + 1)
    x = jnp.concatenate([x, jnp.zeros(-len(x) % 4)])[None]
    codec = boundaries.delta_codec(bits, 1)
    np.testing.assert_allclose(once(codec, x), x, atol=1e-6)


def test_a_boundary_codes_activations_and_cotangents_apart():
    forward, backward = boundaries.top_k_codec(2), boundaries.cast_codec()
    transmit = boundaries.codecs.coded_boundary(forward, backward)
    g = jnp.asarray(np.random.default_rng(2).normal(size=X.shape), jnp.float32)
    states = forward.init(X), forward.init(X)
    (x, (sender, _)), vjp = jax.vjp(lambda x: transmit(x, states), X)
    np.testing.assert_array_equal(x, once(boundaries.top_k_codec(2), X))
    np.testing.assert_allclose(sender[0], X - x)
    zeros = jax.tree.map(jnp.zeros_like, states)
    np.testing.assert_array_equal(vjp((g, zeros))[0], g.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: boundaries.cast_codec("int8"), "dtype must be floating"),
        (lambda: boundaries.int8_codec(0), "block_size must be at least 1"),
        (lambda: once(boundaries.int8_codec(3), X), "block_size must divide the last axis, got 3 and 8"),
        (lambda: boundaries.top_k_codec(0), "k must be at least 1"),
        (lambda: once(boundaries.top_k_codec(9), X), "k must not exceed the last axis, got 9 and 8"),
        (lambda: boundaries.delta_codec(3, 1), "bits must be None or one of 2, 4, 8"),
        (lambda: boundaries.delta_codec(4, 0), "num_slots must be at least 1"),
        (lambda: once(boundaries.delta_codec(2, 1), X[..., :6]), "multiple of 4, got 6"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
