"""The denoising experiment: its damaged photograph, the baseline, and the smoke run from end to end."""

import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import denoise
from experiments._machinery import runner


def test_the_photograph_is_damaged_as_asked():
    picture = denoise.damaged_photograph(4, 25.0, 0.2, seed=0)
    assert picture.observed.shape == picture.clean.shape == (106, 160)
    assert 0.7 < picture.mask.mean() < 0.8  # 20 % at random, and scratches
    assert not picture.observed[~picture.mask].any()
    middle = picture.mask & (picture.clean > 60) & (picture.clean < 195)  # where noise is not clipped
    error = picture.observed[middle].astype(float) - picture.clean[middle]
    assert 23 < error.std() < 27 and abs(error.mean()) < 1.5
    again = denoise.damaged_photograph(4, 25.0, 0.2, seed=0)
    np.testing.assert_array_equal(picture.observed, again.observed)
    assert (picture.observed != denoise.damaged_photograph(4, 25.0, 0.2, seed=1).observed).any()


def test_median_filter_by_hand():
    observed = np.array([[1, 2, 9, 0], [4, 5, 6, 0], [7, 8, 3, 0]], np.uint8)
    picture = denoise.Picture(observed, observed > 0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy warns about empty windows
        filtered = denoise.median_filter(picture)
    assert filtered[1, 1] == 5  # of 1..9
    assert filtered[0, 3] == np.rint(7.5)  # of 9, 6: the observed ones
    sparse = denoise.Picture(
        np.array([[7, 0, 0, 0, 0]], np.uint8), np.array([[True, False, False, False, False]]), None
    )
    assert denoise.median_filter(sparse).tolist() == [[7, 7, 7, 7, 7]]  # the window grows


def test_psnr_of_a_known_error():
    clean = np.full((4, 4), 100, np.uint8)
    assert denoise.psnr(clean + np.uint8(255 // 15), clean) == pytest.approx(20 * np.log10(15))


def test_real_pictures(shared_data):
    for name, shape in (("house", (256, 256)), ("penguin", (179, 122))):
        picture = denoise.load_picture(shared_data / "denoise", name)
        assert picture.observed.shape == picture.mask.shape == shape
        assert picture.mask.dtype == bool and 0.5 < picture.mask.mean() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": 1.0}, r"missing must lie in \[0, 1\), got 1.0"),
        ({"instances": ("house",)}, "'house' needs --data-dir"),
        ({"instances": ("lena",), "data_dir": "x"}, "unknown instance 'lena'"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"solvers": ("trwp",)}, "unknown solver 'trwp'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        denoise.Config(**options)


def test_reference_numbers_have_the_names_of_metrics():
    paper = denoise.PAPER(denoise.Config(solvers=("isgmr-4",)))
    assert paper["penguin/isgmr-4/energy@10"] == 16997011
    assert {name.split("/")[1] for name in paper} == {"isgmr-4"}


def test_smoke_run_restores_the_photograph(tmp_path):
    config = denoise.Config(**denoise.SMOKE)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as in `python -m experiments`
        result = runner.run(denoise, config, tmp_path / "run", smoke=True, command="test")
    metrics = result["metrics"]
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["photograph/trwp-4/psnr"] > metrics["photograph/observed/psnr"] - 2
    assert metrics["photograph/trwp-4/bound@1"] <= metrics["photograph/trwp-4/sequential@1"]
    restored = np.asarray(Image.open(tmp_path / "run/restored/photograph-trwp-4.png"))
    assert restored.shape == (26, 40) and restored.std() > 10
    for name in ("photograph.png", "photograph-energy.png"):
        assert Image.open(tmp_path / "run" / name).size[0] > 50
