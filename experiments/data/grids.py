"""Pictures and stereo pairs on pixel grids: prepared ones, ones made from bundled photographs, and the user's own."""

import pathlib
from typing import NamedTuple

import numpy as np

from experiments._machinery.errors import DataError

GREY = np.array([0.299, 0.587, 0.114])


class Pair(NamedTuple):
    """Two rectified views; a point of the left one at column x is at x - disparity in the right one."""

    left: np.ndarray  # (H, W) or (H, W, 3) uint8
    right: np.ndarray
    disparity: np.ndarray | None  # (H, W) float, of the left view; None where it is not known
    counted: np.ndarray | None  # (H, W) bool: seen by both cameras and with known disparity


class Picture(NamedTuple):
    """A grey picture, parts of which may be missing."""

    observed: np.ndarray  # (H, W) uint8
    mask: np.ndarray  # (H, W) bool: observed at all
    clean: np.ndarray | None  # (H, W) uint8, where it is known


def read_image(path: str | pathlib.Path, remedy: str = "") -> np.ndarray:
    """An image file as uint8, (H, W) or (H, W, 3); palettes become colours, transparency goes.

    Raises:
      DataError: the file is missing, no image, or has more than 8 bits a channel.
    """
    from PIL import Image

    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no {path}" + (f"; {remedy}" if remedy else ""))
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path} has more than 8 bits a pixel (mode {image.mode}); save it as 8-bit PNG")
            if image.mode not in ("L", "RGB"):
                image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
            return np.asarray(image)
    except (OSError, SyntaxError) as error:  # Pillow raises the second for a damaged PNG
        raise DataError(f"{path} cannot be read as an image ({error})") from error


def grey(image: np.ndarray) -> np.ndarray:
    """Luma as uint8."""
    return image if image.ndim == 2 else np.rint(image @ GREY).astype(np.uint8)


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor pixels, rounded to uint8."""
    height, width = (n // factor * factor for n in image.shape[:2])
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, -1).mean((1, 3))
    return np.rint(blocks).astype(np.uint8).reshape(height // factor, width // factor, *image.shape[2:])


def bundled_photograph(name: str) -> np.ndarray:
    """scikit-learn's china.jpg or flower.jpg, (427, 640, 3) uint8: a real picture without any download."""
    from sklearn.datasets import load_sample_image

    return np.asarray(load_sample_image(name))


# --------------------------------------------------------------------------------------------------------- stereo


def middlebury_pair(folder: pathlib.Path, scale: int) -> Pair:
    """A prepared Middlebury pair; where no mask of visible pixels comes with it, it is computed from the disparities.

    Args:
      folder: with left and right (.ppm or .pgm), disparity.pgm and possibly nonocc.png.
      scale: grey values of disparity.pgm per pixel of disparity.
    """
    remedy = "--data-dir must be the folder that holds stereo/"
    extension = "ppm" if (folder / "left.ppm").exists() else "pgm"
    left, right = (read_image(folder / f"{side}.{extension}", remedy) for side in ("left", "right"))
    disparity = read_image(folder / "disparity.pgm", remedy) / scale
    mask = folder / "nonocc.png"
    visible = read_image(mask) == 255 if mask.exists() else visible_in_both(np.rint(disparity))
    return Pair(left, right, disparity, visible & (disparity > 0))


def own_pair(left: str, right: str, num_disparities: int, truth: str | None, scale: float) -> Pair:
    """The user's own rectified pair, and its disparities as an image where they are known (0: unknown).

    Raises:
      DataError: a file cannot be read, or sizes do not agree.
    """
    views = read_image(left), read_image(right)
    if views[0].shape[:2] != views[1].shape[:2]:
        sizes = " and ".join(f"{view.shape[1]} x {view.shape[0]}" for view in views)
        raise DataError(f"{left} and {right} are {sizes} pixels; a rectified pair has one size")
    if views[0].ndim != views[1].ndim:
        views = grey(views[0]), grey(views[1])
    if num_disparities > views[0].shape[1]:
        raise DataError(f"num_disparities is {num_disparities}, and {left} has only {views[0].shape[1]} columns")
    if truth is None:
        return Pair(*views, None, None)
    disparity = grey(read_image(truth)) / scale
    if disparity.shape != views[0].shape[:2]:
        raise DataError(f"{truth} has another size than {left}; it must give the disparity of each of its pixels")
    counted = visible_in_both(np.rint(disparity)) & (disparity > 0)
    if not counted.any():
        raise DataError(f"{truth} has no pixel with a known disparity that both cameras see; look at --truth-scale")
    return Pair(*views, disparity, counted)


def visible_in_both(disparity: np.ndarray) -> np.ndarray:
    """Pixels of the left view whose partner lies inside the right one and is not hidden by something nearer.

    Nearer by more than one disparity: rounding makes neighbours on a slanted surface meet in one pixel.
    """
    height, width = disparity.shape
    disparity = disparity.astype(int)
    column = np.arange(width)[None] - disparity
    nearest = np.full((height, width), -1)
    row = np.broadcast_to(np.arange(height)[:, None], column.shape)
    inside = column >= 0
    np.maximum.at(nearest, (row[inside], column[inside]), disparity[inside])
    return inside & (nearest[row, np.maximum(column, 0)] <= disparity + 1)


def synthetic_pair(factor: int, noise: float, num_disparities: int, seed: int) -> Pair:
    """A pair with known disparities from one photograph; what only the right camera sees comes from another."""
    left = shrink(bundled_photograph("china.jpg"), factor)
    behind = shrink(bundled_photograph("flower.jpg"), factor)
    height, width = left.shape[:2]
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    top = num_disparities - 1
    disparity = np.rint((0.15 + 0.3 * y) * top)  # ground that comes nearer towards the bottom
    disparity[(np.abs(x - 0.25) < 0.11) & (np.abs(y - 0.55) < 0.25)] = np.rint(0.65 * top)
    aspect = width / height
    disparity[((x - 0.55) * aspect) ** 2 + (y - 0.35) ** 2 < 0.15**2] = np.rint(0.8 * top)
    disparity[((x - 0.8) * aspect) ** 2 + (y - 0.65) ** 2 < 0.2**2] = top
    right = behind.copy()
    for d in range(num_disparities):  # from far to near: what is nearer covers
        rows, columns = np.nonzero(disparity == d)
        inside = columns >= d
        right[rows[inside], columns[inside] - d] = left[rows[inside], columns[inside]]
    rng = np.random.default_rng(seed)
    noisy = lambda image: np.clip(np.rint(image + rng.normal(0, noise, image.shape)), 0, 255).astype(np.uint8)
    return Pair(noisy(left), noisy(right), disparity, visible_in_both(disparity))


# -------------------------------------------------------------------------------------------------------- pictures


def middlebury_picture(folder: pathlib.Path, name: str) -> Picture:
    """A prepared Middlebury denoising problem; mask 0 means unobserved."""
    remedy = "--data-dir must be the folder that holds denoise/"
    observed, mask = (read_image(folder / f"{name}-{part}.png", remedy) for part in ("input", "mask"))
    return Picture(observed, mask > 0, None)


def own_picture(path: str, mask: str | None, clean: str | None) -> Picture:
    """The user's own picture in grey, an image of what is observed (0: missing), and the original where it is known.

    Raises:
      DataError: a file cannot be read, or sizes do not agree.
    """
    observed = grey(read_image(path))
    others = [None if other is None else grey(read_image(other)) for other in (mask, clean)]
    for name, other in zip((mask, clean), others, strict=True):
        if other is not None and other.shape != observed.shape:
            raise DataError(f"{name} has another size than {path}; it must have a pixel for each of its pixels")
    found = np.ones(observed.shape, bool) if others[0] is None else others[0] > 0
    if not found.any():
        raise DataError(f"{mask} is black: no pixel of {path} is observed")
    return Picture(observed, found, others[1])


def damaged_photograph(factor: int, noise: float, missing: float, seed: int) -> Picture:
    """scikit-learn's china.jpg in grey, with Gaussian noise, pixels missing at random and three scratches."""
    clean = grey(shrink(bundled_photograph("china.jpg"), factor))
    rng = np.random.default_rng(seed)
    observed = np.clip(np.rint(clean + rng.normal(0, noise, clean.shape)), 0, 255).astype(np.uint8)
    mask = rng.random(clean.shape) >= missing
    height, width = clean.shape
    y, x = np.mgrid[:height, :width]
    for _ in range(3):
        slope, offset = rng.uniform(-0.7, 0.7), rng.uniform(0.2, 0.8)
        mask &= np.abs(y / height - offset - slope * (x / width - 0.5)) > 1.2 / height
    return Picture(np.where(mask, observed, 0).astype(np.uint8), mask, clean)
