"""The scanline benchmark on a tiny workload: its cases compute the same thing, and a CPU says what it leaves out."""

import jax
import numpy as np
import pytest

from benchmarks import timing
from benchmarks._machinery import ceilings
from benchmarks.cases import scanline
from benchmarks.timing import Options
from jaxlib_methods.kernels import ArgSpec
from jaxlib_methods.kernels.scanline import Pairwise, arg_specs

COSTS = jax.ShapeDtypeStruct((9, 8, 6), np.float32)
PAIRWISE = Pairwise("truncated_linear", np.float32(2), truncation=2, semimetric=True)
TINY = ArgSpec("tiny", {"u": COSTS, "opposite": COSTS, "pairwise": PAIRWISE}, "this test")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(arg_specs, "ARG_SPECS", (TINY,))
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**16})


def test_a_cpu_times_xla_and_says_that_it_skips_the_kernels():
    options = Options(quick=True)
    records = list(scanline.run(options))
    assert [r.case for r in records] == [f"tiny batch=1 {mode}" for mode in ("pair", "backward", "iteration")]
    assert {r.implementation for r in records} == {"xla"}
    assert {r.error for r in records} == {0.0}
    entries = 6 * 9 * 8
    assert [r.bytes for r in records] == [24 * entries, (8 + 12) * entries + 2 * (entries + 54), 80 * entries]
    for mode in ("pair", "backward", "iteration"):
        for home, kernel in (("GPU", "pallas_gpu"), ("TPU", "pallas_tpu")):
            note = f"scanline [tiny batch=1 {mode}]: {kernel} skipped: "
            assert any(n.startswith(note) and (home in n or "JAX 0.11" in n) for n in options.notes)


def test_a_case_pattern_leaves_the_others_out():
    assert [r.case for r in scanline.run(Options(case="*iteration"))] == ["tiny batch=1 iteration"]


@pytest.mark.parametrize("batch", [1, 2])
def test_an_iteration_is_that_of_the_pair_form_on_transposed_arrays(batch):
    case = scanline._iteration(TINY, batch, "iteration", "cpu")
    implementation = case.implementations["xla"]
    messages, thetas = implementation.args
    assert [m.shape for m in messages] == [(9, 8, 6 * batch)] * 2 + [(6, 8, 9 * batch)] * 2
    found = implementation.function(jax.tree.map(lambda m: m + 0.0, messages), thetas)
    assert all(np.isfinite(m).all() and np.any(m) for m in found)
    # The rows' messages of the first iteration know nothing of the columns'.
    pair = scanline._pair(TINY, batch, "pair", "cpu").implementations["xla"]
    zero = np.zeros((9, 8, 6 * batch), np.float32)
    for ours, theirs in zip(found[:2], pair.function(thetas[0], zero, zero.copy()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_on_its_own_platform_a_kernel_stands_beside_xla(monkeypatch):
    for module in (scanline.pallas_gpu, scanline.pallas_tpu):
        monkeypatch.setattr(module, "can_use", lambda *args: None)
    monkeypatch.setattr(scanline.pallas_gpu, "device_reason", lambda: None)
    for platform, kernel in scanline.KERNELS.items():
        case = scanline._pair(TINY, 1, "pair", platform)
        run = {name for name, i in case.implementations.items() if isinstance(i, timing.Implementation)}
        lanes = {f"pallas_gpu, {k} lanes" for k in (2, 4, 8)} if platform == "gpu" else set()
        assert run == {kernel, "xla"} | lanes
    reason = "written for Hopper"
    monkeypatch.setattr(scanline.pallas_gpu, "device_reason", lambda: reason)
    case = scanline._pair(TINY, 1, "pair", "gpu")
    assert case.implementations["pallas_gpu"].reason == reason
    assert set(case.implementations) == {"pallas_gpu", "pallas_tpu", "xla"}
