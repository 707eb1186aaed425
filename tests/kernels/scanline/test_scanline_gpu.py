"""The GPU kernel: equal to the reference in the interpreter, lowering for an H200, and what it says it cannot do.

Nothing here ran on a GPU: the interpreter checks numbers and the order of copies, `jax.export` checks that the program
lowers to Mosaic within the shared memory of a block. Neither compiles it for the device.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.kernels import scanline
from jaxlib_methods.kernels.scanline import ARG_SPECS, Pairwise
from jaxlib_methods.kernels.scanline.arg_specs import sweep_shape
from tests.kernels.mosaic_gpu import export_for_h200, interpreted, needs_mosaic
from tests.kernels.scanline.scanline_cases import (
    BY_NAME,
    PAIRWISE,
    assert_same_backward,
    assert_same_sweep,
    backward,
    backward_problem,
    forward,
    problem,
)

pallas_gpu = pytest.importorskip("jaxlib_methods.kernels.scanline.pallas_gpu")
layouts = pytest.importorskip("jaxlib_methods.kernels.scanline.pallas_gpu_config")

# (reverse, opposite, weighted, lanes per line): every path in registers, shifts and table loops across lanes as well
RUNS = {
    "potts": (False, True, True, 1),
    "linear_window": (True, True, True, 1),
    "linear_doubling": (False, False, False, 1),
    "linear_general": (True, True, False, 1),
    "window": (False, True, True, 2),
    "window_learned": (True, False, True, 1),
    "wide": (False, True, False, 1),
    "table": (True, True, False, 1),
}
ACROSS_LANES = {
    "potts": (True, True, False, 4),
    "linear_doubling": (True, True, True, 4),
    "window": (False, False, False, 4),
    "table": (False, True, True, 4),
}
CASES = [(name, *run) for runs in (RUNS, ACROSS_LANES) for name, run in runs.items()]
LINES = 40  # one block of 128 or 64 padded lines, two of 32: the interpreter takes its time for each
IDS = [f"{name}-{lanes}lanes" for name, *_, lanes in CASES]


@pytest.mark.contract
@needs_mosaic
@pytest.mark.parametrize(("name", "reverse", "opposite", "weighted", "lanes"), CASES, ids=IDS)
def test_interpreted_sweep_equals_the_reference_bit_for_bit(name, reverse, opposite, weighted, lanes):
    arguments, static, expected = problem(name, reverse=reverse, opposite=opposite, weighted=weighted, lines=LINES)
    options = {"config": layouts.Config(lanes, slots=3), "interpret": interpreted()}
    found = forward(pallas_gpu, static, **options)(*arguments)
    assert_same_sweep(found, expected, reverse)


@needs_mosaic
@pytest.mark.parametrize(("name", "reverse", "opposite", "weighted", "lanes"), CASES, ids=IDS)
def test_interpreted_backward_equals_the_reference_bit_for_bit(name, reverse, opposite, weighted, lanes):
    arguments, static, expected = backward_problem(
        name, reverse=reverse, opposite=opposite, weighted=weighted, lines=LINES
    )
    options = {"config": layouts.Config(lanes, slots=2), "interpret": interpreted()}
    found = backward(pallas_gpu, static, **options)(*arguments)
    assert_same_backward(found, expected)


@needs_mosaic
def test_eight_lanes_as_for_256_labels():
    arguments, static, expected = problem(
        "linear_doubling", reverse=True, opposite=True, weighted=True, num_labels=16, lines=16
    )
    options = {"config": layouts.Config(8, slots=4), "interpret": interpreted()}
    found = forward(pallas_gpu, static, **options)(*arguments)
    assert_same_sweep(found, expected, True)


@needs_mosaic
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")
@pytest.mark.parametrize(("name", "reverse", "opposite", "weighted", "lanes"), CASES, ids=IDS)
def test_on_the_device_as_in_the_interpreter(name, reverse, opposite, weighted, lanes):
    flags = {"reverse": reverse, "opposite": opposite, "weighted": weighted}
    options = {"config": layouts.Config(lanes, slots=3)}
    arguments, static, expected = problem(name, **flags)
    found = forward(pallas_gpu, static, **options)(*arguments)
    assert_same_sweep(found, expected, reverse)
    arguments, static, expected = backward_problem(name, **flags)
    found = backward(pallas_gpu, static, **options)(*arguments)
    assert_same_backward(found, expected)


@needs_mosaic
def test_messages_do_not_depend_on_whether_indices_are_wanted():
    arguments, static, expected = problem(
        "linear_doubling", reverse=False, opposite=False, weighted=False
    )  # two blocks
    found = forward(pallas_gpu, static | {"with_indices": False}, interpret=interpreted())(*arguments)
    assert_same_sweep((found,), expected[:1], False)


@needs_mosaic
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_no_copy_overtakes_a_read_whatever_the_length_of_the_ring(slots):
    # 16 slots are more than the line has positions. The interpreter raises on a race and fills fresh memory with NaN.
    arguments, static, expected = problem("potts", reverse=True, opposite=True, weighted=True, lines=LINES)
    options = {"config": layouts.Config(1, slots), "interpret": interpreted(detect_races=True)}
    found = forward(pallas_gpu, static, **options)(*arguments)
    assert_same_sweep(found, expected, True)


@needs_mosaic
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_sweeps_of_named_workloads_lower_for_an_h200(spec):
    positions, _, lines = shape = sweep_shape(spec, batch=2)
    costs = jax.ShapeDtypeStruct(shape, jnp.float32)
    weights = jax.ShapeDtypeStruct((positions, lines), jnp.float32)
    options = {"edge_probability": 0.5, "with_indices": True, "implementation": "pallas_gpu"}
    sweep = lambda u, opposite, pairwise, w: scanline.sweep(u, opposite, pairwise, edge_weight=w, **options)
    text = export_for_h200(sweep, costs, costs, spec.args["pairwise"], weights)
    assert "custom_call @mosaic_gpu_v2" in text


@needs_mosaic
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_backwards_of_named_workloads_lower_for_an_h200(spec):
    positions, _, lines = shape = sweep_shape(spec, vertical=True)
    costs, p = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.uint8)
    q = jax.ShapeDtypeStruct((positions, lines), jnp.uint8)
    sweep_back = functools.partial(
        scanline.sweep_backward, edge_probability=0.5, reverse=True, implementation="pallas_gpu"
    )
    text = export_for_h200(sweep_back, costs, costs, p, q, spec.args["pairwise"])
    assert "custom_call @mosaic_gpu_v2" in text


@needs_mosaic
def test_the_budget_is_the_compilers():
    # One slot more than `choose` grants is refused by the compiler too, or leaves less than its reserve.
    spec = BY_NAME["house"]
    costs = jax.ShapeDtypeStruct((9, 256, 256), jnp.float32)
    config = layouts.Config(4, 3)
    assert layouts.smem_bytes(256, config, spec.args["pairwise"]) > layouts.SMEM_BUDGET
    with pytest.raises(ValueError, match="shared memory"):
        export_for_h200(
            forward(pallas_gpu, {"edge_probability": 0.5}, config=config), costs, costs, spec.args["pairwise"]
        )


def test_lanes_grow_with_the_labels_and_the_ring_fits_the_shared_memory():
    chosen = {spec.name: layouts.choose(spec.args["u"].shape[1], spec.args["pairwise"]) for spec in ARG_SPECS}
    assert {name: config.lanes for name, config in chosen.items()} == {
        "tsukuba": 1,
        "map": 1,
        "venus": 1,
        "teddy": 2,
        "kitti": 4,
        "penguin": 8,
        "house": 8,
    }
    for spec in ARG_SPECS:
        config = chosen[spec.name]
        assert spec.args["u"].shape[1] // config.lanes <= layouts.LABELS_PER_LANE
        assert layouts.MIN_SLOTS <= config.slots <= layouts.MAX_SLOTS
        for way_back in (False, True):
            assert layouts.smem_bytes(spec.args["u"].shape[1], config, spec.args["pairwise"], backward=way_back) <= (
                layouts.SMEM_BUDGET
            )


@pytest.mark.parametrize(("lines", "lanes"), [(384, 1), (320, 2), (288, 4), (304, 8), (300, 1), (8 * 288, 1)])
def test_blocks_that_divide_the_lines_come_first(lines, lanes):
    tsukuba = BY_NAME["tsukuba"]
    assert layouts.choose(tsukuba.args["u"].shape[1], tsukuba.args["pairwise"], lines).lanes == lanes


def test_shared_memory_by_hand():
    # 2 slots of u, q (16 labels, 128 lines) and a row of weights; 2 stages of m, P and Q; no shifts for Potts.
    block = 16 * 128
    expected = 2 * (2 * 4 * block + 4 * 128) + 2 * (4 * block + block + 128)
    assert layouts.smem_bytes(16, layouts.Config(1, 2), PAIRWISE["potts"]) == expected
    # Across lanes a window of radius 2 is read from 16 + 2 * 2 rows of 32 lines.
    narrow = layouts.Config(4, 2)
    extra = layouts.smem_bytes(16, narrow, PAIRWISE["linear_window"]) - layouts.smem_bytes(
        16, narrow, PAIRWISE["potts"]
    )
    assert extra == 4 * 32 * 20


@needs_mosaic
def test_can_use_names_what_is_in_the_way():
    potts, shape = PAIRWISE["potts"], (384, 16, 288)
    assert pallas_gpu.can_use(shape, jnp.float32, potts) is None
    assert "float32, got float64" in pallas_gpu.can_use(shape, jnp.float64, potts)
    assert "step (1, 0), got (2, 1)" in pallas_gpu.can_use(shape, jnp.float32, potts, step=(2, 1))
    assert "at most 256 labels, got 300" in pallas_gpu.can_use((384, 300, 288), jnp.float32, potts)
    assert "67 labels fit no register layout" in pallas_gpu.can_use((384, 67, 288), jnp.float32, potts)


@needs_mosaic
@pytest.mark.parametrize(("capability", "fits"), [("9.0", True), ("8.0", False), ("10.0", False), ("gfx942", False)])
def test_only_hopper_is_accepted(capability, fits, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability, device_kind="some GPU")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert (pallas_gpu.device_reason() is None) == fits
    if not fits:
        u = jax.ShapeDtypeStruct((3, 4, 128), jnp.float32)
        sweep = functools.partial(scanline.sweep, edge_probability=1.0, implementation="pallas_gpu")
        with pytest.raises(NotImplementedError, match=f"got some GPU with {capability}"):
            jax.eval_shape(sweep, u, None, PAIRWISE["potts"])


def test_an_old_jax_is_told_so(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "MOSAIC_GPU_MISSING", "Mosaic GPU kernels need JAX 0.11 or newer, got 0.10.2")
    assert "need JAX 0.11" in pallas_gpu.can_use((3, 2, 4), jnp.float32, PAIRWISE["potts"])
    u = jnp.zeros((3, 2, 4), jnp.float32)
    with pytest.raises(NotImplementedError, match=r"need JAX 0\.11 or newer"):
        scanline.sweep(u, None, PAIRWISE["potts"], edge_probability=1.0, implementation="pallas_gpu")
    index = jnp.zeros(u.shape, jnp.uint8)
    with pytest.raises(NotImplementedError, match=r"need JAX 0\.11 or newer"):
        scanline.sweep_backward(
            u, None, index, index[:, 0], PAIRWISE["potts"], edge_probability=1.0, implementation="pallas_gpu"
        )


@needs_mosaic
def test_kernels_carry_their_names():
    u = jax.ShapeDtypeStruct((4, 8, 128), jnp.float32)
    pairwise = Pairwise("potts", np.float32(1), semimetric=True)
    text = str(jax.make_jaxpr(forward(pallas_gpu, {"edge_probability": 1.0}))(u, None, pairwise))
    assert "scanline_sweep" in text
