"""Pictures and stereo pairs: made ones, prepared ones, and the user's own."""

import numpy as np
import pytest
from PIL import Image

from experiments._machinery.errors import DataError
from experiments.data import grids


def test_the_synthetic_pair_is_the_photograph_moved_by_its_disparities():
    pair = grids.synthetic_pair(4, 0.0, 16, seed=0)
    rows, columns = np.nonzero(pair.counted)
    moved = columns - pair.disparity[rows, columns].astype(int)
    np.testing.assert_array_equal(pair.left[rows, columns], pair.right[rows, moved])
    assert len(set(zip(rows.tolist(), moved.tolist(), strict=True))) == len(rows)  # nothing is seen twice
    assert 0.85 < pair.counted.mean() < 1  # and something is hidden
    assert (pair.disparity.min(), pair.disparity.max()) == (2, 15)
    noisy = grids.synthetic_pair(4, 3.0, 16, seed=0)
    assert 2 < (noisy.left.astype(float) - pair.left)[20:60, 20:60].std() < 4
    np.testing.assert_array_equal(noisy.left, grids.synthetic_pair(4, 3.0, 16, seed=0).left)


def test_visible_pixels_by_hand():
    disparity = np.array([[0, 0, 0, 2, 2, 0], [0, 1, 2, 2, 1, 1]])
    expected = [[True, False, False, True, True, True], [False, True, True, True, True, True]]
    np.testing.assert_array_equal(grids.visible_in_both(disparity), expected)


def test_ground_truth_of_the_real_pairs(shared_data):
    for name, (lowest, highest, scale) in {
        "tsukuba": (5, 14, 16),
        "teddy": (12, 53, 4),
        "venus": (3, 20, 8),
        "map": (4, 29, 8),
    }.items():
        pair = grids.middlebury_pair(shared_data / "stereo" / name, scale)
        values = pair.disparity[pair.counted]
        assert lowest <= values.min() < values.max() <= highest
        assert pair.left.shape == pair.right.shape
        assert 0.7 < pair.counted.mean() < 0.95


def test_the_photograph_is_damaged_as_asked():
    picture = grids.damaged_photograph(4, 25.0, 0.2, seed=0)
    assert picture.observed.shape == picture.clean.shape == (106, 160)
    assert 0.7 < picture.mask.mean() < 0.8  # 20 % at random, and scratches
    assert not picture.observed[~picture.mask].any()
    middle = picture.mask & (picture.clean > 60) & (picture.clean < 195)  # where noise is not clipped
    error = picture.observed[middle].astype(float) - picture.clean[middle]
    assert 23 < error.std() < 27 and abs(error.mean()) < 1.5
    again = grids.damaged_photograph(4, 25.0, 0.2, seed=0)
    np.testing.assert_array_equal(picture.observed, again.observed)
    assert (picture.observed != grids.damaged_photograph(4, 25.0, 0.2, seed=1).observed).any()


def test_real_pictures(shared_data):
    for name, shape in (("house", (256, 256)), ("penguin", (179, 122))):
        picture = grids.middlebury_picture(shared_data / "denoise", name)
        assert picture.observed.shape == picture.mask.shape == shape
        assert picture.mask.dtype == bool and 0.5 < picture.mask.mean() < 1


@pytest.fixture
def saved(tmp_path):
    def save(name, image):
        Image.fromarray(image).save(tmp_path / name)
        return str(tmp_path / name)

    return save


def test_an_image_file_becomes_grey_or_colours(saved, tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    np.testing.assert_array_equal(grids.read_image(saved("c.png", colours)), colours)
    np.testing.assert_array_equal(grids.read_image(saved("g.png", colours[..., 0])), colours[..., 0])
    clear = np.dstack([colours, np.full((4, 5), 9, np.uint8)])
    np.testing.assert_array_equal(grids.read_image(saved("a.png", clear)), colours)
    with pytest.raises(DataError, match=r"more than 8 bits a pixel \(mode I;16\); save it as 8-bit PNG"):
        grids.read_image(saved("deep.png", np.zeros((4, 5), np.uint16)))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png cannot be read as an image"):
        grids.read_image(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"there is no nothing\.png; look"):
        grids.read_image("nothing.png", "look")


def test_an_own_pair_and_what_is_wrong_with_it(saved):
    known = grids.synthetic_pair(8, 0.0, 16, seed=0)
    left, right = saved("left.png", known.left), saved("right.png", known.right)
    truth = saved("truth.png", (known.disparity * 8).astype(np.uint8))
    pair = grids.own_pair(left, right, 16, truth, 8.0)
    np.testing.assert_array_equal(pair.left, known.left)
    np.testing.assert_array_equal(pair.disparity, known.disparity)
    np.testing.assert_array_equal(pair.counted, known.counted & (known.disparity > 0))
    unknown = grids.own_pair(left, saved("grey.png", grids.grey(known.right)), 16, None, 1.0)
    assert unknown.left.ndim == unknown.right.ndim == 2 and unknown.disparity is None
    half = saved("half.png", known.right[:, ::2])
    for arguments, message in [
        ((left, half, 16, None, 1.0), "are 80 x 53 and 40 x 53 pixels; a rectified pair has one size"),
        ((left, right, 99, None, 1.0), "num_disparities is 99, and .* has only 80 columns"),
        ((left, right, 16, half, 1.0), "has another size than"),
        ((left, right, 16, saved("black.png", np.zeros((53, 80), np.uint8)), 1.0), "no pixel with a known disparity"),
        ((left, "gone.png", 16, None, 1.0), "there is no gone.png"),
    ]:
        with pytest.raises(DataError, match=message):
            grids.own_pair(*arguments)


def test_an_own_picture_and_what_is_wrong_with_it(saved):
    image = np.random.default_rng(0).integers(0, 256, (6, 7), np.uint8)
    mask = (image > 60).astype(np.uint8)
    picture = grids.own_picture(saved("image.png", image), saved("mask.png", mask), saved("clean.png", image))
    np.testing.assert_array_equal(picture.observed, image)
    np.testing.assert_array_equal(picture.mask, image > 60)
    assert grids.own_picture(saved("image.png", image), None, None).mask.all()
    with pytest.raises(DataError, match="another size than"):
        grids.own_picture(saved("image.png", image), None, saved("clean.png", image[1:]))
    with pytest.raises(DataError, match="is black: no pixel"):
        grids.own_picture(saved("image.png", image), saved("mask.png", 0 * mask), None)
