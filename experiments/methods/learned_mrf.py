r"""A small CNN with a TRWP layer on top, trained end to end to segment noisy digits, against the same CNN alone.

Paper: Xu, Ajanthan, Hartley, "Fast and Differentiable Message Passing on Pairwise Markov Random Fields", ACCV 2020

The paper's experiment refines a DeepLab on VOC; what is compared here is the same (no layer, mean field, TRWP), at the
size that two cores can train.

    python -m experiments run learned_mrf    # 2 x 2 digits of scikit-learn, 16 x 16 pixels
    python -m experiments run learned_mrf --data-dir DIR --dataset mnist --tiles 1    # one digit, 28 x 28 pixels
    python -m experiments run learned_mrf --dataset mine.npz                          # your own labelled images

Task: a scene is a square of handwritten digits under Gaussian noise, and every pixel is to be labelled: background, or
the class of the digit whose stroke it is on. What a pixel's neighbourhood shows is ambiguous: the CNN sees 7 x 7
pixels, less than a digit. The layer has to carry what is certain along the strokes. All methods share the CNN, its
initialisation, the data, the noise and the number of steps; the layers learn one cost per pair of labels and, from the
CNN's features, one edge weight per pixel.

Test scenes are made of test digits only, with noise drawn once. Figures: pixel error over the steps and example
segmentations.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import nnx

from experiments._machinery import plots
from experiments._machinery.options import Count, Positive
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import segmentation
from jaxlib_methods import message_passing as mp, models

Method = Literal["none", "mean_field", "isgmr", "trwp"]
NAMES = {"none": "CNN alone", "mean_field": "CNN + mean field", "isgmr": "CNN + ISGMR", "trwp": "CNN + TRWP"}
SHOWN = ("test_pixel_error", "test_stroke_error", "test_loss")
EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Config(segmentation.Options):
    """Every combination of method and seed is one case; each is resumable."""

    methods: tuple[Method, ...] = ("none", "mean_field", "trwp")
    width: Count = 24  # channels of the CNN
    depth: Count = 3  # 3 x 3 convolutions of the CNN, which thus sees 2 depth + 1 pixels across
    iterations: Count = 5  # of the layer
    directions: Literal[4, 8, 16] = 4
    learning_rate: Positive = 3e-3  # Adam, decayed by a cosine


SMOKE: dict[str, Any] = {"seeds": 1, "steps": 20, "scenes": 200, "evaluations": 1, "iterations": 2, "width": 8}


def targets(config: Config) -> Targets:
    """None: the paper's VOC numbers are neither confirmed nor comparable."""
    return {}


def variants(config: Config) -> dict[str, Method]:
    return {method: method for method in config.methods}


class Segmenter(nnx.Module):
    """A few 3 x 3 convolutions, then per pixel: logits, and for a layer also how much of a boundary it is."""

    def __init__(self, config: Config, method: Method, channels: int, num_labels: int, rngs: nnx.Rngs):
        conv = functools.partial(models.convolution.Conv, rngs=rngs)
        widths = (channels, *(config.width,) * config.depth)
        self.convs = nnx.List([conv(a, b, kernel_size=(3, 3)) for a, b in itertools.pairwise(widths)])
        self.logits = conv(config.width, num_labels, kernel_size=(1, 1))
        self.directions = config.directions
        self.has_layer = method != "none"
        if self.has_layer:
            self.boundary = conv(config.width, 1, kernel_size=(1, 1))
            self.layer = mp.MessagePassing(
                num_labels,
                method=method,
                num_iterations=config.iterations,
                num_directions=config.directions,
                init_weight=0.5,
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for convolution in self.convs:
            h = nnx.relu(convolution(h))
        logits = self.logits(h)
        if not self.has_layer:
            return logits
        boundaries = jax.nn.sigmoid(self.boundary(h)[..., 0])
        return self.layer(logits, mp.boundary_weights(boundaries, num_directions=self.directions))


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """What all cases share: the task, one optimizer, and each method's network."""

    task: segmentation.Task
    optimizer: optax.GradientTransformation
    networks: dict[Method, segmentation.Network]


def load(config: Config) -> Shared:
    task = segmentation.load(config)
    channels, num_labels = task.dataset.train.images.shape[-1], task.dataset.num_labels
    build = lambda method: lambda key: Segmenter(config, method, channels, num_labels, nnx.Rngs(params=key))
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))
    return Shared(task, optimizer, {method: task.network(build(method)) for method in config.methods})


def run(shared: Shared, method: Method, seed: int, workdir: pathlib.Path) -> Outcome:
    """The last errors of one network, its curve, and what it makes of a few scenes."""
    network, label = shared.networks[method], f"{shared.task.options.dataset} {method} seed {seed}"
    state, history = shared.task.fit(network, shared.optimizer, seed, workdir, label=label)
    curve = [record for record in history if "test_loss" in record]
    segmented = shared.task.segment(network, state, EXAMPLES).tolist()
    return Outcome({name: curve[-1][name] for name in SHOWN}, curve, {"segmented": segmented})


def figures(shared: Shared, cases: list[Case]) -> dict[str, Any]:
    """Errors over the steps, and scenes with what the networks of the first seed make of them."""
    label = lambda case: NAMES[case.variant]
    errors = {"test_pixel_error": "wrong pixels of test scenes (%)", "test_stroke_error": "wrong pixels of strokes (%)"}
    first = [case for case in cases if case.seed == cases[0].seed]
    test = shared.task.dataset.test
    count = len(first[0].details["segmented"])
    figure, rows = plots.axes(count, 2 + len(first), size=(2, 2), subplot_kw={"xticks": [], "yticks": []})
    for number, row in enumerate(rows):
        row[0].imshow(test.images[number, ..., 0], cmap="gray_r")
        panels = [test.labels[number], *(np.array(case.details["segmented"][number]) for case in first)]
        for place, panel in zip(row[1:], panels, strict=True):
            place.imshow(panel, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
    for place, title in zip(rows[0], ["noisy scene", "truth", *map(label, first)], strict=True):
        place.set_title(title, fontsize=9)
    curves = plots.curves(cases, "step", errors, label=label, xlabel="step")
    return {"learned_mrf": curves, "segmentations": figure}
