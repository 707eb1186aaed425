"""Image classification: data set, network, loss, evaluation and training by any optimizer.

    @dataclasses.dataclass(frozen=True)
    class Config(classification.Options):
        sparsity: Share = 0.9

    task = classification.load(config, classification.network("lenet300"))
    state, history = task.fit(optimizer, task.start(optimizer, seed), workdir, steps=1000, label="lenet300 seed 0")
    history[-1]["test_error"]  # per cent

A method with a loss, an initialisation or measurements of its own hands them to `fit`; what it shares with others it
takes from the task, so that the cases of a run share compiled programs and the data on the devices. One whose network
is functions, or another one for every row, takes the data alone, from `load_data`.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Annotated, Any

import jax
import numpy as np
import optax
from flax import nnx

from experiments._machinery import device_data, loop, options
from experiments._machinery.log import Record
from experiments._machinery.options import Count, Range
from experiments.data import images
from jaxlib_methods import models

PyTree = Any
Build = Callable[[jax.Array, images.Dataset], nnx.Module]  # (key, data set) -> network


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
    """Options of every classification experiment; its `Config` adds its own."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, a path to an .npz or to a folder of images
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    seeds: Count = 1
    batch_size: Count = 100
    validation_fraction: Annotated[float, Range(0, 1, closed="left")] = 0.0  # of the training set, set aside


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Images on the devices, and what trains and evaluates any network on them."""

    options: Options
    dataset: images.Dataset
    split: device_data.OnDevice  # of the training set
    standardise: Callable[[Any], Any]  # images uint8 -> float32
    augment: Callable[[images.Split, jax.Array], images.Split] | None  # crops and flips where the set is CIFAR

    def evaluator(self, logits_fn: Callable[[PyTree, PyTree, jax.Array], jax.Array]) -> Callable[..., dict[str, float]]:
        """`state -> {"test_error", "test_loss"}` of other logits, and the same of validation data where there are."""
        per_example = loop.classification(logits_fn)
        parts = [(self.dataset.test, "test_"), (self.dataset.validation, "validation_")]
        found = [
            loop.evaluator(per_example, split, mesh=self.split.mesh, prefix=prefix)
            for split, prefix in parts
            if split is not None
        ]
        return lambda state: {name: value for evaluate in found for name, value in evaluate(state).items()}

    def fit(
        self,
        optimizer: optax.GradientTransformation,
        state: loop.TrainState,
        workdir: str | os.PathLike | None,
        *,
        steps: int,
        label: str,
        evaluate: Callable[[loop.TrainState], dict[str, float]],
        loss_fn: loop.LossFn,
        **changes: Any,
    ) -> tuple[loop.TrainState, list[Record]]:
        """Trains one network with `loop.fit`; the same objects for another seed compile nothing.

        Args:
          optimizer, state, workdir, steps, label, loss_fn: as for `loop.fit`.
          evaluate: from `evaluator`, made once.
          changes: other arguments of `loop.fit`.
        """
        defaults = {"batch_size": self.options.batch_size, "augment": self.augment, "mesh": self.split.mesh}
        return loop.fit(
            loss_fn,
            optimizer,
            state,
            self.split,
            steps=steps,
            label=label,
            evaluate=evaluate,
            workdir=workdir,
            **defaults | changes,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Task(Data):
    """Data and a network: all that runs of the same options share, so that nothing is compiled or loaded twice."""

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]  # key -> (params, model_state)
    apply: Callable[..., tuple[jax.Array, PyTree]]  # (params, model_state, images, train) -> (logits, model_state)
    forward: Callable[..., tuple[jax.Array, PyTree]]  # the same of images that are standardised already
    loss_fn: loop.LossFn  # mean cross-entropy
    logits: Callable[[PyTree, PyTree, jax.Array], jax.Array]  # (params, model_state, images), in evaluation mode

    def start(self, optimizer: optax.GradientTransformation, seed: int) -> loop.TrainState:
        """The state before the first step: every optimizer gets the same parameters and batches from the same seed."""
        init_key, train_key = jax.random.split(jax.random.key(seed))
        params, model_state = self.init(init_key)
        return loop.init_state(params, optimizer, key=train_key, model_state=model_state)

    def fit(
        self, *args: Any, loss_fn: loop.LossFn | None = None, **kwargs: Any
    ) -> tuple[loop.TrainState, list[Record]]:
        """As `Data.fit`, with the task's loss by default."""
        return super().fit(*args, loss_fn=loss_fn or self.loss_fn, **kwargs)


def network(name: str, **arguments: Any) -> Build:
    """A network of `jaxlib_methods.models` by name, for `load`."""

    def build(key: jax.Array, dataset: images.Dataset) -> nnx.Module:
        shape = dataset.train.images.shape[1:]
        rngs = nnx.Rngs(params=key)
        return models.create(name, num_classes=dataset.num_classes, input_shape=shape, rngs=rngs, **arguments)

    return build


def load_data(options: Options, *, per_channel: bool | None = None, minimum_side: int = 0) -> Data:
    """Loads the images.

    Args:
      options: of the data.
      per_channel: standardise every channel by its own mean; None: where there are several.
      minimum_side: images below it are enlarged three times and framed by two pixels; LeNet-5 needs 16.
    """
    dataset = images.load(options.dataset, options.data_dir, options.validation_fraction)
    if dataset.train.images.shape[1] < minimum_side:
        parts = {name: _enlarged(getattr(dataset, name)) for name in ("train", "validation", "test")}
        dataset = dataset._replace(**parts)
    if per_channel is None:
        per_channel = dataset.train.images.shape[-1] > 1
    statistics = images.channel_statistics if per_channel else images.global_statistics
    mean, std = statistics(dataset.train.images)
    split = device_data.put(dataset.train, device_data.data_mesh(options.batch_size))
    standardise = lambda pixels: images.standardise(pixels, mean, std)
    return Data(options, dataset, split, standardise, crop_and_flip if options.dataset == "cifar10" else None)


def load(options: Options, build: Build, **changes: Any) -> Task:
    """Loads the data and compiles what initialises and applies a network.

    Args:
      options: of the data.
      build: makes the network, e.g. `network("lenet300")`.
      changes: other arguments of `load_data`.
    """
    data = load_data(options, **changes)
    dataset, standardise = data.dataset, data.standardise
    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0), dataset)), nnx.Param, ...)[0]

    @jax.jit
    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        return nnx.split(build(key, dataset), nnx.Param, ...)[1:]

    def forward(params: PyTree, model_state: PyTree, inputs: jax.Array, train: bool) -> tuple[jax.Array, PyTree]:
        model = nnx.merge(graph, params, model_state)
        model.train() if train else model.eval()
        logits = model(inputs)
        return logits, nnx.split(model, nnx.Param, ...)[2]

    def apply(params: PyTree, model_state: PyTree, pixels: jax.Array, train: bool) -> tuple[jax.Array, PyTree]:
        return forward(params, model_state, standardise(pixels), train)

    def loss_fn(params: PyTree, model_state: PyTree, batch: images.Split, key: jax.Array):
        del key
        logits, model_state = apply(params, model_state, batch.images, True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean(), (model_state, {})

    logits = lambda params, model_state, pixels: apply(params, model_state, pixels, False)[0]
    return Task(options, dataset, data.split, standardise, data.augment, init, apply, forward, loss_fn, logits)


def crop_and_flip(batch: images.Split, key: jax.Array) -> images.Split:
    """CIFAR's augmentation: random crops of images padded by four pixels, mirrored half of the time."""
    crop_key, flip_key = jax.random.split(key)
    return batch._replace(images=device_data.random_flip(device_data.random_crop(batch.images, crop_key), flip_key))


def _enlarged(split: images.Split | None) -> images.Split | None:
    if split is None:
        return None
    larger = split.images.repeat(3, axis=1).repeat(3, axis=2)
    return split._replace(images=np.pad(larger, ((0, 0), (2, 2), (2, 2), (0, 0))))
