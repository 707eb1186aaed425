"""The benchmark of the plug-ins compares the same numbers, and the codec's form needs no array of the stream's size."""

import jax
import numpy as np

from benchmarks import decentralised


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
