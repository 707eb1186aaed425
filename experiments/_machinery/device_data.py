"""Small data sets on the devices: sharded rows, shuffling without a sort, gather, crop and flip inside jit.

Step t of a run uses batch t mod (n // batch_size) of epoch t // (n // batch_size). Which examples stand in it depends
on (key, t) alone: not on the number of devices or processes, nor on where a run was interrupted. The mesh has `Auto`
axes, so that a loss function is written as if there were one device and XLA partitions it; only the gather is manual.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments._machinery.errors import DataError
from jaxlib_methods._core.sampling import shuffled

PyTree = Any
AXIS = "data"


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("size", "mesh"))
@dataclasses.dataclass(frozen=True)
class OnDevice:
    """A split whose rows are spread over the mesh; rows from `size` on are zero padding."""

    arrays: PyTree  # leaves [padded size, ...], sharded over the rows
    size: int
    mesh: Mesh

    def __len__(self) -> int:
        return self.size


def data_mesh(batch_size: int | None = None) -> Mesh:
    """All devices of all processes in one axis "data"; with a batch size, the most devices that share it evenly.

    Several processes cannot leave a device out, so there the batch size must be a multiple of their number.
    """
    devices = jax.devices()
    count = len(devices)
    if batch_size is not None and batch_size % count:
        if jax.process_count() > 1:
            raise DataError(f"batch_size {batch_size} is not a multiple of the {count} devices of all processes")
        count = next(n for n in range(min(count, batch_size), 0, -1) if batch_size % n == 0)
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def put(split: PyTree, mesh: Mesh) -> OnDevice:
    """Puts a pytree of numpy arrays with a common first axis on the mesh; each process copies only its own rows."""
    if isinstance(split, OnDevice):
        return (
            split
            if split.mesh == mesh
            else put(jax.tree.map(lambda x: np.asarray(x)[: split.size], split.arrays), mesh)
        )
    sizes = {len(leaf) for leaf in jax.tree.leaves(split)}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(f"the arrays of a split need one common length above 0, got {sorted(sizes)}")
    size = sizes.pop()
    padded = math.ceil(size / mesh.size) * mesh.size
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def place(array: np.ndarray) -> jax.Array:
        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(padded)
            part = array[start:stop]
            return np.pad(part, [(0, stop - start - len(part))] + [(0, 0)] * (array.ndim - 1))

        return jax.make_array_from_callback((padded, *array.shape[1:]), sharding, rows)

    return OnDevice(jax.tree.map(place, split), size, mesh)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies a pytree of arrays to every device of the mesh; the copy may be donated, the argument stays valid."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        tree = jax.device_put(tree, sharding)  # shares the argument's buffers where it can
        return _copy(tree)

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        host = np.array(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def batch_indices(key: jax.Array, steps: jax.Array, size: int, batch_size: int) -> jax.Array:
    """Rows of the examples of each step, int32 [steps, batch_size]; an epoch's last partial batch is left out."""
    if not 0 < batch_size <= size:
        raise DataError(f"batch_size must lie in [1, {size}], the number of training examples, got {batch_size}")
    per_epoch = size // batch_size

    def one_step(step: jax.Array) -> jax.Array:
        positions = (step % per_epoch) * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        return shuffled(jax.random.fold_in(key, step // per_epoch), positions, size)

    return jax.vmap(one_step)(steps.astype(jnp.int32))


def stream_indices(key: jax.Array, steps: jax.Array, size: int, batch_size: int) -> jax.Array:
    """As `batch_indices`, from an endless stream of shuffled epochs: batches straddle epochs, none is left out."""
    if not 0 < batch_size <= size:
        raise DataError(f"batch_size must lie in [1, {size}], the number of training examples, got {batch_size}")

    def one_step(step: jax.Array) -> jax.Array:
        places = step * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        epochs = places // size
        rows = lambda epoch: shuffled(jax.random.fold_in(key, epoch), places % size, size)
        return jnp.where(epochs == epochs[0], rows(epochs[0]), rows(epochs[0] + 1))

    return jax.vmap(one_step)(steps.astype(jnp.int32))


def gather(data: OnDevice, indices: jax.Array) -> PyTree:
    """The rows `indices` int32 [batch] of the split, the batch spread over the mesh; for use inside jit.

    Each device contributes the rows it holds and zeros for the others; the sum, scattered over the batch, moves one
    batch and never the data set.
    """
    if data.mesh.size == 1:
        return jax.tree.map(lambda rows: jnp.take(rows, indices, axis=0, mode="clip"), data.arrays)

    def local(rows: jax.Array, indices: jax.Array) -> jax.Array:
        mine = indices - jax.lax.axis_index(AXIS) * rows.shape[0]
        held = (mine >= 0) & (mine < rows.shape[0])
        picked = jnp.take(rows, mine, axis=0, mode="clip")
        picked = jnp.where(held.reshape(-1, *(1,) * (rows.ndim - 1)), picked, jnp.zeros_like(picked))
        return jax.lax.psum_scatter(picked, AXIS, scatter_dimension=0, tiled=True)

    spec = PartitionSpec(AXIS)
    share = jax.shard_map(local, mesh=data.mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    return jax.tree.map(lambda rows: share(rows, indices), data.arrays)


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image [batch, height, width, channels] left-right with probability one half."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def random_crop(images: jax.Array, key: jax.Array, *, padding: int = 4) -> jax.Array:
    """Moves each image by a uniform integer in [-padding, padding] per axis; what enters at the border is zero."""
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)
    cut = lambda image, offset: jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))
    return jax.vmap(cut)(padded, offsets)
