"""The stereo experiment: its synthetic pair, its ground truth, its energies, and the smoke run from end to end."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import stereo
from experiments._machinery import runner
from experiments._machinery.errors import DataError
from experiments.tasks import grid_mrf
from jaxlib_methods import message_passing as mp


def _instance(kind="linear", truncation=2, weight=3.0, shape=(6, 7, 5)):
    unaries = np.random.default_rng(0).integers(0, 30, shape).astype(np.float32)
    return grid_mrf.make_instance("toy", unaries, kind, weight, truncation)


@pytest.mark.parametrize(
    ("kind", "truncation"), [("linear", 2), ("linear", 100), ("linear", None), ("quadratic", 7), ("quadratic", None)]
)
def test_the_energy_on_the_host_is_the_librarys(kind, truncation):
    instance = _instance(kind, truncation)
    labels = np.random.default_rng(1).integers(0, 5, (6, 7))
    distance = np.arange(5.0) if kind == "linear" else np.arange(5.0) ** 2
    expected = 3 * np.minimum(distance, np.inf if truncation is None else truncation)
    reach = len(instance.profile) - 1
    np.testing.assert_array_equal(instance.profile[np.minimum(np.arange(5), reach)], expected)
    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    assert grid_mrf.energy(instance, labels) == float(mp.energy(mrf, jnp.asarray(labels, jnp.int32)))


def test_traces_are_those_of_one_long_run(tmp_path):
    instance = _instance()
    trace = grid_mrf.solve(instance, "trwp-4", 12, 5, tmp_path / "trwp")
    assert trace["iterations"] == [1, 5, 10, 12]
    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    solution = mp.trwp(mrf, iterations=12)
    labels, rounded = grid_mrf.labels_of(tmp_path / "trwp")
    np.testing.assert_array_equal(labels, np.asarray(solution.labels))
    np.testing.assert_array_equal(rounded, np.asarray(mp.sequential_rounding(mrf, solution.messages)))
    assert trace["energy"][-1] == grid_mrf.energy(instance, labels)
    assert trace["sequential"][-1] == grid_mrf.energy(instance, rounded)
    assert trace["bound"] == sorted(trace["bound"])
    assert trace["bound"][-1] <= min(trace["energy"] + trace["sequential"]) + 1e-3
    metrics = grid_mrf.trace_metrics("toy", "trwp-4", trace)
    assert metrics["toy/trwp-4/energy@10"] == trace["energy"][2]
    assert "toy/trwp-4/energy@5" not in metrics
    # A second call reads the first one's files.
    assert grid_mrf.solve(instance, "trwp-4", 12, 5, tmp_path / "trwp") == trace


def test_the_synthetic_pair_is_the_photograph_moved_by_its_disparities():
    pair = stereo.synthetic_pair(4, 0.0, 16, seed=0)
    rows, columns = np.nonzero(pair.counted)
    moved = columns - pair.disparity[rows, columns].astype(int)
    np.testing.assert_array_equal(pair.left[rows, columns], pair.right[rows, moved])
    assert len(set(zip(rows.tolist(), moved.tolist(), strict=True))) == len(rows)  # nothing is seen twice
    assert 0.85 < pair.counted.mean() < 1  # and something is hidden
    assert (pair.disparity.min(), pair.disparity.max()) == (2, 15)
    noisy = stereo.synthetic_pair(4, 3.0, 16, seed=0)
    assert 2 < (noisy.left.astype(float) - pair.left)[20:60, 20:60].std() < 4
    np.testing.assert_array_equal(noisy.left, stereo.synthetic_pair(4, 3.0, 16, seed=0).left)


def test_visible_pixels_by_hand():
    disparity = np.array([[0, 0, 0, 2, 2, 0], [0, 1, 2, 2, 1, 1]])
    expected = [[True, False, False, True, True, True], [False, True, True, True, True, True]]
    np.testing.assert_array_equal(stereo.visible_in_both(disparity), expected)


def test_bad_pixels_are_off_by_more_than_one_among_the_counted():
    truth = np.array([[3.0, 3.0, 3.0, 3.0]])
    pair = stereo.Pair(None, None, truth, np.array([[True, True, True, False]]))
    assert stereo.bad_pixels(np.array([[4, 5, 3, 9]]), pair) == pytest.approx(1 / 3)


def test_ground_truth_of_the_real_pairs(shared_data):
    for name, (lowest, highest) in {"tsukuba": (5, 14), "teddy": (12, 53), "venus": (3, 20), "map": (4, 29)}.items():
        problem = stereo.PROBLEMS[name]
        pair = stereo.load_pair(shared_data / "stereo" / name, problem.scale)
        values = pair.disparity[pair.counted]
        assert lowest <= values.min() < values.max() <= highest
        assert values.max() <= problem.num_labels - 1 + stereo.BAD_PIXEL_THRESHOLD
        assert pair.left.shape == pair.right.shape
        assert 0.7 < pair.counted.mean() < 0.95


def test_published_numbers_have_the_names_of_metrics():
    config = stereo.Config(solvers=("trwp-4", "trws"), data_dir="somewhere")
    paper = stereo.PAPER(config)
    assert paper["tsukuba/trwp-4/energy@50"] == 314037
    assert paper["teddy/trws/energy@50"] == 1807423  # the published one, not the reimplementation's
    assert {name.split("/")[1] for name in paper} == {"trwp-4", "trws"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvers": ("icm-4",)}, "unknown solver 'icm-4'"),
        ({"solvers": ("trwp-5",)}, "unknown solver 'trwp-5'"),
        ({"solvers": ("trws-4",)}, "unknown solver 'trws-4'"),
        ({"instances": ("cones",), "data_dir": "x"}, "unknown instance 'cones'"),
        ({"instances": ("teddy",)}, "'teddy' needs --data-dir"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        stereo.Config(**options)


def test_a_missing_data_set_is_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*left\.pgm; --data-dir must be"):
        stereo.train(stereo.Config(data_dir=str(tmp_path), instances=("map",)), tmp_path)


def test_smoke_run_writes_maps_figures_and_better_energies(tmp_path):
    config = stereo.Config(**stereo.SMOKE)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as in `python -m experiments`
        result = runner.run(stereo, config, tmp_path / "run", smoke=True, command="test")
    metrics = result["metrics"]
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["synthetic/trwp-4/bad_pixels"] < 0.1 < 0.4 < metrics["synthetic/no_smoothness/bad_pixels"]
    traces = {
        solver: json.loads((tmp_path / f"run/cases/synthetic/{solver}/metrics.json").read_text())
        for solver in config.solvers
    }
    assert traces["trwp-4"]["energy"][-1] < traces["sgm-4"]["energy"][-1]
    assert traces["trwp-4"]["bound"][-1] <= min(traces["trwp-4"]["sequential"])
    for name in ("synthetic.png", "synthetic-energy.png", "disparity/synthetic-trwp-4.png"):
        assert Image.open(tmp_path / "run" / name).size[0] > 50
    grey = np.asarray(Image.open(tmp_path / "run/disparity/synthetic-trwp-4.png"))
    labels, _ = grid_mrf.labels_of(tmp_path / "run/cases/synthetic/trwp-4")
    np.testing.assert_array_equal(grey, labels * stereo.PROBLEMS["synthetic"].scale)
    assert dataclasses.asdict(config)["iterations"] == result["config"]["iterations"] == 5
