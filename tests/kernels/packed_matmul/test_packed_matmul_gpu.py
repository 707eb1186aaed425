"""The GPU kernel for packed weights: equal to the dense product in the interpreter, lowering for an H200, its limits.

Nothing here ran on a GPU: the interpreter checks numbers and the order of copies, `jax.export` checks that the program
lowers to Mosaic. Neither compiles it for the device.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.kernels import packed_matmul as pm
from tests.kernels.mosaic_gpu import export_for_h200, interpreted, needs_mosaic
from tests.kernels.packed_matmul.packed_cases import LABELS, problem, shapes_of

pallas_gpu = pytest.importorskip("jaxlib_methods.kernels.packed_matmul.pallas_gpu")
FEW_ROWS = [spec for spec in pm.ARG_SPECS if spec.args["x"].shape[0] <= 8]


@pytest.mark.contract
@needs_mosaic
@pytest.mark.parametrize(
    ("shape", "d", "dtype"),
    [((1, 70, 9), 2, jnp.float32), ((3, 300, 256), 3, jnp.float32), ((5, 150, 140), 4, jnp.bfloat16)],
)
def test_the_interpreted_kernel_is_the_dense_product(shape, d, dtype):
    x, words, expected = problem(*shape, d, dtype)
    run = functools.partial(pallas_gpu.matmul, labels=LABELS[d], bits=pm.bits_for(d))
    found = jax.jit(functools.partial(run, interpret=interpreted(detect_races=True)))(x, words)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, jnp.asarray(expected, dtype))


@needs_mosaic
@pytest.mark.parametrize("spec", FEW_ROWS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(("m", "dtype"), [(1, jnp.float32), (8, jnp.bfloat16)])
def test_named_workloads_lower_for_an_h200(spec, m, dtype):
    x, words = shapes_of(spec, dtype)
    run = functools.partial(pm.packed_matmul, labels=spec.args["labels"], implementation="pallas_gpu")
    text = export_for_h200(run, jax.ShapeDtypeStruct((m, x.shape[1]), x.dtype), words)
    assert "custom_call @mosaic_gpu_v2" in text and "packed_matmul" in text


@needs_mosaic
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")
@pytest.mark.parametrize("spec", FEW_ROWS, ids=lambda spec: spec.name)
def test_on_the_device(spec):
    x, words, expected = problem(*spec.args["x"].shape, spec.args["words"].shape[1], len(spec.args["labels"]))
    found = pm.packed_matmul(x, words, spec.args["labels"], implementation="pallas_gpu")
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(("rows", "n"), [(128, 4096), (784, 4096), (256, 4096), (4096, 16384), (25, 300), (1, 7)])
def test_blocks_divide_where_they_can_and_are_enough(rows, n):
    block_rows, block_columns = pallas_gpu.choose_block(rows, n)
    blocks = -(-rows // block_rows) * -(-n // block_columns)
    assert (n % 128 or n % block_columns == 0) and (rows % 8 or rows % block_rows == 0)
    assert blocks >= pallas_gpu.BLOCKS or block_rows == min(pallas_gpu.ROWS)
    # Words and the activations of 16 or 32 planes: a few blocks at once in a multiprocessor's 228 KiB.
    assert 4 * block_rows * (block_columns + 32 * pallas_gpu.MAX_M) <= 2**17


@needs_mosaic
def test_can_use_names_what_is_in_the_way(monkeypatch):
    assert pallas_gpu.can_use((1, 4096, 4096), jnp.bfloat16, 2) is None
    assert "at most 8 rows of activations, got 9" in pallas_gpu.can_use((9, 4096, 4096), jnp.float32, 2)
    assert "float64" in pallas_gpu.can_use((1, 4096, 4096), jnp.float64, 2)
    assert "without empty axes" in pallas_gpu.can_use((1, 4096, 0), jnp.float32, 2)
    x, words, _ = problem(2, 40, 8, 7)
    with pytest.raises(NotImplementedError, match="up to four labels by selects, got 7"):
        pm.packed_matmul(x, words, LABELS[7], implementation="pallas_gpu")
    monkeypatch.setattr(pallas_gpu, "MOSAIC_GPU_MISSING", "Mosaic GPU kernels need JAX 0.11 or newer, got 0.10.2")
    with pytest.raises(NotImplementedError, match=r"need JAX 0\.11 or newer"):
        pm.packed_matmul(x, words, LABELS[7], implementation="pallas_gpu")
