"""The quantization benchmark: packed products agree with the dense ones, and every step traces to its own variables."""

import jax
import pytest

from benchmarks.cases import quantization as benchmark
from benchmarks.timing import Implementation, Options, measure
from jaxlib_methods.kernels import packed_matmul as kernel


@pytest.mark.parametrize("spec", kernel.ARG_SPECS[:2], ids=lambda spec: spec.name)
def test_products_agree_to_the_last_bit(spec):
    case = benchmark._matmul_case("case", spec)
    options = Options(quick=True)
    records = {r.implementation: r for r in measure(case, options, clock=iter(range(10**6)).__next__)}
    assert set(records) == {"packed", "float32", "int8"}
    assert all(record.error == 0 for record in records.values())
    assert any("runs on a TPU" in note for note in options.notes)
    assert any("runs on a GPU" in note for note in options.notes)


@pytest.mark.parametrize("network", ["lenet300", "lenet5"])
def test_steps_give_back_variables_like_those_they_take(network):
    batch, shape = benchmark.NETWORKS[network]
    case = benchmark._step_case("case", network, batch, shape)
    assert {*benchmark.METHODS, "float"} == set(case.implementations)
    for implementation in case.implementations.values():
        assert isinstance(implementation, Implementation)
        with jax.numpy_dtype_promotion("standard"):  # optax.adam's counter needs it
            after = jax.eval_shape(implementation.function, *implementation.args)
        for old, new in zip(jax.tree.leaves(implementation.args), jax.tree.leaves(after), strict=True):
            assert (old.shape, old.dtype) == (new.shape, new.dtype)
