"""Loading: embedded, prepared, from a file; and the one sentence for everything that cannot be loaded."""

import socket
import sys
import time

import numpy as np
import pytest

from experiments._machinery.errors import DataError
from experiments.data import images as data


def test_digits_are_deterministic_and_complete():
    first, second = data.load("digits"), data.load("digits", seed=7)
    assert first.train.images.shape == (1437, 8, 8, 1) and first.train.images.dtype == np.uint8
    assert first.test.labels.shape == (360,) and first.test.labels.dtype == np.int32
    assert first.num_classes == 10 and first.validation is None
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert set(np.unique(first.test.labels)) == set(range(10))


def test_validation_split_partitions_the_training_set_by_seed():
    whole = data.load("digits").train
    a, b = data.load("digits", validation_fraction=0.1, seed=0), data.load("digits", validation_fraction=0.1, seed=1)
    assert len(a.validation.labels) == 144 and len(a.train.labels) == 1437 - 144
    rows = lambda images: sorted(image.tobytes() for image in images)
    assert rows(np.concatenate([a.train.images, a.validation.images])) == rows(whole.images)
    assert rows(a.validation.images) != rows(b.validation.images)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 1e-9])
def test_validation_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(DataError, match="validation_fraction"):
        data.load("digits", validation_fraction=fraction)


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0)
    return {
        "x_train": draw.integers(0, 256, (12, 6, 5), np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": draw.integers(0, 256, (4, 6, 5), np.uint8),
        "y_test": np.arange(4) % 3,
    }


def test_npz_round_trip_adds_the_channel_axis(tmp_path, arrays):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    loaded = data.load(str(path))
    np.testing.assert_array_equal(loaded.train.images, arrays["x_train"][..., None])
    np.testing.assert_array_equal(loaded.test.labels, arrays["y_test"])
    assert loaded.num_classes == 3 and loaded.test.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.zeros((12, 6, 5), np.float32)}, "must be uint8"),
        ({"y_train": np.zeros(11, np.int64)}, "images must be"),
        ({"y_test": np.zeros(4, np.float32)}, "labels integers"),
        ({"x_test": np.zeros((0, 6, 5), np.uint8), "y_test": np.zeros(0, np.int64)}, "empty test split"),
    ],
)
def test_npz_with_wrong_contents_names_them(tmp_path, arrays, change, message):
    path = tmp_path / "mine.npz"
    np.savez(path, **{name: value for name, value in (arrays | change).items() if value is not None})
    with pytest.raises(DataError, match=message):
        data.load(str(path))


def test_npz_absent_or_truncated_is_one_sentence(tmp_path, arrays):
    path = tmp_path / "mine.npz"
    with pytest.raises(DataError, match="there is no file"):
        data.load(str(path))
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        data.load(str(path))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", ["mnist", "cifar100", "mnist:9.9.9"])
def test_unprepared_set_ends_within_seconds_and_says_how_to_prepare_it(tmp_path, no_network, name):
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"not prepared under .*--data-dir .*--download") as caught:
        data.load(name, tmp_path)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_the_known_ones(tmp_path, no_network):
    with pytest.raises(DataError, match="unknown data set 'minst'; known are digits, mnist"):
        data.load("minst", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("mnist", r"pip install .*, or give a path to an \.npz"), ("minst", "unknown data set 'minst'")],
)
def test_without_tfds_the_rest_still_loads(tmp_path, arrays, monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # import raises ImportError
    with pytest.raises(DataError, match=message):
        data.load(name, tmp_path)
    np.savez(tmp_path / "mine.npz", **arrays)
    assert len(data.load(str(tmp_path / "mine.npz")).train.labels) == 12
    assert len(data.load("digits").train.labels) == 1437


def test_text_is_bytes_and_a_damaged_cache_is_replaced(shared_data, tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decoded = data.load("tiny_shakespeare", shared_data / "tfds")
    assert decoded.train.shape == (1003854,) and decoded.train.dtype == np.uint8 and decoded.num_classes == 256
    assert bytes(decoded.train[:13]) == b"First Citizen"
    (cached,) = (tmp_path / "jaxlib_methods" / "data").iterdir()
    np.testing.assert_array_equal(data.load("tiny_shakespeare", shared_data / "tfds").test, decoded.test)
    cached.write_bytes(b"not a zip")
    np.testing.assert_array_equal(data.load("tiny_shakespeare", shared_data / "tfds").train, decoded.train)
    assert cached.stat().st_size > 1_000_000


def test_mnist_is_read_without_tensorflow(shared_data, no_network):
    mnist = data.load("mnist", shared_data / "tfds", 0.1)
    assert mnist.train.images.shape == (54000, 28, 28, 1) and mnist.validation.labels.shape == (6000,)
    assert mnist.test.images.shape == (10000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(mnist.test.labels)[:3], [980, 1135, 1032])
    mean, std = data.global_statistics(mnist.train.images)
    assert abs(mean / 255 - 0.1307) < 1e-3 and abs(std / 255 - 0.3081) < 1e-3


def test_statistics_are_exact_and_standardise(arrays):
    images = np.random.default_rng(1).integers(0, 256, (50, 4, 4, 3), np.uint8)
    mean, std = data.channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2), np.float64), rtol=1e-6)
    np.testing.assert_allclose(std, images.std((0, 1, 2), np.float64), rtol=1e-6)
    standard = data.standardise(images, mean, std)
    assert standard.dtype == np.float32
    np.testing.assert_allclose(standard.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(standard.std((0, 1, 2)), 1, atol=1e-5)


def test_windows_overlap_by_the_target_byte():
    rows = data.windows(np.arange(10, dtype=np.uint8), 3)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])
    with pytest.raises(DataError, match="too few"):
        data.windows(np.arange(3, dtype=np.uint8), 3)
