"""Packed weights: exact round trips, products equal to the dense ones, memory, and lowering for accelerators.

Nothing here ran on a TPU or GPU: the interpreter checks numbers, `jax.export` checks that programs lower.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import quantization as qn
from jaxlib_methods.kernels import packed_matmul as pm
from jaxlib_methods.kernels.packed_matmul import pallas_tpu, reference
from tests.kernels.packed_matmul.packed_cases import LABELS, problem, shapes_of


@pytest.mark.contract
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("depth", [1, 31, 32, 33, 100])
def test_codes_come_back_exactly(bits, depth):
    codes = np.random.default_rng(depth).integers(0, 2**bits, (depth, 5))
    words = pm.pack_codes(jnp.asarray(codes), bits)
    assert words.shape == (-(-depth * bits // 32), 5) and words.dtype == jnp.uint32
    np.testing.assert_array_equal(pm.unpack_codes(words, bits, depth), codes)
    rows = words.shape[0]
    for k in range(depth):  # the layout as it is written down
        np.testing.assert_array_equal((np.asarray(words)[k % rows] >> (bits * (k // rows))) & (2**bits - 1), codes[k])


@pytest.mark.parametrize("d", LABELS)
@pytest.mark.parametrize("shape", [(3, 70, 9), (1, 33, 600), (5, 64, 512)])
def test_the_reference_is_the_dense_product(d, shape):
    x, words, expected = problem(*shape, d)
    np.testing.assert_array_equal(pm.packed_matmul(x, words, LABELS[d]), expected)


def test_leading_axes_dtypes_and_vmap():
    x, words, expected = problem(6, 40, 8, 3, jnp.bfloat16)
    out = pm.packed_matmul(x.reshape(2, 3, 40), words, LABELS[3])
    assert out.dtype == jnp.bfloat16 and out.shape == (2, 3, 8)
    np.testing.assert_array_equal(out.reshape(6, 8), jnp.asarray(expected, jnp.bfloat16))
    by_row = jax.vmap(lambda row: pm.packed_matmul(row, words, LABELS[3]))(x)
    np.testing.assert_array_equal(by_row, out.reshape(6, 8))


def test_the_gradient_in_the_activations_is_that_of_the_dense_product():
    x, words, _ = problem(4, 40, 600, 2)
    dense = pm.decode(pm.unpack_codes(words, 1, 40), LABELS[2], jnp.float32)
    ours = jax.grad(lambda x: jnp.sum(pm.packed_matmul(x, words, LABELS[2]) ** 2))(x)
    np.testing.assert_allclose(ours, jax.grad(lambda x: jnp.sum((x @ dense) ** 2))(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("shape", "d"), [((5, 70, 9), 2), ((3, 100, 20), 3), ((9, 90, 7), 4)])
def test_the_interpreted_tpu_kernel_equals_the_reference(shape, d, dtype):
    x, words, _ = problem(*shape, d, dtype)
    run = functools.partial(pallas_tpu.matmul, labels=LABELS[d], bits=pm.bits_for(d), interpret=True)
    expected = reference.matmul(x, words, LABELS[d], pm.bits_for(d))
    np.testing.assert_array_equal(jax.jit(run)(x, words), expected)


def test_the_interpreted_tpu_kernel_over_several_ragged_blocks(monkeypatch):
    for name, size in {"BLOCK_M": 8, "BLOCK_N": 16, "BLOCK_ROWS": 2}.items():
        monkeypatch.setattr(pallas_tpu, name, size)
    x, words, expected = problem(13, 32 * 7 - 5, 40, 2)  # seven rows of words in blocks of two
    run = functools.partial(pallas_tpu.matmul, labels=LABELS[2], bits=1, interpret=True)
    np.testing.assert_array_equal(jax.jit(run)(x, words), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("spec", pm.ARG_SPECS, ids=lambda spec: spec.name)
def test_named_workloads_lower_for_a_tpu(spec, dtype):
    run = functools.partial(pm.packed_matmul, labels=spec.args["labels"], implementation="pallas_tpu")
    exported = jax.export.export(jax.jit(run), platforms=["tpu"])(*shapes_of(spec, dtype))
    assert "packed_matmul" in exported.mlir_module() and "tpu_custom_call" in exported.mlir_module()


def test_the_program_for_everywhere_lowers_for_a_gpu():
    spec = next(spec for spec in pm.ARG_SPECS if spec.name == "transformer 1 token")
    run = functools.partial(pm.packed_matmul, labels=LABELS[2])
    exported = jax.export.export(jax.jit(run), platforms=["cuda"])(*shapes_of(spec, jnp.bfloat16))
    assert exported.platforms == ("cuda",) and "custom_call" not in exported.mlir_module()


@pytest.mark.parametrize(("d", "factor"), [(2, 32), (3, 16)])
def test_memory_of_weights_and_of_the_running_program(d, factor):
    m, depth, n = 4, 4096, 4096
    assert pm.cost_estimate(m, depth, n, pm.bits_for(d)).flops == 2 * m * depth * n
    x = jax.ShapeDtypeStruct((m, depth), jnp.float32)
    words = jax.ShapeDtypeStruct((depth * pm.bits_for(d) // 32, n), jnp.uint32)
    dense = 4 * depth * n
    assert dense == factor * 4 * words.size
    memory = jax.jit(functools.partial(pm.packed_matmul, labels=LABELS[d])).lower(x, words).compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert total < dense / 4  # one block of columns is decoded at a time, not the matrix


def test_none_means_the_program_that_runs_everywhere(monkeypatch):
    x, words, _ = problem(2, 40, 8, 2)
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert "pallas" not in str(jax.make_jaxpr(lambda x: pm.packed_matmul(x, words, LABELS[2]))(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 41), jnp.int32)}, "x must be floating"),
        ({"x": jnp.ones((2, 70))}, r"words must be uint32 \[3, N\] for 70 codes of 1 bits"),
        ({"words": jnp.ones((2, 8), jnp.int32)}, "got int32"),
        ({"labels": (1.0,)}, r"num_labels must lie in \[2, 256\], got 1"),
        ({"implementation": "cuda"}, "implementation must be None or one of"),
    ],
)
def test_mistakes_are_named(change, message):
    x, words, _ = problem(2, 40, 8, 2)
    arguments = {"x": x, "words": words, "labels": LABELS[2]} | change
    with pytest.raises(ValueError, match=message):
        pm.packed_matmul(arguments.pop("x"), arguments.pop("words"), arguments.pop("labels"), **arguments)


def test_what_the_kernels_do_not_do():
    x, words, _ = problem(2, 40, 8, 7)
    with pytest.raises(NotImplementedError, match="up to four labels"):
        pm.packed_matmul(x, words, LABELS[7], implementation="pallas_tpu")
    assert "float16" in pallas_tpu.can_use((2, 3, 4), jnp.float16, 2)


# ------------------------------------------------------------------------------------------ whole networks in bits


@pytest.mark.parametrize(("labels", "smaller"), [(qn.labels.BINARY, 31), (qn.labels.TERNARY, 15.5)])
def test_a_network_comes_back_bit_by_bit_and_takes_a_fraction_of_the_bytes(labels, smaller):
    lattice = qn.Lattice(labels, (("bias$", None),))
    params = {"conv": {"kernel": jnp.zeros((3, 3, 64, 96))}, "dense": {"kernel": jnp.zeros((1024, 300))}}
    network = qn.quantize(
        qn.init_auxiliary(params, qn.Lattice(labels), key=jax.random.key(0)), lattice=qn.Lattice(labels)
    )
    packed = qn.pack(network | {"bias": jnp.linspace(0, 1, 7)}, lattice)
    restored = qn.unpack(packed)
    np.testing.assert_array_equal(restored["conv"]["kernel"], network["conv"]["kernel"])
    np.testing.assert_array_equal(restored["dense"]["kernel"], network["dense"]["kernel"])
    np.testing.assert_array_equal(restored["bias"], jnp.linspace(0, 1, 7))
    assert qn.packing.packed_bytes(network) > smaller * qn.packing.packed_bytes(packed | {"bias": None})
    x = jnp.round(4 * jax.random.normal(jax.random.key(1), (5, 1024)))
    ours = jax.jit(qn.packing.packed_matmul)(x, packed["dense"]["kernel"])
    np.testing.assert_array_equal(ours, x @ network["dense"]["kernel"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(), (5,), (70,), (1, 1), (2, 3, 4)])
def test_any_shape_and_dtype_comes_back(shape, dtype):
    labels = (0.3, -0.7, 5.0, 2.0, -4.0)
    w = jnp.asarray(np.random.default_rng(0).choice(labels, shape), dtype)
    back = qn.unpack(qn.pack(w, qn.Lattice(labels)))
    assert back.dtype == dtype and back.shape == shape
    np.testing.assert_array_equal(back, w)


def test_what_cannot_be_packed():
    with pytest.raises(ValueError, match="not in the label set"):
        qn.pack(jnp.array([0.5]), qn.Lattice())
    with pytest.raises(ValueError, match=r"a packed \(3, N\) matrix"):
        qn.packing.packed_matmul(jnp.ones((2, 3)), qn.pack(jnp.ones((2, 3)), qn.Lattice()))
