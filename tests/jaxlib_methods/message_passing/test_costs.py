"""Cost volumes against a slow NumPy transcription and against the published check sums of the real data."""

import jax
import numpy as np
import pytest
from PIL import Image

from jaxlib_methods.message_passing import costs as cv


def _slow_birchfield_tomasi(left, right, num_disparities, truncation=np.inf):
    """Pixel by pixel, straight from the definition."""
    left, right = (np.asarray(x, np.int64).reshape(*x.shape[:2], -1) for x in (left, right))
    height, width, channels = left.shape
    result = np.zeros((height, width, num_disparities))

    def interval(row, x, c):
        at = lambda k: row[min(max(k, 0), width - 1), c]
        values = [at(x), (at(x) + at(x - 1)) // 2, (at(x) + at(x + 1)) // 2]
        return min(values), max(values)

    for y in range(height):
        for x in range(width):
            for d in range(num_disparities):
                for c in range(channels):
                    if x - d < 0:
                        result[y, x, d] += 255
                        continue
                    a, b = left[y, x, c], right[y, x - d, c]
                    a_min, a_max = interval(left[y], x, c)
                    b_min, b_max = interval(right[y], x - d, c)
                    result[y, x, d] += min(max(0, a - b_max, b_min - a), max(0, b - a_max, a_min - b))
    return np.minimum(result, truncation)


@pytest.mark.contract
@pytest.mark.parametrize(("channels", "truncation"), [(1, None), (3, None), (3, 60.0)])
def test_birchfield_tomasi_equals_the_definition(channels, truncation):
    rng = np.random.default_rng(channels)
    left, right = rng.integers(0, 256, (2, 4, 9, channels), dtype=np.uint8)
    expected = _slow_birchfield_tomasi(left, right, 5, np.inf if truncation is None else truncation)
    got = cv.birchfield_tomasi(left, right, 5, truncation=truncation)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(got), expected)


def test_birchfield_tomasi_grey_images_need_no_channel_axis_and_batches_are_vmap():
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 256, (2, 3, 4, 9), dtype=np.uint8)  # two sides, batch of three
    batched = jax.vmap(lambda l, r: cv.birchfield_tomasi(l, r, 4))(left, right)
    for b in range(3):
        np.testing.assert_array_equal(np.asarray(batched[b]), _slow_birchfield_tomasi(left[b], right[b], 4))


def test_birchfield_tomasi_of_floating_images_uses_exact_half_pixel_values():
    rng = np.random.default_rng(3)
    left, right = 2.0 * rng.integers(0, 100, (2, 4, 7, 1))  # even values: the integer averages are exact
    got = cv.birchfield_tomasi(left.astype(np.float32), right.astype(np.float32), 3)
    np.testing.assert_array_equal(np.asarray(got), _slow_birchfield_tomasi(left, right, 3))


@pytest.mark.parametrize(
    ("name", "num_disparities", "shape", "total"),
    [
        ("tsukuba", 16, (288, 384), 78196440),
        ("teddy", 60, (375, 450), 1146071006),
        ("venus", 20, (383, 434), 152035793),
        ("map", 29, (216, 284), 59934116),
    ],
)
def test_check_sums_of_the_stereo_cost_volumes(shared_data, name, num_disparities, shape, total):
    pair = [
        np.asarray(Image.open(next((shared_data / "stereo" / name).glob(f"{side}.p?m")))) for side in ("left", "right")
    ]
    costs = np.asarray(cv.birchfield_tomasi(*pair, num_disparities))
    assert costs.shape == (*shape, num_disparities)
    assert int(costs.sum(dtype=np.float64)) == total


@pytest.mark.parametrize(
    ("name", "shape", "total"), [("house", (256, 256), 98519671168), ("penguin", (179, 122), 45972537984)]
)
def test_check_sums_of_the_denoising_unaries(shared_data, name, shape, total):
    image, mask = (np.asarray(Image.open(shared_data / "denoise" / f"{name}-{part}.png")) for part in ("input", "mask"))
    costs = np.asarray(cv.denoising_unaries(image, mask, 256))
    assert costs.shape == (*shape, 256)
    assert int(costs.sum(dtype=np.float64)) == total


def test_denoising_unaries_without_a_mask_observe_every_pixel():
    image = np.array([[0, 3], [1, 2]], np.uint8)
    got = np.asarray(cv.denoising_unaries(image, None, 4))
    np.testing.assert_array_equal(got, (image[..., None].astype(float) - np.arange(4)) ** 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cv.birchfield_tomasi(np.zeros(4), np.zeros(4), 2), r"left must be an image .* got shape \(4,\)"),
        (lambda: cv.birchfield_tomasi(np.zeros((2, 3)), np.zeros((2, 4)), 2), "must agree in shape"),
        (lambda: cv.birchfield_tomasi(np.zeros((2, 3)), np.zeros((2, 3)), 0), "num_disparities .* got 0"),
        (lambda: cv.denoising_unaries(np.zeros((2, 3, 3)), None, 4), "image must be grey"),
        (lambda: cv.denoising_unaries(np.zeros((2, 3)), np.zeros((3, 2)), 4), "mask must have the shape"),
        (lambda: cv.denoising_unaries(np.zeros((2, 3)), None, 0), "num_labels .* got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gradient_cues_are_dear_where_the_colours_are_alike():
    image = np.random.default_rng(0).integers(0, 40, (5, 6, 3), dtype=np.uint8)
    right, down = (np.asarray(w) for w in cv.gradient_cues(image, threshold=10, penalty=3))
    for y in range(5):
        for x in range(6):
            for weights, y0, x0 in ((right, y, x - 1), (down, y - 1, x)):
                if min(y0, x0) >= 0:
                    rms = np.sqrt(np.mean((image[y, x].astype(float) - image[y0, x0]) ** 2))
                    assert weights[y, x] == (3 if rms < 10 else 1)
