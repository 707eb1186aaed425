"""The TRW-S peer must be TRW-S: its energies and bounds are the published ones, and bounds are bounds."""

import shutil

import numpy as np
import pytest
from PIL import Image

from jaxlib_methods.message_passing import costs as cv, exact as ex
from peers.trws import trws

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the TRW-S peer is compiled by g++")


@pytest.mark.parametrize("profile", [[0, 1], [0, 2, 3], [0, 1, 4, 9], [0, 1, 2, 3]])
@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_and_energies_enclose_the_optimum(profile, seed):
    rng = np.random.default_rng(seed)
    unaries = rng.integers(0, 12, (3, 3, 4)).astype(float)
    weights = {"horizontal": rng.integers(0, 4, (3, 2)), "vertical": rng.integers(0, 4, (2, 3))}
    distance = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    table = 2.0 * np.array(profile)[np.minimum(distance, len(profile) - 1)]
    best = ex.solve_by_enumeration(unaries, table, **weights).energy
    result = trws(unaries, profile, weight=2.0, iterations=30, **weights)
    assert (result.bounds <= best + 1e-4).all()
    assert (result.energies >= best - 1e-4).all()
    assert (np.diff(result.bounds) >= -1e-4).all()  # TRW-S's bound never falls
    if profile in ([0, 1, 4, 9], [0, 1, 2, 3]):  # convex: the relaxation is tight
        assert result.bounds[-1] == pytest.approx(best, rel=1e-3)


def test_the_distance_transforms_agree():
    rng = np.random.default_rng(3)
    unaries = rng.integers(0, 50, (6, 7, 12))
    for method, profile in (
        ("linear", np.arange(5)),
        ("linear", np.arange(12)),
        ("quadratic", np.minimum(np.arange(6) ** 2, 20)),
        ("quadratic", np.arange(12) ** 2),
    ):
        slow, fast = (trws(unaries, profile, weight=3.0, iterations=3, method=m) for m in ("window", method))
        np.testing.assert_allclose(fast.bounds, slow.bounds, rtol=1e-5)
        np.testing.assert_allclose(fast.energies, slow.energies, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot do the profile"):
        trws(unaries, [0, 1, 3], method="linear")


def test_the_fastest_transform_is_a_window_for_short_profiles_and_never_one_that_cannot_do_it():
    # Penguin's min(d^2, 200) and House's d^2, with the labels thinned out.
    unaries = np.random.default_rng(4).integers(0, 50, (3, 4, 40))
    odd = np.concatenate([np.arange(38), [50, 60]])
    for profile, method in (
        (np.minimum(np.arange(16) ** 2, 200), "window"),
        (np.arange(40) ** 2, "quadratic"),
        (odd, "window"),
    ):
        chosen, named = (trws(unaries, profile, iterations=2, **m) for m in ({}, {"method": method}))
        np.testing.assert_array_equal(chosen.bounds, named.bounds)


# Numbers of an independent implementation; the order of float32 operations moves the later ones by less than 0.01 %.
@pytest.mark.parametrize(
    ("name", "num_labels", "profile", "weight", "first", "fiftieth", "bound"),
    [
        ("tsukuba", 16, [0, 1, 2], 20, 352178, 314393, 313139.6),
        ("teddy", 60, [0, 1], 10, 1855625, 1807444, 1799336.5),
    ],
)
def test_published_energies(shared_data, name, num_labels, profile, weight, first, fiftieth, bound):
    pair = [np.asarray(Image.open(shared_data / "stereo" / name / f"{side}.ppm")) for side in ("left", "right")]
    result = trws(np.asarray(cv.birchfield_tomasi(*pair, num_labels)), profile, weight=weight)
    assert result.energies[0] == first
    assert result.energies[-1] == pytest.approx(fiftieth, rel=1e-4)
    assert result.bounds[-1] == pytest.approx(bound, rel=1e-5)


def test_the_middlebury_setting_with_gradient_cues_has_the_published_bound(shared_data):
    pair = [np.asarray(Image.open(shared_data / "stereo" / "tsukuba" / f"{side}.ppm")) for side in ("left", "right")]
    right, down = (np.asarray(w) for w in cv.gradient_cues(pair[0]))
    unaries = np.asarray(cv.birchfield_tomasi(*pair, 16))
    result = trws(unaries, [0, 1, 2], weight=20, horizontal=right[:, 1:], vertical=down[1:], iterations=100)
    assert 369217.58 - 60 < result.bounds[-1] < 369217.58 + 0.5  # where TRW-S ends; the optimum is 369218
    assert 369218 <= result.energies.min() < 369218 * 1.002


def test_leaves_subnormal_numbers_of_the_process_alone():
    trws(np.zeros((2, 2, 2), np.float32), profile=np.array([0, 1], np.float32), weight=1.0, iterations=1)
    smallest = np.nextafter(np.float32(0), np.float32(1))
    assert smallest * np.float32(1) == smallest
