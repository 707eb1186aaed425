"""Low-rank features: a hidden layer's activations in a few dimensions, against the same network without the penalty.

Paper: Sanyal, Kanade, Torr, Dokania, "Robustness via Deep Low-Rank Representations", arXiv 2018

    python -m experiments run low_rank_features                                # the embedded digits: a minute, 2 cores
    python -m experiments run low_rank_features --dataset path/to/folder --rank 20

An MLP with two hidden layers; the penalty is on the second one's features, rectified. Measured on the test set: the
error, the share of the features' variance in `rank` principal directions of the training features, the error when the
features are projected onto these, the mean norm of the features, and the error under Gaussian noise and under FGSM.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments._machinery import loop, plots
from experiments._machinery.options import Count, Positive
from experiments._machinery.records import Case, Outcome, Targets
from experiments.data import images
from experiments.tasks import classification
from jaxlib_methods import low_rank

PyTree = Any
Method = Literal["plain", "low_rank"]
NAMES = {
    "test_error": "test error (%)",
    "test_error_projected": "error from a few directions (%)",
    "variance_kept": "variance in them (%)",
}


@dataclasses.dataclass(frozen=True)
class Config(classification.Options):
    """Every method and seed is one case; each is resumable."""

    methods: tuple[Method, ...] = ("plain", "low_rank")
    width: Count = 128  # of both hidden layers
    rank: Count = 5
    every: Count = 10  # updates from one projection of the virtual layer to the next
    projection_weight: Positive = 1.0
    norm_weight: Positive = 1.0
    learning_rate: Positive = 1e-3  # Adam
    steps: Count = 3000
    seeds: Count = 3
    noise: Positive = 0.3  # standard deviation, where pixels are in [0, 1]
    epsilon: Positive = 0.1  # of FGSM


SMOKE: dict[str, Any] = {"steps": 30, "width": 16, "seeds": 1}


def targets(config: Config) -> Targets:
    """None: the paper's tables are of a ResNet-50 on CIFAR-10."""
    del config
    return {}


def variants(config: Config) -> dict[str, Method]:
    return {method: method for method in config.methods}


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """What all cases share, so that nothing is compiled twice."""

    data: classification.Data
    init: Callable[[jax.Array], PyTree]
    loss_fns: dict[Method, loop.LossFn]
    optimizer: optax.GradientTransformation
    evaluate: Callable[[loop.TrainState], dict[str, float]]


def features_of(params: PyTree, pixels: jax.Array) -> jax.Array:
    """The second hidden layer, [batch, width], of images uint8 or in [0, 1]."""
    x = pixels.reshape(len(pixels), -1)
    for layer in ("first", "second"):
        x = jax.nn.relu(x @ params[layer]["kernel"] + params[layer]["bias"][None])
    return x


def head(params: PyTree, features: jax.Array) -> jax.Array:
    return features @ params["head"]["kernel"] + params["head"]["bias"][None]


def load(config: Config) -> Shared:
    data = classification.load_data(config)
    train = data.dataset.train.images
    scaled = lambda pixels: pixels.astype(jnp.float32) / float(train.max())

    def init(key: jax.Array) -> PyTree:
        sizes = (train[0].size, config.width, config.width, data.dataset.num_classes)
        shapes = zip(("first", "second", "head"), jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
        he = jax.nn.initializers.he_normal()
        network = {name: {"kernel": he(k, (n, m)), "bias": jnp.zeros(m)} for name, k, n, m in shapes}
        W = low_rank.project_rank(jnp.eye(config.width), config.rank)
        return network | {"virtual": {"W": W, "b": jnp.zeros(config.width)}}

    def loss_fn_of(method: Method) -> loop.LossFn:
        def loss_fn(params: PyTree, model_state: PyTree, batch: images.Split, key: jax.Array):
            del key
            features = features_of(params, scaled(batch.images))
            losses = optax.softmax_cross_entropy_with_integer_labels(head(params, features), batch.labels)
            if method == "low_rank":
                penalty = low_rank.low_rank_penalty(features, **params["virtual"])
                losses += config.projection_weight * penalty.projection + config.norm_weight * penalty.norm
            return losses.mean(), (model_state, {})

        return loss_fn

    is_W = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "W", params)
    adam = optax.adam(config.learning_rate)
    optimizer = optax.chain(adam, optax.masked(low_rank.keep_rank(config.rank, every=config.every), is_W))
    logits = lambda params, model_state, pixels: head(params, features_of(params, scaled(pixels)))
    loss_fns = {method: loss_fn_of(method) for method in config.methods}
    return Shared(data, init, loss_fns, optimizer, data.evaluator(logits))


def run(shared: Shared, method: Method, seed: int, workdir: pathlib.Path) -> Outcome:
    """The errors of one network, and what its features are like."""
    config = shared.data.options
    init_key, train_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    initial = loop.init_state(shared.init(init_key), shared.optimizer, key=train_key)
    state, history = shared.data.fit(
        shared.optimizer,
        initial,
        workdir,
        steps=config.steps,
        label=f"{method} seed {seed}",
        evaluate=shared.evaluate,
        evaluate_every=max(1, config.steps // 10),
        loss_fn=shared.loss_fns[method],
    )
    curve = [point for point in history if "test_error" in point]
    dataset = shared.data.dataset
    scale = float(dataset.train.images.max())
    train, test = (jnp.asarray(part.images, jnp.float32) / scale for part in (dataset.train, dataset.test))
    measured = _measure(jax.device_get(state.params), train, test, jnp.asarray(dataset.test.labels), noise_key, config)
    return Outcome({"test_error": curve[-1]["test_error"], **measured}, curve)


def _measure(
    params: PyTree, train: jax.Array, test: jax.Array, labels: jax.Array, key: jax.Array, config: Config
) -> dict[str, float]:
    """What the test features keep in the principal directions of the training features, and errors under change."""
    error = lambda features: 100 * float((head(params, features).argmax(-1) != labels).mean())
    seen, features = features_of(params, train), features_of(params, test)
    mean = seen.mean(0)[None]
    directions = jnp.linalg.svd(seen - mean, full_matrices=False)[2][: config.rank]
    centred = features - mean
    kept = centred @ directions.T @ directions
    cross_entropy = lambda pixels: optax.softmax_cross_entropy_with_integer_labels(
        head(params, features_of(params, pixels)), labels
    ).sum()
    attacked = jnp.clip(test + config.epsilon * jnp.sign(jax.grad(cross_entropy)(test)), 0, 1)
    noisy = test + config.noise * jax.random.normal(key, test.shape)
    return {
        "test_error_projected": error(mean + kept),
        "variance_kept": 100 * float((kept**2).sum() / (centred**2).sum()),
        "feature_norm": float(jnp.linalg.norm(features, axis=-1).mean()),
        "test_error_noisy": error(features_of(params, noisy)),
        "test_error_fgsm": error(features_of(params, attacked)),
    }


def figures(shared: Shared, cases: list[Case]) -> dict[str, Any]:
    """Errors, and the variance in a few directions."""
    del shared
    return {"low_rank_features": plots.bars(cases, NAMES)}
