"""Meshes with the axes of a pipeline, and the host boundary: what enters a mesh is checked here, once."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlib_methods._core import checks

__all__ = [
    "make_mesh",
    "shard_batch",
    "split_microbatches",
]

AXES = ("stage", "data")


def make_mesh(num_stages: int, num_replicas: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of P stages times D replicas with the axes "stage" and "data".

    Neighbouring stages are neighbours in the order of the devices, so that with one stage a process the data axis
    stays inside of a process and only the boundaries between stages cross the network.

    Args:
      num_stages: P.
      num_replicas: D, the pipelines that run side by side on different data.
      devices: P D devices, or more; None: all of all processes.

    Returns:
      The mesh.

    Raises:
      ValueError: for sizes below 1, and if there are too few devices.

    Example:
      >>> make_mesh(1).axis_names
      ('stage', 'data')
    """
    checks.at_least(1, num_stages=num_stages, num_replicas=num_replicas)
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) < num_stages * num_replicas:
        raise ValueError(
            f"{num_stages} stages times {num_replicas} replicas need {num_stages * num_replicas} devices, there are "
            f"{len(devices)}; take fewer stages, start more processes, or on a CPU set jax_num_cpu_devices"
        )
    return Mesh(np.array(devices[: num_stages * num_replicas]).reshape(num_stages, num_replicas), AXES)


def mesh_sizes(mesh: Mesh) -> tuple[int, int]:
    """(P, D) of a mesh that has both axes and no others."""
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(f"the mesh must have the axes {AXES}, got {tuple(mesh.axis_names)}; make_mesh makes one")
    return mesh.shape["stage"], mesh.shape["data"]


def split_microbatches(batch: Any, num_microbatches: int) -> Any:
    """Cuts the arrays of a batch, (M B, ...), into micro-batches (M, B, ...) of consecutive examples.

    Args:
      batch: an array or a tree of arrays whose first axes are equal.
      num_microbatches: M.

    Returns:
      The same tree of reshaped arrays.

    Raises:
      ValueError: if M does not divide the batch.

    Example:
      >>> split_microbatches(np.arange(6), 3).tolist()
      [[0, 1], [2, 3], [4, 5]]
    """

    def cut(leaf: Any) -> Any:
        if num_microbatches < 1 or leaf.shape[0] % num_microbatches:
            raise ValueError(
                f"num_microbatches must divide the batch, got {num_microbatches} for {leaf.shape[0]} examples"
            )
        return leaf.reshape(num_microbatches, -1, *leaf.shape[1:])

    return jax.tree.map(cut, batch)


def shard_batch(mesh: Mesh, batch: Any, vocab_size: int | None = None) -> Any:
    """Puts micro-batches (n, B, ...) from the host onto a mesh: B over "data", the same for all stages.

    Every process passes the same arrays and copies out of them what its own devices need.

    Args:
      mesh: with the axes "stage" and "data".
      batch: a NumPy array or a tree of them, the same on every process.
      vocab_size: V; given, integer arrays must hold token ids in [0, V). A device would clamp them silently.

    Returns:
      The same tree of global arrays.

    Raises:
      ValueError: for a mesh without these axes, a B that the replicas do not divide, and ids out of range.

    Example:
      >>> shard_batch(make_mesh(1), np.zeros((3, 2, 4), np.int32), vocab_size=256).shape
      (3, 2, 4)
    """
    _, replicas = mesh_sizes(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(None, "data"))

    def put(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.ndim < 2 or leaf.shape[1] % replicas:
            raise ValueError(
                f"a batch needs the axes (micro-batch, example, ...) with examples that {replicas} replicas divide, "
                f"got the shape {leaf.shape}"
            )
        if vocab_size is not None and leaf.size and np.issubdtype(leaf.dtype, np.integer):
            low, high = leaf.min(), leaf.max()
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"token ids must lie in [0, {vocab_size}), got {low if low < 0 else high}; "
                    "is the text tokenised for another vocabulary?"
                )
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, batch)
