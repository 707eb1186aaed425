r"""Train towards the nearest simplex ETF, against a fixed ETF and a learned classifier: accuracy and neural collapse.

Paper: Markou, Ajanthan, Gould, "Guiding Neural Collapse: Optimising Towards the Nearest Simplex ETF", NeurIPS 2024

    python -m experiments run nearest_etf                              # small network on digits: minutes, 2 cores
    python -m experiments run nearest_etf --data-dir DIR --dataset mnist --model mlp --epochs 12 --batch-size 256 \
        --evaluations 12                                               # minutes on one core
    python -m experiments run nearest_etf --data-dir DIR --dataset cifar10 --model resnet18 --batch-size 256 \
        --epochs 200                                                   # the paper's size: for a GPU

Cases: standard (learned, unit rows, no bias), fixed (canonical ETF), implicit (nearest ETF of the running class
means) and implicit_no_gradient (the same with the gradient stopped at the frame). The recipe is the release's: AGD
with gain 10, tau = 5, cross-entropy, no biases, batch norm without scale and shift. The default network, three
strided convolutions, is small because two cores are what it has to train on; the MLP needs a fraction of its time a
step on MNIST and gets further. Batches are shuffled for all methods; the release stratifies them for the implicit one,
which only matters where a batch lacks a class.
Figures: accuracy, NC1, NC2, NC3 and cosine margin on the training set per epoch, side by side, with the range over
seeds.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases, device_data, loop as training
from experiments.data import images as data
from jaxlib_methods import models
from jaxlib_methods.classifiers import (
    FixedETFHead,
    NearestETFHead,
    NormalizedHead,
    dot_regression_loss,
    neural_collapse,
)
from jaxlib_methods.classifiers.class_means import validate_batch
from jaxlib_methods.optimizers import agd, agd_initializer

PyTree = Any
Method = Literal["standard", "fixed", "implicit", "implicit_no_gradient"]
SHOWN = ("train_error", "test_error", "nc1", "nc2", "nc3", "nc4_mismatch", "cosine_margin", "etf_distance_means")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of method and seed is one case; each is resumable."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, or a path to an .npz
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    model: str = "small"  # small, mlp, resnet18 (CIFAR stem) or resnet18_imagenet (the release's stem)
    width: int = 32  # channels of the small network's first layer, its features have four times as many; see also _MLP
    methods: tuple[Method, ...] = ("standard", "fixed", "implicit", "implicit_no_gradient")
    seeds: int = 3
    epochs: int = 20
    batch_size: int = 128
    optimizer: Literal["agd", "sgd"] = "agd"
    gain: float = 10.0  # of AGD; SGD's learning rate is gain / 100, with momentum 0.9
    loss: Literal["cross_entropy", "dot_regression"] = "cross_entropy"
    temperature: float = 5.0  # tau, the norm of the features
    delta: float = 1e-3  # proximal weight of the inner problem
    evaluations: int = 20  # measurements over the run, spread evenly
    measured: int = 20_000  # training examples, at most, that the collapse is measured on

    def __post_init__(self):
        positive = ("seeds", "epochs", "batch_size", "width", "evaluations", "measured", "gain", "temperature", "delta")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.methods:
            raise ValueError("methods is empty; name at least one")
        if self.model not in ("small", "mlp") and not self.model.startswith("resnet"):
            raise ValueError(f"model must be small, mlp or a resnet of jaxlib_methods.models, got {self.model!r}")


SMOKE = {"model": "mlp", "seeds": 1, "epochs": 3, "evaluations": 2, "width": 16, "methods": ("implicit",)}
PAPER: dict[str, float] = {}  # no table entry of the paper is confirmed; the curves are what can be compared


def _batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, use_bias=False, use_scale=False, momentum=0.9, rngs=rngs)


class _SmallNet(nnx.Module):
    """Three 3 x 3 convolutions with stride 2, batch norm without scale and shift, mean over the image; no biases."""

    def __init__(self, channels: int, width: int, rngs: nnx.Rngs):
        sizes = (channels, width, 2 * width, 4 * width)
        conv = functools.partial(models.convolution.Conv, kernel_size=(3, 3), strides=(2, 2), use_bias=False, rngs=rngs)
        self.conv = nnx.List([conv(a, b) for a, b in itertools.pairwise(sizes)])
        self.bn = nnx.List([_batch_norm(b, rngs) for b in sizes[1:]])
        self.num_features = sizes[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, bn in zip(self.conv, self.bn, strict=True):
            x = nnx.relu(bn(conv(x)))
        return x.mean((1, 2))


class _MLP(nnx.Module):
    """Two layers of 16 and 8 times `width` units, batch norm without scale and shift after each; no biases."""

    def __init__(self, inputs: int, width: int, rngs: nnx.Rngs):
        sizes = (inputs, 16 * width, 8 * width)
        self.dense = nnx.List([nnx.Linear(a, b, use_bias=False, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.bn = nnx.List([_batch_norm(b, rngs) for b in sizes[1:]])
        self.num_features = sizes[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for dense, bn in zip(self.dense, self.bn, strict=True):
            x = nnx.relu(bn(dense(x)))
        return x


class _Identity(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class _Classifier(nnx.Module):
    def __init__(self, config: Config, method: str, num_classes: int, shape: tuple[int, ...], rngs: nnx.Rngs):
        if config.model == "small":
            self.backbone = _SmallNet(shape[-1], config.width, rngs)
            d = self.backbone.num_features
        elif config.model == "mlp":
            self.backbone = _MLP(math.prod(shape), config.width, rngs)
            d = self.backbone.num_features
        else:
            self.backbone = models.create(config.model, num_classes=num_classes, input_shape=shape, rngs=rngs)
            d = self.backbone.dense.in_features
            self.backbone.dense = _Identity()
        tau = config.temperature
        if method == "standard":
            self.head = NormalizedHead(d, num_classes, temperature=tau, rngs=rngs)
        elif method == "fixed":
            self.head = FixedETFHead(d, num_classes, temperature=tau)
        else:
            self.head = NearestETFHead(
                d, num_classes, temperature=tau, proximal_weight=config.delta, implicit_gradient=method == "implicit"
            )


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figures and returns the last measurements, one per seed."""
    dataset = data.load(config.dataset, config.data_dir)
    validate_batch(
        dataset.train.images.reshape(len(dataset.train.labels), -1)[:, :1],
        dataset.train.labels,
        num_classes=dataset.num_classes,
    )
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for method in config.methods:
        task = _Task.of(config, method, dataset)
        for seed in range(config.seeds):
            run_case = functools.partial(_run_case, task, seed)
            result = cases.run_or_load(workdir / "cases" / f"{method}-seed{seed}", run_case)
            curves.setdefault(method, []).append(result["curve"])
    if jax.process_index() == 0:
        _figure(config, curves, workdir)
    final = {f"{name} {m}": [curve[-1][name] for curve in curves[m]] for m in config.methods for name in SHOWN}
    reached = {m: [_epochs_to(curve, 1.0) for curve in curves[m]] for m in config.methods}
    return final | {f"epochs to 1% train_error {m}": epochs for m, epochs in reached.items() if None not in epochs}


def _epochs_to(curve: list[dict[str, float]], error: float) -> float | None:
    """The first measured epoch with at most this training error; None if the run ends above it."""
    return next((point["epoch"] for point in curve if point["train_error"] <= error), None)


class _Task(NamedTuple):
    """What all seeds of a method share; compiled functions are kept because these objects stay the same."""

    config: Config
    label: str
    train_split: device_data.OnDevice
    steps_per_epoch: int
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]  # key -> (params, model_state)
    loss_fn: training.LossFn
    optimizer: optax.GradientTransformation
    measure: Callable[[training.TrainState], dict[str, float]]

    @classmethod
    def of(cls, config: Config, method: str, dataset: data.Dataset) -> "_Task":
        shape = dataset.train.images.shape[1:]
        mean, std = data.channel_statistics(dataset.train.images)
        build = lambda key: _Classifier(config, method, dataset.num_classes, shape, nnx.Rngs(params=key))
        graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, ...)[0]

        @jax.jit
        def init(key: jax.Array) -> tuple[PyTree, PyTree]:
            params, model_state = nnx.split(build(key), nnx.Param, ...)[1:]
            if config.optimizer == "agd":  # the initialisation that its analysis assumes, for every weight
                leaves, structure = jax.tree.flatten(params)
                keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
                draw = agd_initializer()
                redraw = lambda k, p: draw(k, p.shape, p.dtype) if p.ndim > 1 else p
                params = structure.unflatten([redraw(k, p) for k, p in zip(keys, leaves, strict=True)])
            return (_unit_columns(params), model_state)

        def loss_fn(params: PyTree, model_state: PyTree, batch: data.Split, key: jax.Array):
            del key
            model = nnx.merge(graph, params, model_state, copy=True)
            logits = model.head(model.backbone(data.standardise(batch.images, mean, std)), batch.labels)
            if config.loss == "dot_regression":
                loss = dot_regression_loss(logits, batch.labels)
            else:
                loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            return loss.mean(), (nnx.split(model, nnx.Param, ...)[2], {})

        @jax.jit
        def outputs(params: PyTree, model_state: PyTree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graph, params, model_state, copy=True)
            model.eval()
            h = model.backbone(data.standardise(images, mean, std))
            return model.head.normalized(h), model.head(h)

        def collect(state: training.TrainState, split: data.Split) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
            params, model_state = jax.device_get((state.params, state.model_state))
            for start in range(0, len(split.labels), 1000):
                labels = split.labels[start : start + 1000]
                f, logits = outputs(params, model_state, split.images[start : start + 1000])
                yield np.asarray(f), labels, np.sum(np.argmax(logits, axis=1) != labels)

        measured = jax.tree.map(lambda x: x[: config.measured], dataset.train)

        def measure(state: training.TrainState) -> dict[str, float]:
            on_train = list(collect(state, measured))
            head = nnx.merge(graph, *jax.device_get((state.params, state.model_state)), copy=True).head
            kernel = jnp.asarray(head.kernel[...])
            bias = jnp.asarray(head.bias[...]) if method.startswith("implicit") else None
            if method == "fixed":
                bias = -jnp.concatenate([f for f, _, _ in on_train]).mean(axis=0) @ kernel
            metrics = neural_collapse([(f, y) for f, y, _ in on_train], kernel, bias)
            wrong = sum(w for _, _, w in collect(state, dataset.test))
            return metrics | {
                "train_error": 100.0 * float(sum(w for _, _, w in on_train)) / len(measured.labels),
                "test_error": 100.0 * float(wrong) / len(dataset.test.labels),
            }

        mesh = device_data.data_mesh(config.batch_size)
        steps_per_epoch = max(1, len(dataset.train.labels) // config.batch_size)
        put = device_data.put(dataset.train, mesh)
        return cls(config, method, put, steps_per_epoch, init, loss_fn, _optimizer(config), measure)


def _optimizer(config: Config) -> optax.GradientTransformation:
    """AGD for weights, vectors frozen (batch norm without scale and shift); unit rows of a learned head kept."""
    rule = agd(config.gain) if config.optimizer == "agd" else optax.sgd(config.gain / 100, momentum=0.9)
    kind = lambda params: jax.tree.map(lambda p: "weights" if p.ndim > 1 else "frozen", params)
    inner = optax.partition({"weights": rule, "frozen": optax.set_to_zero()}, kind)

    def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = inner.update(updates, state, params)
        target = _unit_columns(optax.apply_updates(params, updates))
        return jax.tree.map(lambda t, p: t - p, target, params), state

    return optax.GradientTransformation(inner.init, update)


def _unit_columns(params: PyTree) -> PyTree:
    """What `NormalizedHead.renormalize` does, on the tree of parameters."""

    def one(path: tuple[Any, ...], p: jax.Array) -> jax.Array:
        if "head" not in jax.tree_util.keystr(path):
            return p
        return p / jnp.maximum(jnp.sqrt(jnp.sum(p * p, axis=0, keepdims=True)), 1e-12)

    return jax.tree_util.tree_map_with_path(one, params)


def _run_case(task: _Task, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
    """Trains one network and returns its measurements by epoch."""
    config = task.config
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params, model_state = task.init(init_key)
    steps = config.epochs * task.steps_per_epoch
    _, history = training.fit(
        task.loss_fn,
        task.optimizer,
        training.init_state(params, task.optimizer, key=train_key, model_state=model_state),
        task.train_split,
        batch_size=config.batch_size,
        steps=steps,
        steps_per_call=task.steps_per_epoch,
        evaluate=task.measure,
        evaluate_every=max(1, steps // config.evaluations),
        workdir=case_dir,
        checkpoint_every=0,
        mesh=task.train_split.mesh,
        label=f"{config.dataset} {task.label} seed {seed}",
    )
    points = [record for record in history if "test_error" in record]
    return {"curve": [record | {"epoch": record["step"] / task.steps_per_epoch} for record in points]}


def _figure(config: Config, curves: dict[str, list[list[dict[str, float]]]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "training accuracy (%)": ("train_error", lambda v: 100 - v, "linear"),
        "test accuracy (%)": ("test_error", lambda v: 100 - v, "linear"),
        "NC1: within / between scatter": ("nc1", lambda v: v, "log"),
        "NC2: classifier to ETF": ("nc2", lambda v: np.maximum(v, 1e-8), "log"),
        "NC3: classifier and means to ETF": ("nc3", lambda v: v, "log"),
        "cosine margin": ("cosine_margin", lambda v: v, "linear"),
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, (name, shown, scale)) in zip(axes.flat, panels.items(), strict=True):
        for method, of_seeds in curves.items():
            epochs = [point["epoch"] for point in of_seeds[0]]
            values = shown(np.array([[point[name] for point in curve] for curve in of_seeds]))
            median, label = np.median(values, axis=0), method.replace("_", " ")
            dashes = ":" if method == "implicit_no_gradient" else "-"
            (line,) = axis.plot(epochs, median, dashes, label=label, marker=".", markersize=4)
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="epoch", yscale=scale)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    seeds = f"median and range of {config.seeds} seeds" if config.seeds > 1 else "one seed"
    network = "small network" if config.model == "small" else config.model
    figure.suptitle(f"{network} on {pathlib.Path(config.dataset).stem}, {config.optimizer.upper()}, {seeds}")
    figure.savefig(workdir / "neural_collapse.png", dpi=130)
    plt.close(figure)
