"""The named workloads, and the arithmetic and traffic that the cost models assign to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.kernels import scanline
from jaxlib_methods.kernels.scanline import Pairwise, api, cost, cost_estimate, dense
from jaxlib_methods.kernels.scanline.arg_specs import BY_NAME, SPECS, padding


def test_sizes_are_those_of_the_specification():
    entries = {"tsukuba": 1.77e6, "teddy": 10.1e6, "kitti": 44.7e6, "house": 16.8e6}
    for name, expected in entries.items():
        assert BY_NAME[name].entries == pytest.approx(expected, rel=0.01)
    assert len(BY_NAME) == len(SPECS)


def test_a_vertical_sweep_walks_columns_and_a_batch_adds_lines():
    assert BY_NAME["teddy"].shape() == (450, 60, 375)
    assert BY_NAME["teddy"].shape(vertical=True, batch=8) == (375, 60, 8 * 450)


@pytest.mark.parametrize(
    ("name", "distance", "value"),
    [
        ("tsukuba", 5, 40),
        ("teddy", 3, 10),
        ("map", 5, 20),
        ("venus", 6, 1800),
        ("venus", 9, 2450),
        ("penguin", 20, 5000),
    ],
)
def test_pairwise_costs_are_the_published_ones(name, distance, value):
    spec = BY_NAME[name]
    assert dense(spec.pairwise, spec.num_labels)[distance, 0] == value


def test_house_is_an_untruncated_quadratic():
    spec = BY_NAME["house"]
    assert dense(spec.pairwise, spec.num_labels)[255, 0] == 5 * 255**2


def test_padding_by_hand():
    assert padding(384, 128) == (384, 0.0)
    assert padding(375, 16) == (384, 9 / 384)
    assert padding(450, 128) == (512, 62 / 512)


def test_four_sweeps_and_the_rebuilt_unaries_give_the_pair_form_model():
    spec = BY_NAME["teddy"]
    sweeps = sum(2 * cost_estimate(*spec.shape(vertical=v), spec.pairwise).bytes_accessed for v in (False, True))
    assert sweeps + 2 * 16 * spec.entries == cost.ITERATION_BYTES["pair form"] * spec.entries
    assert cost.ITERATION_BYTES == {
        "running belief": 80,
        "pair form": 80,
        "pair form, u' by the reverse sweep": 64,
        "line on chip": 48,
    }


def test_traffic_counts_what_is_read_and_written():
    shape, potts = (10, 16, 20), Pairwise("potts", np.float32(1))
    pixels, entries = 200, 3200
    assert cost_estimate(*shape, potts, opposite=False).bytes_accessed == 8 * entries
    full = cost_estimate(*shape, potts, with_indices=True, weighted=True).bytes_accessed
    assert full == 12 * entries + entries + pixels + 4 * pixels
    backward = cost.backward_cost_estimate(*shape, potts)
    assert backward.bytes_accessed == 12 * entries + entries + pixels
    assert cost.backward_cost_estimate(10, 300, 20, potts, opposite=False).bytes_accessed == 60000 * (8 + 2) + 400


@pytest.mark.parametrize(
    ("name", "shifts"), [("teddy", 1), ("tsukuba", 3), ("venus", 13), ("kitti", 96), ("house", 256)]
)
def test_backward_arithmetic_grows_with_the_shifts_of_the_routing(name, shifts):
    spec = BY_NAME[name]
    flops = cost.backward_cost_estimate(*spec.shape(), spec.pairwise).flops
    loop = 0 if name == "house" else 3
    assert flops == spec.entries * (7 + 2 * shifts + loop)


@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
def test_none_means_the_program_that_was_measured(platform, monkeypatch):
    # No kernel has been timed on its device: a caller who names none gets XLA everywhere.
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    run = lambda u: scanline.sweep(u, None, Pairwise("potts", jnp.float32(1), semimetric=True), rho=1.0)
    assert "pallas" not in str(jax.make_jaxpr(run)(jnp.zeros((3, 4, 5), jnp.float32)))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_one_table_puts_a_measured_kernel_first_and_what_it_refuses_goes_to_xla(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setitem(api._PREFERENCE, platform, (f"pallas_{platform}", "xla"))
    run = lambda u, step: scanline.sweep(
        u, None, Pairwise("potts", jnp.float32(1), semimetric=True), rho=1.0, step=step
    )
    if platform == "tpu":
        text = str(jax.make_jaxpr(lambda u: run(u, (1, 0)))(jnp.zeros((3, 4, 5), jnp.float32)))
        assert "scanline_sweep" in text
    text = str(jax.make_jaxpr(lambda u: run(u, (1, 1)))(jnp.zeros((3, 4, 5), jnp.float32)))
    assert "scanline_sweep" not in text


def test_if_nothing_works_every_reason_is_told(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setitem(api._PREFERENCE, "tpu", ("pallas_tpu", "pallas_gpu"))
    u = jnp.zeros((3, 4, 5), jnp.float32)
    with pytest.raises(ExceptionGroup) as caught:
        scanline.sweep(u, None, Pairwise("potts", jnp.float32(1), semimetric=True), rho=1.0, step=(1, 1))
    assert [str(reason).split(":")[0] for reason in caught.value.exceptions] == ["pallas_tpu", "pallas_gpu"]
