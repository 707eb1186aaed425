"""The benchmark of the plug-ins compares the same numbers, and the codec's form needs no array of the stream's size."""

import jax
import numpy as np

from benchmarks.cases import decentralised


def test_both_forms_give_the_same_coordinates_and_one_writes_nothing_as_large_as_the_stream(monkeypatch):
    monkeypatch.setattr(decentralised, "VOCABULARY", 64)
    case = decentralised.coordinates_case(128, 8)
    size = np.prod(decentralised.TOKENS) * 128 * 4
    results, temporaries = {}, {}
    for name, implementation in case.implementations.items():
        compiled = implementation.function.lower(*implementation.args).compile()
        results[name] = compiled(*implementation.args)
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
    np.testing.assert_allclose(results["projected"], results["direct"], atol=1e-5)
    assert temporaries["projected"] < size / 8 and temporaries["direct"] >= size


def test_the_codecs_of_a_boundary_return_what_crossed(monkeypatch):
    monkeypatch.setattr(decentralised, "VOCABULARY", 64)
    case = decentralised.share_case(64)
    for name, tolerance in (("subspace", 1e-5), ("bf16", 0.02), ("int8", 0.05)):
        implementation = case.implementations[name]
        x = implementation.args[0]
        received, _ = jax.eval_shape(implementation.function, *implementation.args)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), received) == jax.tree.map(lambda a: (a.shape, a.dtype), x)
        close = jax.tree.map(
            lambda a, b: np.allclose(a, b, atol=tolerance), implementation.function(*implementation.args)[0], x
        )
        assert all(jax.tree.leaves(close)), name


def test_verifiers_let_messages_of_the_same_kind_through_and_learn_from_them():
    messages = 1 + 0.01 * jax.random.normal(jax.random.key(0), (3, 2, 3, 8))
    implementation = decentralised._verifiers(messages[0], messages, distances=("absolute",), window=5)
    (forward, state), (backward, other) = implementation.function(*implementation.args)
    np.testing.assert_array_equal(forward, messages[0])
    np.testing.assert_array_equal(backward, -messages[0])
    assert int(state.count) == 2 and int(state.violations.sum()) == 0
    expected = np.array(messages.mean(axis=1).mean(axis=0))
    np.testing.assert_allclose(state.reference, expected, atol=1e-6)
    moved = (messages.mean(axis=1).sum(axis=0) - 2 * messages[0].mean(axis=0)) / 3  # with the negative of the first
    np.testing.assert_allclose(other.reference, 0.8 * expected + 0.2 * moved, atol=1e-6)
