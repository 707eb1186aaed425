"""Data on the devices: a batch depends on the key and the step alone, whatever the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._machinery import device_data
from experiments._machinery.errors import DataError
from experiments.data import images as data


def mesh_of(count):
    return jax.make_mesh((count,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


batch_indices = jax.jit(device_data.batch_indices, static_argnames=("size", "batch_size"))


def test_an_epoch_visits_every_example_once_and_the_next_in_another_order(key):
    rows = np.asarray(batch_indices(key, jnp.arange(20), size=100, batch_size=10))
    np.testing.assert_array_equal(np.sort(rows[:10].ravel()), np.arange(100))
    np.testing.assert_array_equal(np.sort(rows[10:].ravel()), np.arange(100))
    assert (rows[:10] != rows[10:]).mean() > 0.9


def test_a_batch_is_a_function_of_the_step_alone(key):
    whole = np.asarray(batch_indices(key, jnp.arange(12), size=103, batch_size=10))
    for start, length in ((0, 5), (5, 1), (6, 6)):
        part = batch_indices(key, start + jnp.arange(length), size=103, batch_size=10)
        np.testing.assert_array_equal(part, whole[start : start + length])


@pytest.mark.parametrize("batch_size", [0, 101])
def test_batch_size_outside_the_data_is_refused(key, batch_size):
    with pytest.raises(DataError, match=r"\[1, 100\]"):
        device_data.batch_indices(key, jnp.arange(2), 100, batch_size)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_gather_equals_numpy_on_any_number_of_devices(devices):
    draw = np.random.default_rng(0)
    split = data.Split(draw.integers(0, 256, (37, 3, 2, 1), np.uint8), draw.integers(0, 10, 37).astype(np.int32))
    placed = device_data.put(split, mesh_of(devices))
    indices = np.array([36, 0, 5, 5, 17, 36, 1, 2], np.int32)
    batch = jax.jit(device_data.gather)(placed, indices)
    np.testing.assert_array_equal(batch.images, split.images[indices])
    np.testing.assert_array_equal(batch.labels, split.labels[indices])
    assert {shard.data.shape for shard in batch.labels.addressable_shards} == {(8 // devices,)}
    again = device_data.put(placed, mesh_of(4))
    np.testing.assert_array_equal(np.asarray(again.arrays.labels)[:37], split.labels)


def test_each_device_holds_only_its_rows():
    placed = device_data.put(np.zeros((64, 5), np.uint8), mesh_of(8))
    assert {shard.data.shape for shard in placed.arrays.addressable_shards} == {(8, 5)}


def test_augmentation_is_the_same_on_one_and_on_eight_devices(key):
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)

    @jax.jit
    def augment(placed):
        batch = device_data.gather(placed, jnp.arange(16))
        return device_data.random_crop(device_data.random_flip(batch, key), key, padding=2)

    one, eight = (augment(device_data.put(images, mesh_of(devices))) for devices in (1, 8))
    np.testing.assert_array_equal(one, eight)


def test_crop_moves_within_the_padding_and_fills_with_zeros(key):
    images = np.random.default_rng(0).integers(1, 256, (64, 5, 6, 2), np.uint8)
    moved = np.asarray(jax.jit(lambda images: device_data.random_crop(images, key, padding=1))(images))
    seen = set()
    for image, result in zip(np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))), moved, strict=True):
        matches = [(i, j) for i in range(3) for j in range(3) if (image[i : i + 5, j : j + 6] == result).all()]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 9


def test_flip_mirrors_about_half_of_the_images(key):
    images = np.random.default_rng(0).integers(0, 256, (256, 2, 3, 1), np.uint8)
    flipped = np.asarray(device_data.random_flip(jnp.asarray(images), key))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    kept = (flipped == images).all((1, 2, 3))
    assert (mirrored | kept).all() and 96 < mirrored.sum() < 160


@pytest.mark.parametrize(("batch_size", "devices"), [(None, 8), (64, 8), (100, 5), (7, 7), (3, 3), (1, 1)])
def test_default_mesh_takes_the_most_devices_that_share_the_batch(batch_size, devices):
    assert device_data.data_mesh(batch_size).size == devices


@pytest.mark.parametrize("split", [np.zeros((0, 2)), (np.zeros(3), np.zeros(4))])
def test_a_split_without_one_common_length_is_refused(split):
    with pytest.raises(DataError, match="common length"):
        device_data.put(split, mesh_of(2))


def test_replicated_copy_can_be_donated_and_the_original_stays(key):
    tree = {"w": jnp.arange(3.0), "key": key}
    for devices in (1, 8):
        copy = device_data.replicate(tree, mesh_of(devices))
        jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), donate_argnums=0)(copy)
        assert copy["w"].is_deleted() and not tree["w"].is_deleted()
        np.testing.assert_array_equal(tree["w"], [0, 1, 2])
