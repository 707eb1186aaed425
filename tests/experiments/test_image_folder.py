"""Images from a folder of the user's own: classes by folder, and every way in which it can be wrong."""

import numpy as np
import pytest
from PIL import Image

from experiments._machinery.errors import DataError
from experiments.data import images


@pytest.fixture
def folder(tmp_path):
    """Ten grey images of 6 x 5 pixels in each of two classes; the pixels are the number of the image."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            save(tmp_path / "own" / name / f"{i}.png", np.full((5, 6), 10 * label + i, np.uint8))
    return tmp_path / "own"


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_a_fifth_of_every_class_is_for_the_test(folder):
    (folder / ".cache").mkdir()
    (folder / "cat" / "notes.txt").write_text("no image")
    found = images.load(str(folder))
    assert found.train.images.shape == (16, 5, 6, 1) and found.test.images.shape == (4, 5, 6, 1)
    assert found.num_classes == 2 and found.test.labels.tolist() == [0, 0, 1, 1]
    for split in (found.train, found.test):
        np.testing.assert_array_equal(split.images[:, 0, 0, 0] // 10, split.labels)
    both = np.concatenate([found.train.images, found.test.images])[:, 0, 0, 0]
    assert sorted(both.tolist()) == list(range(20))
    np.testing.assert_array_equal(images.load(str(folder)).test.images, found.test.images)


def test_folders_train_and_test_are_taken_as_they_are(folder):
    own = folder.parent / "divided"
    own.mkdir()
    folder.rename(own / "train")
    save(own / "test" / "dog" / "one.jpg", np.full((5, 6, 3), 200, np.uint8))
    found = images.load(str(own))
    assert found.train.images.shape == (20, 5, 6, 3)  # one is in colours, so all are
    assert found.test.labels.tolist() == [1] and abs(int(found.test.images[0, 0, 0, 0]) - 200) < 5
    save(own / "test" / "fish" / "one.png", np.zeros((5, 6), np.uint8))
    with pytest.raises(DataError, match=r"test has the classes \['fish'\], which are not in .*train"):
        images.load(str(own))


def test_what_is_wrong_is_named(folder):
    save(folder / "eel" / "0.png", np.zeros((5, 6), np.uint8))
    with pytest.raises(DataError, match="eel has a single image, which cannot be both trained and tested on"):
        images.load(str(folder))
    save(folder / "eel" / "1.png", np.zeros((7, 6), np.uint8))
    with pytest.raises(DataError, match=r"are 6 x 5 and 6 x 7 pixels; bring all images to one size"):
        images.load(str(folder))
    (folder / "eel" / "1.png").write_text("no image")
    with pytest.raises(DataError, match=r"1\.png cannot be read as an image"):
        images.load(str(folder))
    (folder / "fox").mkdir()
    with pytest.raises(DataError, match=r"fox has no image; known endings are \.png"):
        images.load(str(folder))
    with pytest.raises(DataError, match=r"two classes at least, got \[\]"):
        images.load(str(folder / "cat"))
