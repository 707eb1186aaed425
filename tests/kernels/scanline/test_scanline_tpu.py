"""The TPU kernel: equal to the reference in the interpreter, lowering for a TPU, and what it says it cannot do.

Nothing here ran on a TPU: the interpreter checks numbers, `jax.export` checks that the program lowers to Mosaic.
"""

import jax
import jax.numpy as jnp
import pytest

from jaxlib_methods.kernels import scanline
from jaxlib_methods.kernels.scanline import ARG_SPECS, Pairwise, pallas_tpu
from jaxlib_methods.kernels.scanline.api import index_dtype
from jaxlib_methods.kernels.scanline.arg_specs import sweep_shape
from tests.kernels.scanline.scanline_cases import (
    PAIRWISE,
    assert_same_backward,
    assert_same_sweep,
    backward,
    backward_problem,
    forward,
    problem,
)

# (reverse, opposite, weighted): every flag in both states, for half the compilations of the full product
FLAGS = {name: (i % 2 == 1, i % 3 != 2, i % 4 < 2) for i, name in enumerate(PAIRWISE)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several position blocks, the last one ragged."""
    monkeypatch.setattr(pallas_tpu, "MAX_POSITIONS", 2)


def options(name):
    return dict(zip(("reverse", "opposite", "weighted"), FLAGS[name], strict=True))


@pytest.mark.contract
@pytest.mark.parametrize("name", PAIRWISE)
def test_interpreted_sweep_equals_the_reference_bit_for_bit(name):
    arguments, static, expected = problem(name, **options(name))
    found = forward(pallas_tpu, static, interpret=True)(*arguments)
    assert_same_sweep(found, expected, static["reverse"])


@pytest.mark.skipif(jax.default_backend() != "tpu", reason="there is no TPU here")
@pytest.mark.parametrize("name", PAIRWISE)
def test_on_the_device_as_in_the_interpreter(name):
    arguments, static, expected = problem(name, **options(name))
    found = forward(pallas_tpu, static)(*arguments)
    assert_same_sweep(found, expected, static["reverse"])
    arguments, static, expected = backward_problem(name, **options(name))
    found = backward(pallas_tpu, static)(*arguments)
    assert_same_backward(found, expected)


@pytest.mark.parametrize("name", ["potts", "linear_doubling", "table"])
def test_messages_do_not_depend_on_whether_indices_are_wanted(name):
    arguments, static, expected = problem(name, **options(name))
    found = forward(pallas_tpu, static | {"with_indices": False}, interpret=True)(*arguments)
    assert_same_sweep((found,), expected[:1], static["reverse"])


@pytest.mark.parametrize("name", PAIRWISE)
def test_interpreted_backward_equals_the_reference_bit_for_bit(name):
    arguments, static, expected = backward_problem(name, **options(name))
    found = backward(pallas_tpu, static, interpret=True)(*arguments)
    assert_same_backward(found, expected)


def test_a_wide_profile_loops_over_the_senders():
    arguments, static, expected = problem("wide", reverse=True, opposite=True, weighted=True, num_labels=20)
    found = forward(pallas_tpu, static, interpret=True)(*arguments)
    assert_same_sweep(found, expected, True)


def test_many_labels_and_few_lines():
    # uint16 indices, and fewer lines than a register has lanes
    arguments, static, expected = problem("potts", reverse=False, opposite=True, weighted=True, num_labels=260, lines=6)
    found = forward(pallas_tpu, static, interpret=True)(*arguments)
    assert found[1].dtype == jnp.uint16
    assert_same_sweep(found, expected, False)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_ragged_block_of_rubbish_does_not_reach_the_carry(reverse):
    # 5 positions in blocks of 2: walking down starts in the ragged block, which the interpreter fills with NaN.
    arguments, static, expected = problem("linear_window", reverse=reverse, opposite=True, weighted=True)
    found = forward(pallas_tpu, static, interpret=True)(*arguments)
    assert jnp.isfinite(found[0]).all()
    assert_same_sweep(found, expected, reverse)


def export_for_tpu(function, *arguments):
    return jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments).mlir_module()


@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("vertical", [False, True])
def test_named_workloads_lower_for_a_tpu(spec, vertical, monkeypatch):
    monkeypatch.undo()  # the block sizes that a user gets
    shape = sweep_shape(spec, vertical=vertical)
    floats, weights = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((shape[0], shape[2]), jnp.float32)
    index = index_dtype(spec.args["u"].shape[1])
    p, q = jax.ShapeDtypeStruct(shape, index), jax.ShapeDtypeStruct((shape[0], shape[2]), index)
    options = {"edge_probability": 0.5, "reverse": vertical, "implementation": "pallas_tpu"}
    sweep = lambda u, opposite, pairwise, w: scanline.sweep(
        u, opposite, pairwise, edge_weight=w, with_indices=True, **options
    )
    text = export_for_tpu(sweep, floats, floats, spec.args["pairwise"], weights if vertical else None)
    assert "scanline_sweep" in text and "tpu_custom_call" in text
    sweep_back = lambda dm, opposite, p, q, pairwise, w: scanline.sweep_backward(
        dm, opposite, p, q, pairwise, edge_weight=w, **options
    )
    text = export_for_tpu(sweep_back, floats, floats, p, q, spec.args["pairwise"], weights if vertical else None)
    assert "scanline_sweep_backward" in text and "tpu_custom_call" in text


@pytest.mark.parametrize("num_labels", [21, 300])
@pytest.mark.parametrize("name", PAIRWISE)
def test_every_kind_lowers_for_label_counts_off_the_tile(name, num_labels):
    pairwise = PAIRWISE[name]
    if name == "table":
        pairwise = Pairwise("table", jnp.float32(1), table=jnp.zeros((num_labels, num_labels), jnp.float32))
    u = jax.ShapeDtypeStruct((9, num_labels, 200), jnp.float32)
    assert "tpu_custom_call" in export_for_tpu(forward(pallas_tpu, {"edge_probability": 1.0}), u, None, pairwise)


def test_can_use_names_what_is_in_the_way():
    potts = PAIRWISE["potts"]
    shape = (384, 16, 288)
    assert pallas_tpu.can_use(shape, jnp.float32, potts) is None
    assert "float32, got float64" in pallas_tpu.can_use(shape, jnp.float64, potts)
    assert "step (1, 0), got (1, -1)" in pallas_tpu.can_use(shape, jnp.float32, potts, step=(1, -1))
    assert "bytes of VMEM" in pallas_tpu.can_use((8, 4096, 128), jnp.float32, potts)
    with pytest.raises(NotImplementedError, match="step"):
        scanline.sweep(
            jnp.zeros((3, 2, 4), jnp.float32),
            None,
            potts,
            edge_probability=1.0,
            step=(1, 1),
            implementation="pallas_tpu",
        )


def test_blocks_fit_the_vmem_budget_and_small_ones_need_not_be_cut(monkeypatch):
    monkeypatch.undo()
    for spec in ARG_SPECS:
        block = pallas_tpu.block_positions(sweep_shape(spec), spec.args["pairwise"], arrays=3, indices=True)
        assert 1 <= block <= pallas_tpu.MAX_POSITIONS
        needed = pallas_tpu.vmem_bytes(spec.args["u"].shape[1], block, spec.args["pairwise"], arrays=3, indices=True)
        assert needed <= pallas_tpu.VMEM_BUDGET
        twice = pallas_tpu.vmem_bytes(spec.args["u"].shape[1], 2 * block, spec.args["pairwise"], arrays=3, indices=True)
        assert block == pallas_tpu.MAX_POSITIONS or twice > pallas_tpu.VMEM_BUDGET
    assert pallas_tpu.block_positions((3, 16, 128), PAIRWISE["potts"], arrays=3, indices=True) == 4


def test_vmem_of_one_position_by_hand():
    # u, q, m: 3 * 16 rows of 4 bytes; weights 8 * 4; P and Q: one tile of 32 rows each; all twice; the carry once.
    expected = 2 * 128 * (3 * 16 * 4 + 8 * 4 + 32 + 32) + 128 * 16 * 4
    assert pallas_tpu.vmem_bytes(16, 1, PAIRWISE["potts"], arrays=3, indices=True) == expected
