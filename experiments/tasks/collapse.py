"""Neural collapse under four classifier heads: what the heads share on networks and on free features.

    head = collapse.make_head(config, "implicit", num_features, num_classes, rngs=nnx.Rngs(params=key))

Heads: standard (learned, unit rows, no bias), fixed (canonical ETF), implicit (nearest ETF of the running class means)
and implicit_no_gradient (the same with the gradient stopped at the frame). Features get the norm `temperature`.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx

from experiments._machinery import options, plots
from experiments._machinery.options import Positive
from experiments._machinery.records import Case
from jaxlib_methods import classifiers, models

Method = Literal["standard", "fixed", "implicit", "implicit_no_gradient"]

QUANTITIES = {  # name in a point of the curve -> (what to write at the axis, scale)
    "train_error": ("training error (%)", "linear"),
    "test_error": ("test error (%)", "linear"),
    "nc1": ("NC1: within / between scatter", "log"),
    "nc2": ("NC2: classifier to ETF", "log"),
    "nc3": ("NC3: classifier and means to ETF", "log"),
    "etf_distance_means": ("class means to nearest ETF", "log"),
    "cosine_margin": ("cosine margin", "linear"),
}


@dataclasses.dataclass(frozen=True)
class HeadOptions(options.Options):
    """Options of every experiment with these heads."""

    methods: tuple[Method, ...] = ("standard", "fixed", "implicit", "implicit_no_gradient")
    temperature: Positive = 5.0  # tau, the norm of the features
    delta: Positive = 1e-3  # proximal weight of the inner problem


def make_head(
    options: HeadOptions, method: Method, num_features: int, num_classes: int, *, rngs: nnx.Rngs
) -> nnx.Module:
    """One of the heads; only the standard one draws."""
    if method == "standard":
        return classifiers.NormalizedHead(num_features, num_classes, temperature=options.temperature, rngs=rngs)
    if method == "fixed":
        return classifiers.FixedETFHead(num_features, num_classes, temperature=options.temperature)
    return classifiers.NearestETFHead(
        num_features,
        num_classes,
        temperature=options.temperature,
        proximal_weight=options.delta,
        implicit_gradient=method == "implicit",
    )


def figure(cases: Sequence[Case], x: str, names: Sequence[str], *, title: str) -> plots.Figure:
    """Some of `QUANTITIES` over `x`, side by side."""
    drawn = plots.curves(cases, x, {name: QUANTITIES[name][0] for name in names}, title=title)
    for panel, name in zip(drawn.axes, names, strict=False):
        panel.set_yscale(QUANTITIES[name][1])
        if name in ("nc2", "etf_distance_means"):
            panel.set_ylim(bottom=1e-8)  # an ETF by construction is off the paper
    return drawn


class SmallNetwork(nnx.Module):
    """Three 3 x 3 convolutions with stride 2, batch norm without scale and shift, mean over the image; no biases."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        sizes = (channels, width, 2 * width, 4 * width)
        conv = functools.partial(models.convolution.Conv, kernel_size=(3, 3), strides=(2, 2), use_bias=False, rngs=rngs)
        self.conv = nnx.List([conv(a, b) for a, b in itertools.pairwise(sizes)])
        self.bn = nnx.List([_batch_norm(b, rngs) for b in sizes[1:]])
        self.num_features = sizes[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, bn in zip(self.conv, self.bn, strict=True):
            x = nnx.relu(bn(conv(x)))
        return x.mean((1, 2))


class MLP(nnx.Module):
    """Two layers of 16 and 8 times `width` units, batch norm without scale and shift after each; no biases."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        sizes = (inputs, 16 * width, 8 * width)
        self.dense = nnx.List([nnx.Linear(a, b, use_bias=False, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.bn = nnx.List([_batch_norm(b, rngs) for b in sizes[1:]])
        self.num_features = sizes[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for dense, bn in zip(self.dense, self.bn, strict=True):
            x = nnx.relu(bn(dense(x)))
        return x


class Classifier(nnx.Module):
    """A backbone (small, mlp, or a resnet of `jaxlib_methods.models` without its last layer) and a head."""

    def __init__(
        self, options: HeadOptions, method: Method, model: str, width: int, shape: Sequence[int], num_classes: int,
        *, rngs: nnx.Rngs,
    ):  # fmt: skip
        if model == "small":
            self.backbone = SmallNetwork(shape[-1], width, rngs=rngs)
            num_features = self.backbone.num_features
        elif model == "mlp":
            self.backbone = MLP(math.prod(shape), width, rngs=rngs)
            num_features = self.backbone.num_features
        else:
            self.backbone = models.create(model, num_classes=num_classes, input_shape=shape, rngs=rngs)
            num_features = self.backbone.dense.in_features
            self.backbone.dense = _Identity()
        self.head = make_head(options, method, num_features, num_classes, rngs=rngs)


class _Identity(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def _batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, use_bias=False, use_scale=False, momentum=0.9, rngs=rngs)
