"""Train towards the nearest simplex ETF, against a fixed ETF and a learned classifier: accuracy and neural collapse.

Paper: Markou, Ajanthan, Gould, "Guiding Neural Collapse: Optimising Towards the Nearest Simplex ETF", NeurIPS 2024

    python -m experiments run nearest_etf                              # small network on digits: minutes, 2 cores
    python -m experiments run nearest_etf --data-dir DIR --dataset mnist --model mlp --epochs 12 --batch-size 256 \
        --evaluations 12                                               # minutes on one core
    python -m experiments run nearest_etf --data-dir DIR --dataset cifar10 --model resnet18 --batch-size 256 \
        --epochs 200                                                   # the paper's size: for a GPU

Cases: the heads of `experiments.tasks.collapse`. The recipe is the release's: AGD with gain 10, tau = 5, cross-entropy,
no biases, batch norm without scale and shift. The default network, three strided convolutions, is small because two
cores are what it has to train on; the MLP needs a fraction of its time a step on MNIST and gets further. Batches are
shuffled for all methods; the release stratifies them for the implicit one, which only matters where a batch lacks a
class.
Figures: errors, NC1, NC2, NC3 and cosine margin on the training set per epoch, side by side, with the range over seeds.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import loop
from experiments._machinery.options import Count, Positive
from experiments._machinery.records import Case, Outcome, Targets
from experiments.data import images
from experiments.tasks import classification, collapse
from jaxlib_methods import classifiers
from jaxlib_methods.classifiers import class_means
from jaxlib_methods.optimizers import agd, agd_initializer

PyTree = Any
MEASURED = ("train_error", "test_error", "nc1", "nc2", "nc3", "nc4_mismatch", "cosine_margin", "etf_distance_means")


@dataclasses.dataclass(frozen=True)
class Config(collapse.HeadOptions, classification.Options):
    """Every combination of method and seed is one case; each is resumable."""

    seeds: Count = 3
    batch_size: Count = 128
    model: str = "small"  # small, mlp, resnet18 (CIFAR stem) or resnet18_imagenet (the release's stem)
    width: Count = (
        32  # channels of the small network's first layer, features are four times as many; see also collapse.MLP
    )
    epochs: Count = 20
    optimizer: Literal["agd", "sgd"] = "agd"
    gain: Positive = 10.0  # of AGD; SGD's learning rate is gain / 100, with momentum 0.9
    loss: Literal["cross_entropy", "dot_regression"] = "cross_entropy"
    evaluations: Count = 20  # measurements over the run, spread evenly
    measured: Count = 20_000  # training examples, at most, that the collapse is measured on

    def __post_init__(self):
        super().__post_init__()
        if self.model not in ("small", "mlp") and not self.model.startswith("resnet"):
            raise ValueError(f"model must be small, mlp or a resnet of jaxlib_methods.models, got {self.model!r}")


SMOKE: dict[str, Any] = {
    "model": "mlp", "seeds": 1, "epochs": 3, "evaluations": 2, "width": 16, "methods": ("implicit",),
}  # fmt: skip
SHOWN = ("train_error", "test_error", "nc1", "nc2", "nc3", "cosine_margin", "epochs to 1% train_error")


def targets(config: Config) -> Targets:
    """None: no table entry of the paper is confirmed; the curves are what can be compared."""
    del config
    return {}


def variants(config: Config) -> dict[str, collapse.Method]:
    return {method: method for method in config.methods}


def load(config: Config) -> classification.Data:
    data = classification.load_data(config, per_channel=True)
    train = data.dataset.train
    some_pixel = train.images.reshape(len(train.labels), -1)[:, :1]
    class_means.validate_batch(some_pixel, train.labels, num_classes=data.dataset.num_classes)
    return data


class Network(NamedTuple):
    """What all seeds of a method share."""

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]  # key -> (params, model_state)
    loss_fn: loop.LossFn
    optimizer: optax.GradientTransformation
    measure: Callable[[loop.TrainState], dict[str, float]]


@functools.lru_cache(maxsize=1)  # a method's cases follow one another
def make_network(data: classification.Data, method: collapse.Method) -> Network:
    """Compiles a network of the data's options."""
    config, dataset = data.options, data.dataset
    shape = dataset.train.images.shape[1:]

    def build(key: jax.Array) -> collapse.Classifier:
        rngs = nnx.Rngs(params=key)
        return collapse.Classifier(config, method, config.model, config.width, shape, dataset.num_classes, rngs=rngs)

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
        return _unit_columns(params), model_state

    def loss_fn(params: PyTree, model_state: PyTree, batch: images.Split, key: jax.Array):
        del key
        model = nnx.merge(graph, params, model_state, copy=True)
        logits = model.head(model.backbone(data.standardise(batch.images)), batch.labels)
        if config.loss == "dot_regression":
            loss = classifiers.dot_regression_loss(logits, batch.labels)
        else:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return loss.mean(), (nnx.split(model, nnx.Param, ...)[2], {})

    @jax.jit
    def outputs(params: PyTree, model_state: PyTree, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params, model_state, copy=True)
        model.eval()
        h = model.backbone(data.standardise(pixels))
        return model.head.normalized(h), model.head(h)

    def collect(state: loop.TrainState, split: images.Split) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
        params, model_state = jax.device_get((state.params, state.model_state))
        for start in range(0, len(split.labels), 1000):
            labels = split.labels[start : start + 1000]
            f, logits = outputs(params, model_state, split.images[start : start + 1000])
            yield np.asarray(f), labels, np.sum(np.argmax(logits, axis=1) != labels)

    measured = jax.tree.map(lambda x: x[: config.measured], dataset.train)

    def measure(state: loop.TrainState) -> dict[str, float]:
        on_train = list(collect(state, measured))
        head = nnx.merge(graph, *jax.device_get((state.params, state.model_state)), copy=True).head
        kernel = jnp.asarray(head.kernel[...])
        bias = jnp.asarray(head.bias[...]) if method.startswith("implicit") else None
        if method == "fixed":
            bias = -jnp.concatenate([f for f, _, _ in on_train]).mean(axis=0) @ kernel
        metrics = classifiers.neural_collapse([(f, y) for f, y, _ in on_train], kernel, bias)
        wrong = sum(w for _, _, w in collect(state, dataset.test))
        return metrics | {
            "train_error": 100.0 * float(sum(w for _, _, w in on_train)) / len(measured.labels),
            "test_error": 100.0 * float(wrong) / len(dataset.test.labels),
        }

    return Network(init, loss_fn, make_optimizer(config), measure)


def make_optimizer(config: Config) -> optax.GradientTransformation:
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


def run(data: classification.Data, method: collapse.Method, seed: int, workdir: pathlib.Path) -> Outcome:
    """Errors and collapse by epoch, and the first measured epoch with at most 1 % training error."""
    config, network = data.options, make_network(data, method)
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params, model_state = network.init(init_key)
    steps_per_epoch = max(1, data.split.size // config.batch_size)
    steps = config.epochs * steps_per_epoch
    _, history = data.fit(
        network.optimizer,
        loop.init_state(params, network.optimizer, key=train_key, model_state=model_state),
        workdir,
        steps=steps,
        label=f"{config.dataset} {method} seed {seed}",
        evaluate=network.measure,
        loss_fn=network.loss_fn,
        augment=None,
        steps_per_call=steps_per_epoch,
        evaluate_every=max(1, steps // config.evaluations),
        checkpoint_every=0,
    )
    curve = [record | {"epoch": record["step"] / steps_per_epoch} for record in history if "test_error" in record]
    metrics = {name: curve[-1][name] for name in MEASURED}
    reached = [point["epoch"] for point in curve if point["train_error"] <= 1.0]
    return Outcome(metrics | ({"epochs to 1% train_error": reached[0]} if reached else {}), curve)


def figures(data: classification.Data, cases: list[Case]) -> dict[str, Any]:
    """Errors and collapse by epoch."""
    config = data.options
    seeds = f"median and range of {config.seeds} seeds" if config.seeds > 1 else "one seed"
    network = "small network" if config.model == "small" else config.model
    title = f"{network} on {pathlib.Path(config.dataset).stem}, {config.optimizer.upper()}, {seeds}"
    names = ("train_error", "test_error", "nc1", "nc2", "nc3", "cosine_margin")
    return {"neural_collapse": collapse.figure(cases, "epoch", names, title=title)}
