"""The peers of the selection's benchmark return the same masks as ours, ties included."""

import jax
import numpy as np
import pytest

from benchmarks.cases import threshold_selection
from benchmarks.timing import Implementation
from jaxlib_methods.kernels import ArgSpec

SCORES = {
    name: jax.ShapeDtypeStruct(shape, np.float32)
    for name, shape in {"a/kernel": (20, 30), "a/bias": (30,), "b/kernel": (30, 10)}.items()
}


@pytest.mark.parametrize("ties", [False, True])
def test_all_implementations_agree(ties):
    spec = ArgSpec("tiny", {"scores": SCORES, "num_keep": 372}, "this test")
    case = threshold_selection._case(spec, "tiny", ties)
    results = {
        name: implementation.canonical(implementation.function(*implementation.args))
        for name, implementation in case.implementations.items()
        if isinstance(implementation, Implementation)
    }
    assert {"keep_largest", "jax argsort", "jax top_k", "numpy partition"} <= results.keys()
    for masks in results.values():
        assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) == 372
        for name in SCORES:
            np.testing.assert_array_equal(masks[name], results["jax argsort"][name])
