"""The peers of the selection's benchmark return the same masks as ours, ties included."""

import jax
import numpy as np
import pytest

from benchmarks.cases import threshold_selection
from benchmarks.timing import Implementation
from jaxlib_methods.kernels.threshold import ArgSpec


@pytest.mark.parametrize("ties", [False, True])
def test_all_implementations_agree(ties):
    spec = ArgSpec("tiny", "this test", {"a/kernel": (20, 30), "a/bias": (30,), "b/kernel": (30, 10)}, 0.6)
    case = threshold_selection._case(spec, "tiny", ties)
    results = {
        name: implementation.canonical(implementation.function(*implementation.args))
        for name, implementation in case.implementations.items()
        if isinstance(implementation, Implementation)
    }
    assert {"keep_largest", "jax argsort", "jax top_k", "numpy partition"} <= results.keys()
    for masks in results.values():
        assert sum(int(mask.sum()) for mask in jax.tree.leaves(masks)) == spec.kappa
        for name in spec.shapes:
            np.testing.assert_array_equal(masks[name], results["jax argsort"][name])
