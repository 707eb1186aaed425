"""Segmentation of volumes: voxels with labels, some of which are ignored; loss, intersection over union, training.

    task = volume_segmentation.load(config)
    graph, params, model_state = nnx.split(network, nnx.Param, ...)
    state, history = task.fit(graph, params, model_state, optimizer, key, workdir, label="3D-UNet")
    task.miou(graph, state)                        # per cent

Intersections and unions are of the whole test set, and classes that do not occur are left out of the mean.
"""

import dataclasses
import math
import os
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments._machinery import device_data, loop, options
from experiments._machinery.log import Record
from experiments._machinery.options import Count
from experiments.data import volumes
from jaxlib_methods.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
    """Options of every experiment on volumes; its `Config` adds its own."""

    dataset: str = "parts"  # "parts" (generated), or an .npz of voxels, see data/volumes.py
    size: Count = 16  # voxels of a side of the generated volumes
    volumes: Count = 192  # generated volumes to train on; a third as many to test on
    seeds: Count = 1
    steps: Count = 150
    batch_size: Count = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Volumes on the devices, and what trains and evaluates any network on them."""

    options: Options
    dataset: volumes.Dataset
    split: device_data.OnDevice  # of the training set

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """A batch of one volume."""
        return jax.ShapeDtypeStruct((1, *self.dataset.train.volumes.shape[1:]), jnp.float32)

    def fit(
        self,
        graph: Any,
        params: PyTree,
        model_state: PyTree,
        optimizer: optax.GradientTransformation,
        key: jax.Array,
        workdir: str | os.PathLike | None,
        *,
        label: str,
    ) -> tuple[loop.TrainState, list[Record]]:
        """Trains one network of the graph that `nnx.split` gives; its batches depend on the key alone."""

        def loss_fn(params: PyTree, model_state: PyTree, batch: volumes.Split, key: jax.Array):
            del key
            loss, model_state = loss_of(graph, params, model_state, batch)
            return loss, (model_state, {})

        return loop.fit(
            loss_fn,
            optimizer,
            loop.init_state(params, optimizer, key=key, model_state=model_state),
            self.split,
            batch_size=self.options.batch_size,
            steps=self.options.steps,
            steps_per_call=max(1, self.options.steps // 8),
            workdir=workdir,
            mesh=self.split.mesh,
            label=label,
        )

    def miou(self, graph: Any, state: loop.TrainState) -> float:
        """Mean intersection over union of the test volumes, in percent."""
        count = self.dataset.num_classes
        per_example = lambda params, model_state, batch: overlaps(graph, count, params, model_state, batch)
        return mean_iou(loop.evaluator(per_example, self.dataset.test)(state), count)


def load(options: Options) -> Task:
    """Loads or generates the volumes."""
    count = options.volumes
    dataset = volumes.load(options.dataset, size=options.size, train=count, test=math.ceil(count / 3))
    return Task(options, dataset, device_data.put(dataset.train, device_data.data_mesh(options.batch_size)))


def logits_of(graph: Any, params: PyTree, model_state: PyTree, x: jax.Array, mode: str) -> tuple[jax.Array, PyTree]:
    """Logits in the mode "train" or "eval", and the new state."""
    model = nnx.merge(graph, params, model_state, copy=True)
    getattr(model, mode)()
    logits = model(x.astype(jnp.float32))
    return logits, nnx.split(model, nnx.Param, ...)[2]


def loss_of(graph: Any, params: PyTree, model_state: PyTree, batch: volumes.Split) -> tuple[jax.Array, PyTree]:
    """Mean cross-entropy of the voxels whose label is not ignored."""
    logits, model_state = logits_of(graph, params, model_state, batch.volumes, "train")
    counted = batch.labels != volumes.IGNORED
    labels = jnp.where(counted, batch.labels, jnp.uint8(0)).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    total = jnp.maximum(jnp.sum(counted.astype(jnp.float32)), 1.0)
    return jnp.sum(jnp.where(counted, losses, jnp.zeros_like(losses))) / total, model_state


def overlaps(
    graph: Any, num_classes: int, params: PyTree, model_state: PyTree, batch: volumes.Split
) -> dict[str, jax.Array]:
    """Voxels in the intersection and in the union of prediction and label, by class, for each volume."""
    logits, _ = logits_of(graph, params, model_state, batch.volumes, "eval")
    predicted, counted = jnp.argmax(logits, axis=-1), batch.labels != volumes.IGNORED
    found = {}
    for c in range(num_classes):
        ours, theirs = (predicted == c) & counted, batch.labels == c
        count = lambda inside: jnp.sum(inside.astype(jnp.float32), axis=(1, 2, 3))
        found |= {f"and{c}": count(ours & theirs), f"or{c}": count(ours | theirs)}
    return found


def mean_iou(means: dict[str, float], num_classes: int) -> float:
    """Mean over the classes that occur, in percent; intersections and unions are of the whole test set."""
    pairs = [(means[f"test_and{c}"], means[f"test_or{c}"]) for c in range(num_classes)]
    return 100 * statistics.fmean(both / either for both, either in pairs if either)
