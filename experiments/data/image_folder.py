"""Images of the user's own from a folder: `FOLDER/CLASS/*.png`, or `FOLDER/train/CLASS/*` and `FOLDER/test/CLASS/*`."""

import pathlib

import numpy as np

from experiments._machinery.errors import DataError
from experiments.data.grids import read_image

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
TEST_SHARE = 0.2  # of every class, where the folder says nothing else


def load(folder: pathlib.Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [n, height, width, channels] and labels int32 [n], to train on and to test on.

    Classes are numbered in alphabetical order. Without folders `train` and `test`, a fifth of each class is drawn for
    the test, always the same. Images are grey if all of them are, else colours.

    Raises:
      DataError: there are fewer than two classes, a class without images or with a single one to be divided, a class of
        the test that is not trained on, an unreadable file, or images of several sizes.
    """
    divided = (folder / "train").is_dir() and (folder / "test").is_dir()
    parts = [_files(folder / "train"), _files(folder / "test")] if divided else [_files(folder)]
    classes = sorted(parts[0])
    if len(classes) < 2:
        raise DataError(f"{folder} must hold a folder of images for each of two classes at least, got {classes}")
    if divided:
        if unknown := sorted(set(parts[1]) - set(classes)):
            raise DataError(f"{folder / 'test'} has the classes {unknown}, which are not in {folder / 'train'}")
        train, test = ([(file, classes.index(name)) for name in part for file in part[name]] for part in parts)
    else:
        train, test = _divide(folder, parts[0], classes)
    files = [file for file, _ in (*train, *test)]
    pixels = [read_image(file) for file in files]
    if len({image.ndim for image in pixels}) > 1:
        pixels = [image if image.ndim == 3 else np.stack([image] * 3, -1) for image in pixels]
    for file, image in zip(files, pixels, strict=True):
        if image.shape != pixels[0].shape:
            sizes = " and ".join(f"{shape[1]} x {shape[0]}" for shape in (pixels[0].shape, image.shape))
            raise DataError(f"{files[0]} and {file} are {sizes} pixels; bring all images to one size")
    images = np.stack(pixels)
    images = images[..., None] if images.ndim == 3 else images
    labels = np.array([label for _, label in (*train, *test)], np.int32)
    cut = len(train)
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def _files(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The images of every class, in alphabetical order."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            found[path.name] = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
            if not found[path.name]:
                raise DataError(f"{path} has no image; known endings are {', '.join(ENDINGS)}")
    return found


def _divide(
    folder: pathlib.Path, of_class: dict[str, list[pathlib.Path]], classes: list[str]
) -> tuple[list[tuple[pathlib.Path, int]], list[tuple[pathlib.Path, int]]]:
    rng = np.random.default_rng(0)
    train, test = [], []
    for label, name in enumerate(classes):
        files = of_class[name]
        if len(files) < 2:
            raise DataError(f"{folder / name} has a single image, which cannot be both trained and tested on")
        aside = set(rng.permutation(len(files))[: max(1, round(TEST_SHARE * len(files)))].tolist())
        for i, file in enumerate(files):
            (test if i in aside else train).append((file, label))
    return train, test
