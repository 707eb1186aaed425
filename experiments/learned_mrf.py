r"""A small CNN with a TRWP layer on top, trained end to end to segment noisy digits, against the same CNN alone.

Paper: Xu, Ajanthan, Hartley, "Fast and Differentiable Message Passing on Pairwise Markov Random Fields", ACCV 2020

The paper's experiment refines a DeepLab on VOC; what is compared here is the same (no layer, mean field, TRWP), at the
size that two cores can train.

    python -m experiments run learned_mrf    # 2 x 2 digits of scikit-learn, 16 x 16 pixels
    python -m experiments run learned_mrf --data-dir DIR --dataset mnist --tiles 1    # one digit, 28 x 28 pixels

Task: a scene is a square of handwritten digits under Gaussian noise, and every pixel is to be labelled: background, or
the class of the digit whose stroke it is on. What a pixel's neighbourhood shows is ambiguous: the CNN sees 7 x 7
pixels, less than a digit. The layer has to carry what is certain along the strokes. All methods share the CNN, its
initialisation, the data, the noise and the number of steps; the layers learn one cost per pair of labels and, from the
CNN's features, one edge weight per pixel.

Measured with the defaults (3 seeds, 23 minutes on two cores that were busy with other work; mean and standard
deviation over the seeds), wrong pixels of strokes: CNN alone 49.4 +- 1.8 %, with mean field 48.2 +- 2.4 %, with TRWP
29.0 +- 0.8 %; of all pixels 18.8, 18.4 and 12.7 %.

Test scenes are made of test digits only, with noise drawn once. Figures: pixel error over the steps and example
segmentations.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases, loop as training
from experiments.data import images as data
from jaxlib_methods import message_passing as mp, models

PyTree = Any
Method = Literal["none", "mean_field", "isgmr", "trwp"]
MEASURED = ("test_pixel_error", "test_stroke_error", "test_loss")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of method and seed is one case; each is resumable."""

    dataset: str = "digits"  # digits, mnist, or another set of single grey digits
    data_dir: str | None = None  # folder of prepared TFDS sets
    tiles: int = 2  # digits along each side of a scene
    scenes: int = 4000  # training scenes; a quarter as many for the test
    noise: float = 0.2  # standard deviation, where ink is 1
    ink: float = 0.4  # a pixel at least this dark belongs to the stroke
    methods: tuple[Method, ...] = ("none", "mean_field", "trwp")
    width: int = 24  # channels of the CNN
    depth: int = 3  # 3 x 3 convolutions of the CNN, which thus sees 2 depth + 1 pixels across
    iterations: int = 5  # of the layer
    directions: int = 4
    seeds: int = 3
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 3e-3  # Adam, decayed by a cosine
    evaluations: int = 10  # over the run

    def __post_init__(self):
        for name in (
            "tiles",
            "scenes",
            "ink",
            "width",
            "depth",
            "iterations",
            "seeds",
            "steps",
            "batch_size",
            "evaluations",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.methods:
            raise ValueError("methods is empty; name at least one")


SMOKE = {"seeds": 1, "steps": 20, "scenes": 200, "evaluations": 1, "iterations": 2, "width": 8}
PAPER: dict[str, float] = {}  # the paper's VOC numbers are neither confirmed nor comparable


class Scenes(NamedTuple):
    images: np.ndarray  # float32 [n, height, width, 1]; ink is 1, noise included in the test scenes
    labels: np.ndarray  # int32 [n, height, width]; 0 is the background, k + 1 the digit k


class _Segmenter(nnx.Module):
    """A few 3 x 3 convolutions, then per pixel: logits, and for a layer also how much of a boundary it is."""

    def __init__(self, config: Config, method: str, num_labels: int, rngs: nnx.Rngs):
        conv = functools.partial(models.Conv, rngs=rngs)
        channels = (1, *(config.width,) * config.depth)
        self.convs = nnx.List([conv(a, b, kernel_size=(3, 3)) for a, b in itertools.pairwise(channels)])
        self.logits = conv(config.width, num_labels, kernel_size=(1, 1))
        self.directions = config.directions
        self.has_layer = method != "none"
        if self.has_layer:
            self.boundary = conv(config.width, 1, kernel_size=(1, 1))
            self.layer = mp.MessagePassing(
                num_labels, method=method, iterations=config.iterations, directions=config.directions, init_weight=0.5
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for convolution in self.convs:
            h = nnx.relu(convolution(h))
        logits = self.logits(h)
        if not self.has_layer:
            return logits
        boundaries = jax.nn.sigmoid(self.boundary(h)[..., 0])
        return self.layer(logits, mp.boundary_weights(boundaries, directions=self.directions))


def make_scenes(split: data.Split, count: int, config: Config, seed: int, *, noisy: bool) -> Scenes:
    """Squares of random digits; the labels come from the clean image."""
    rng = np.random.default_rng(seed)
    t = config.tiles
    chosen = rng.integers(len(split.labels), size=(count, t, t))
    clean = split.images[..., :1].astype(np.float32)[chosen] / float(split.images.max())  # [n, t, t, h, w, 1]
    classes = np.broadcast_to(split.labels[chosen][..., None, None, None], clean.shape)
    labels = np.where(clean >= config.ink, classes + 1, 0)
    height, width = t * clean.shape[3], t * clean.shape[4]
    together = lambda x: x.transpose(0, 1, 3, 2, 4, 5).reshape(count, height, width, 1)
    images = together(clean)
    if noisy:
        images = images + rng.normal(0, config.noise, images.shape).astype(np.float32)
    return Scenes(images.astype(np.float32), together(labels)[..., 0].astype(np.int32))


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figures and returns the last measurements, one per seed."""
    dataset = data.load(config.dataset, config.data_dir)
    scenes = make_scenes(dataset.train, config.scenes, config, 0, noisy=False)
    test = make_scenes(dataset.test, max(config.scenes // 4, config.batch_size), config, 1, noisy=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for method in config.methods:
        task = _Task.of(config, method, dataset.num_classes + 1, test)
        for seed in range(config.seeds):
            run_case = functools.partial(_run_case, task, scenes, test, seed)
            result = cases.run_or_load(workdir / "cases" / f"{method}-seed{seed}", run_case)
            results.setdefault(method, []).append(result)
    if jax.process_index() == 0:
        _figures(config, results, test, workdir)
    last = lambda method, name: [result["curve"][-1][name] for result in results[method]]
    return {f"{name} {method}": last(method, name) for method in config.methods for name in MEASURED}


class _Task(NamedTuple):
    """What all seeds of a method share; compiled functions are kept because these objects stay the same."""

    config: Config
    method: str
    init: Callable[[jax.Array], PyTree]
    loss_fn: training.LossFn
    optimizer: optax.GradientTransformation
    logits: Callable[[PyTree, jax.Array], jax.Array]
    evaluate: Callable[[training.TrainState], dict[str, float]]

    @classmethod
    def of(cls, config: Config, method: str, num_labels: int, test: Scenes) -> "_Task":
        build = lambda key: _Segmenter(config, method, num_labels, nnx.Rngs(params=key))
        graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param)[0]
        init = jax.jit(lambda key: nnx.split(build(key), nnx.Param)[1])
        logits = lambda params, images: nnx.merge(graph, params, copy=True)(images)

        def loss_fn(params: PyTree, model_state: PyTree, batch: Scenes, key: jax.Array):
            noise = config.noise * jax.random.normal(key, batch.images.shape)
            found = logits(params, batch.images + noise)
            return optax.softmax_cross_entropy_with_integer_labels(found, batch.labels).mean(), (model_state, {})

        def per_example(params: PyTree, model_state: PyTree, batch: Scenes) -> dict[str, jax.Array]:
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

        optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
        evaluate = training.evaluator(per_example, test, batch_size=250)
        return cls(config, method, init, loss_fn, optimizer, jax.jit(logits), evaluate)


def _run_case(task: _Task, scenes: Scenes, test: Scenes, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
    """Trains one network; returns its measurements by step and, for the figure, what it makes of a few scenes."""
    config = task.config
    init_key, train_key = jax.random.split(jax.random.key(seed))
    state, history = training.fit(
        task.loss_fn,
        task.optimizer,
        training.init_state(task.init(init_key), task.optimizer, key=train_key),
        scenes,
        batch_size=config.batch_size,
        steps=config.steps,
        steps_per_call=min(50, config.steps),
        evaluate=task.evaluate,
        evaluate_every=max(1, config.steps // config.evaluations),
        workdir=case_dir,
        checkpoint_every=0,
        label=f"{config.dataset} {task.method} seed {seed}",
    )
    curve = [record for record in history if "test_loss" in record]
    shown = np.asarray(task.logits(jax.device_get(state.params), test.images[:4]).argmax(-1))
    return {"curve": curve, "shown": shown.tolist()}


def _figures(config: Config, results: dict[str, list[dict[str, Any]]], test: Scenes, workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"none": "CNN alone", "mean_field": "CNN + mean field", "isgmr": "CNN + ISGMR", "trwp": "CNN + TRWP"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, measure in zip(axes, ("test_pixel_error", "test_stroke_error"), strict=True):
        for method, runs in results.items():
            values = np.array([[point[measure] for point in run["curve"]] for run in runs])
            steps = [point["step"] for point in runs[0]["curve"]]
            (line,) = axis.plot(steps, np.median(values, 0), marker=".", label=names[method])
            axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="step", ylabel=measure.replace("test_", "").replace("_", " ") + " on test scenes (%)")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(workdir / "learned_mrf.png", dpi=130)
    plt.close(figure)

    columns = ["noisy scene", "truth", *(names[method] for method in results)]
    figure, axes = plt.subplots(4, len(columns), figsize=(2 * len(columns), 8), layout="constrained", squeeze=False)
    for row in range(4):
        panels = [test.labels[row], *(np.array(runs[0]["shown"][row]) for runs in results.values())]
        axes[row, 0].imshow(test.images[row, ..., 0], cmap="gray_r")
        for axis, panel in zip(axes[row, 1:], panels, strict=True):
            axis.imshow(panel, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
        for axis, title in zip(axes[row], columns, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(title, fontsize=9)
    figure.savefig(workdir / "segmentations.png", dpi=130)
    plt.close(figure)
