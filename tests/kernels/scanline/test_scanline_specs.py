"""The named workloads, and the arithmetic and traffic that the cost models assign to them."""

import numpy as np
import pytest

from jaxlib_methods.kernels.scanline import ARG_SPECS, Pairwise, cost, cost_estimate, dense
from jaxlib_methods.kernels.scanline.arg_specs import padding, sweep_shape
from tests.kernels.scanline.scanline_cases import BY_NAME


@pytest.mark.contract
def test_sizes_are_those_of_the_published_problems():
    entries = {"tsukuba": 1.77e6, "teddy": 10.1e6, "kitti": 44.7e6, "house": 16.8e6}
    for name, expected in entries.items():
        assert BY_NAME[name].args["u"].size == pytest.approx(expected, rel=0.01)
    assert len(BY_NAME) == len(ARG_SPECS)


def test_a_vertical_sweep_walks_columns_and_a_batch_adds_lines():
    assert sweep_shape(BY_NAME["teddy"]) == (450, 60, 375)
    assert sweep_shape(BY_NAME["teddy"], vertical=True, batch=8) == (375, 60, 8 * 450)


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
    args = BY_NAME[name].args
    assert dense(args["pairwise"], args["u"].shape[1])[distance, 0] == value


def test_house_is_an_untruncated_quadratic():
    args = BY_NAME["house"].args
    assert dense(args["pairwise"], args["u"].shape[1])[255, 0] == 5 * 255**2


def test_padding_by_hand():
    assert padding(384, 128) == (384, 0.0)
    assert padding(375, 16) == (384, 9 / 384)
    assert padding(450, 128) == (512, 62 / 512)


def test_four_sweeps_and_the_rebuilt_unaries_give_the_pair_form_model():
    spec = BY_NAME["teddy"]
    sweeps = sum(
        2 * cost_estimate(sweep_shape(spec, vertical=v), spec.args["pairwise"]).bytes_accessed for v in (False, True)
    )
    assert sweeps + 2 * 16 * spec.args["u"].size == cost.ITERATION_BYTES["pair form"] * spec.args["u"].size
    assert cost.ITERATION_BYTES == {
        "running belief": 80,
        "pair form": 80,
        "pair form, u' by the reverse sweep": 64,
        "line on chip": 48,
    }


def test_traffic_counts_what_is_read_and_written():
    shape, potts = (10, 16, 20), Pairwise("potts", np.float32(1))
    pixels, entries = 200, 3200
    assert cost_estimate(shape, potts, with_opposite=False).bytes_accessed == 8 * entries
    full = cost_estimate(shape, potts, with_indices=True, with_weights=True).bytes_accessed
    assert full == 12 * entries + entries + pixels + 4 * pixels
    backward = cost.backward_cost_estimate(shape, potts)
    assert backward.bytes_accessed == 12 * entries + entries + pixels
    assert (
        cost.backward_cost_estimate((10, 300, 20), potts, with_opposite=False).bytes_accessed == 60000 * (8 + 2) + 400
    )


@pytest.mark.parametrize(
    ("name", "shifts"), [("teddy", 1), ("tsukuba", 3), ("venus", 13), ("kitti", 96), ("house", 256)]
)
def test_backward_arithmetic_grows_with_the_shifts_of_the_routing(name, shifts):
    spec = BY_NAME[name]
    flops = cost.backward_cost_estimate(sweep_shape(spec), spec.args["pairwise"]).flops
    loop = 0 if name == "house" else 3
    assert flops == spec.args["u"].size * (7 + 2 * shifts + loop)
