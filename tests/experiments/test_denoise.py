"""The denoising experiment: the baseline, its options, and the smoke run from end to end."""

import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from experiments._machinery import runner
from experiments.data import grids
from experiments.methods import denoise


def test_median_filter_by_hand():
    observed = np.array([[1, 2, 9, 0], [4, 5, 6, 0], [7, 8, 3, 0]], np.uint8)
    picture = grids.Picture(observed, observed > 0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy warns about empty windows
        filtered = denoise.median_filter(picture)
    assert filtered[1, 1] == 5  # of 1..9
    assert filtered[0, 3] == np.rint(7.5)  # of 9, 6: the observed ones
    sparse = grids.Picture(np.array([[7, 0, 0, 0, 0]], np.uint8), np.array([[True, False, False, False, False]]), None)
    assert denoise.median_filter(sparse).tolist() == [[7, 7, 7, 7, 7]]  # the window grows


def test_psnr_of_a_known_error():
    clean = np.full((4, 4), 100, np.uint8)
    assert denoise.psnr(clean + np.uint8(255 // 15), clean) == pytest.approx(20 * np.log10(15))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": 1.0}, r"missing must lie in \[0, 1\), got 1.0"),
        ({"instances": ("house",)}, "'house' needs --data-dir"),
        ({"instances": ("lena",), "data_dir": "x"}, "instances must be one of penguin, .*, got 'lena'"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"mask": "m.png"}, "name it with --image"),
        ({"image": "i.png", "instances": ("photograph",)}, "your own instance is solved alone"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        denoise.Config(**options)


def test_targets_are_our_own():
    found = denoise.targets(denoise.Config(solvers=("isgmr-4",), data_dir="somewhere"))
    assert set(found) == {"penguin/isgmr-4", "house/isgmr-4"}
    assert (found["penguin/isgmr-4"]["energy@10"].value, found["penguin/isgmr-4"]["energy@10"].kind) == (
        16997011,
        "ours",
    )


def _run(config, workdir):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as in `python -m experiments`
        result = runner.run(denoise, config, workdir, smoke=True, command="test")
    return {record["variant"]: record["metrics"] for record in result["records"]}


def test_an_own_picture_is_restored(tmp_path):
    picture = grids.damaged_photograph(16, 25.0, 0.2, seed=0)
    Image.fromarray(picture.observed).save(tmp_path / "image.png")
    Image.fromarray(picture.mask).save(tmp_path / "mask.png")
    config = denoise.Config(
        image=str(tmp_path / "image.png"), mask=str(tmp_path / "mask.png"), solvers=("sgm-4",), iterations=1
    )
    found = _run(config, tmp_path / "run")
    assert [*found] == ["own/sgm-4"] and found["own/sgm-4"]["energy@1"] > 0  # without a truth the filter has no number
    assert (tmp_path / "run/restored/own-sgm-4.png").exists()
