"""Segmentation: noisy images of which every pixel has a label, loss, errors and training by any network.

@dataclasses.dataclass(frozen=True)
class Config(segmentation.Options):
    width: Count = 24

task = segmentation.load(config)
network = task.network(build)                  # build: key -> nnx module, images -> logits
state, history = task.fit(network, optimizer, seed, workdir, label="cnn")
history[-1]["test_pixel_error"]                # per cent
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import loop, options
from experiments._machinery.log import Record
from experiments._machinery.options import Count, Positive, Range
from experiments.data import scenes

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
    """Options of every segmentation experiment; its `Config` adds its own."""

    dataset: str = "digits"  # digits, mnist, another set of single grey digits, or a path to an .npz of labelled images
    data_dir: str | None = None  # folder of prepared TFDS sets
    tiles: Count = 2  # digits along each side of a scene
    scenes: Count = 4000  # training scenes; a quarter as many for the test
    noise: Annotated[float, Range(0)] = 0.2  # standard deviation, where ink is 1
    ink: Positive = 0.4  # a pixel at least this dark belongs to the stroke
    seeds: Count = 3
    steps: Count = 1500
    batch_size: Count = 32
    evaluations: Count = 10  # over the run


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A network compiled for the task; the same object for another seed compiles nothing."""

    init: Callable[[jax.Array], PyTree]  # key -> parameters
    logits: Callable[[PyTree, jax.Array], jax.Array]  # (parameters, images) -> [batch, height, width, labels]
    loss_fn: loop.LossFn  # mean cross-entropy of the pixels of images with fresh noise
    evaluate: Callable[[loop.TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Everything that runs of the same options share."""

    options: Options
    dataset: scenes.Dataset

    def network(self, build: Callable[[jax.Array], nnx.Module]) -> Network:
        """A network, from its key to what is measured."""
        graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param)[0]
        init = jax.jit(lambda key: nnx.split(build(key), nnx.Param)[1])
        logits = lambda params, images: nnx.merge(graph, params, copy=True)(images)

        def loss_fn(params: PyTree, model_state: PyTree, batch: scenes.Scenes, key: jax.Array):
            noise = self.options.noise * jax.random.normal(key, batch.images.shape)
            found = logits(params, batch.images + noise)
            return optax.softmax_cross_entropy_with_integer_labels(found, batch.labels).mean(), (model_state, {})

        def per_example(params: PyTree, model_state: PyTree, batch: scenes.Scenes) -> dict[str, jax.Array]:
            del model_state
            found = logits(params, batch.images)
            wrong = (found.argmax(-1) != batch.labels).astype(jnp.float32)
            stroke = (batch.labels > 0).astype(jnp.float32)
            pixels = (1, 2)
            return {
                "pixel_error": 100.0 * wrong.mean(pixels),
                "stroke_error": 100.0 * (wrong * stroke).sum(pixels) / jnp.maximum(stroke.sum(pixels), 1.0),
                "loss": optax.softmax_cross_entropy_with_integer_labels(found, batch.labels).mean(pixels),
            }

        evaluate = loop.evaluator(per_example, self.dataset.test, batch_size=250)
        return Network(init, jax.jit(logits), loss_fn, evaluate)

    def fit(
        self,
        network: Network,
        optimizer: optax.GradientTransformation,
        seed: int,
        workdir: str | os.PathLike | None,
        *,
        label: str,
    ) -> tuple[loop.TrainState, list[Record]]:
        """Trains one network; its parameters, batches and noise depend on the seed alone."""
        init_key, train_key = jax.random.split(jax.random.key(seed))
        steps = self.options.steps
        return loop.fit(
            network.loss_fn,
            optimizer,
            loop.init_state(network.init(init_key), optimizer, key=train_key),
            self.dataset.train,
            batch_size=self.options.batch_size,
            steps=steps,
            steps_per_call=min(50, steps),
            evaluate=network.evaluate,
            evaluate_every=max(1, steps // self.options.evaluations),
            workdir=workdir,
            checkpoint_every=0,
            label=label,
        )

    def segment(self, network: Network, state: loop.TrainState, count: int) -> np.ndarray:
        """Labels of the first test images, int32 [count, height, width]."""
        return np.asarray(network.logits(jax.device_get(state.params), self.dataset.test.images[:count]).argmax(-1))


def load(options: Options) -> Task:
    """Makes or reads the data of these options."""
    dataset = scenes.load(
        options.dataset,
        options.data_dir,
        count=options.scenes,
        tiles=options.tiles,
        ink=options.ink,
        noise=options.noise,
        least=options.batch_size,
    )
    return Task(options, dataset)
