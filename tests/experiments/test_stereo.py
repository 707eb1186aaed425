"""The stereo experiment: its targets, its options, bad pixels, and the smoke run from end to end."""

import jax
import numpy as np
import pytest
from PIL import Image

from experiments._machinery import runner
from experiments._machinery.errors import DataError
from experiments.data import grids
from experiments.methods import stereo


def test_bad_pixels_are_off_by_more_than_one_among_the_counted():
    truth = np.array([[3.0, 3.0, 3.0, 3.0]])
    pair = grids.Pair(None, None, truth, np.array([[True, True, True, False]]))
    assert stereo.bad_pixels(np.array([[4, 5, 3, 9]]), pair) == pytest.approx(1 / 3)


def test_targets_say_which_are_the_papers():
    found = stereo.targets(stereo.Config(solvers=("trwp-4", "trws"), data_dir="somewhere"))
    assert (found["tsukuba/trwp-4"]["energy@50"].value, found["tsukuba/trwp-4"]["energy@50"].kind) == (314037, "paper")
    assert found["tsukuba/trwp-4"]["energy@10"].kind == "ours"
    assert found["teddy/trws"]["energy@50"].value == 1807423  # the published one, not the reimplementation's
    assert {row.split("/")[1] for row in found} == {"trwp-4", "trws"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solvers": ("icm-4",)}, "solvers must be one of sgm-4, .*, got 'icm-4'"),
        ({"solvers": ("trws-4",)}, "got 'trws-4'"),
        ({"instances": ("cones",), "data_dir": "x"}, "instances must be one of tsukuba, .*, got 'cones'"),
        ({"instances": ("teddy",)}, "'teddy' needs --data-dir"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"left": "l.png", "num_disparities": 9}, "your own pair needs --right as well"),
        ({"left": "l.png", "right": "r.png"}, "your own pair needs --num-disparities as well"),
        ({"truth": "t.png"}, "needs --left and --right and --num-disparities as well"),
        ({"left": "l", "right": "r", "num_disparities": 9, "data_dir": "x"}, "your own instance is solved alone"),
        ({"num_disparities": 1}, "num_disparities must be at least 2, got 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        stereo.Config(**options)


def test_a_missing_data_set_is_a_sentence(tmp_path):
    config = stereo.Config(data_dir=str(tmp_path), instances=("map",))
    with pytest.raises(DataError, match=r"there is no .*left\.pgm; --data-dir must be"):
        runner.run(stereo, config, tmp_path / "run")


def test_an_own_pair_is_matched_with_and_without_its_truth(tmp_path):
    pair = grids.synthetic_pair(16, 0.0, 8, seed=0)
    for name in ("left", "right"):
        Image.fromarray(getattr(pair, name)).save(tmp_path / f"{name}.png")
    Image.fromarray((10 * pair.disparity).astype(np.uint8)).save(tmp_path / "truth.png")
    own = {"left": str(tmp_path / "left.png"), "right": str(tmp_path / "right.png"), "num_disparities": 8}
    own |= {"solvers": ("sgm-4",), "iterations": 1}
    for name, more in (("alone", {}), ("known", {"truth": str(tmp_path / "truth.png"), "truth_scale": 10.0})):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            result = runner.run(stereo, stereo.Config(**own, **more), tmp_path / name)
        found = {record["variant"]: record["metrics"] for record in result["records"]}
        # Without a truth no smoothness has no number, and no row.
        assert set(found) == {"own/sgm-4"} | ({"own/no_smoothness"} if name == "known" else set())
        assert found["own/sgm-4"]["energy@1"] > 0
        assert ("bad_pixels" in found["own/sgm-4"]) == (name == "known")
        assert np.asarray(Image.open(tmp_path / name / "disparity/own-sgm-4.png")).shape == pair.left.shape[:2]
    assert found["own/sgm-4"]["bad_pixels"] < found["own/no_smoothness"]["bad_pixels"]
