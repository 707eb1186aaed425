"""Prune once, before training, by connection sensitivity (SNIP); against magnitude, random, GraSP and SynFlow.

Paper: Lee, Ajanthan, Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019

    python -m experiments run snip                      # LeNet-300-100 on the embedded digits: seconds on 2 cores
    python -m experiments run snip --data-dir DIR --dataset mnist --model lenet5 --sparsity 0.98          # minutes
    python -m experiments run snip --data-dir DIR --dataset cifar10 --model vgg_like --sparsity 0.97 \
        --batch-size 128 --recipe paper                 # for a GPU

One mini-batch scores every connection of a fresh network, the best are kept, and the sparse network is trained from a
new draw of its weights, as in the authors' code. `--recipe paper` is the authors' number of steps; the default,
`short`, keeps everything but runs a fraction of them: its numbers stand beside the paper's, not in for them.
Figures: error against sparsity, error against the size of the scoring batch, training curves, and the connections that
are kept in the first layer of a dense network when one class alone is used for scoring.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases, device_data, log, loop as training
from experiments.data import images as data
from jaxlib_methods import models, pruning, trees

PyTree = Any
Score = Literal["snip", "magnitude", "random", "grasp", "synflow"]


class Recipe(NamedTuple):
    steps: int
    decay_every: int  # steps between divisions of the learning rate
    decay: float


# The paper's: learning rate times 0.1 every 25k (MNIST) or 30k (CIFAR) steps. The README of the authors' code trains
# VGG-D for 150k steps and multiplies by 0.2 (spec, "Uncertain"); the number of MNIST steps is not given.
PAPER_RECIPE = {"mnist": Recipe(100_000, 25_000, 0.1), "cifar10": Recipe(150_000, 30_000, 0.2)}
SHORT_RECIPE = {"mnist": Recipe(2_000, 800, 0.1), "cifar10": Recipe(2_000, 800, 0.2)}
SHORT_RECIPE_LENET300 = Recipe(8_000, 3_000, 0.1)  # a step costs a millisecond, a convolution's tens of them

# Test error in percent. Published tables as remembered in the specification, not checked against the paper's text.
PUBLISHED = {
    "mnist/lenet300": {0.0: 1.7, 0.95: 1.6, 0.98: 2.4},
    "mnist/lenet5": {0.0: 0.9, 0.98: 0.8, 0.99: 1.1},
    "mnist/lstm_s": {0.0: 1.88, 0.95: 1.57},
    "mnist/lstm_b": {0.0: 1.15, 0.95: 1.35},
    "mnist/gru_s": {0.0: 1.87, 0.95: 2.41},
    "mnist/gru_b": {0.0: 1.71, 0.95: 1.52},
    "cifar10/alexnet_s": {0.0: 14.12, 0.9: 14.99},
    "cifar10/alexnet_b": {0.0: 13.92, 0.9: 14.50},
    "cifar10/vgg_c": {0.0: 6.82, 0.95: 7.27},
    "cifar10/vgg_d": {0.0: 6.76, 0.95: 7.09},
    "cifar10/vgg_like": {0.0: 8.26, 0.97: 8.00},
    "cifar10/wrn_16_8": {0.0: 6.21, 0.95: 6.63},
    "cifar10/wrn_16_10": {0.0: 5.91, 0.95: 6.43},
    "cifar10/wrn_22_8": {0.0: 6.14, 0.95: 5.85},
}
# Independent reproduction on the authors' code (aygong/snip-tensorflow): LeNet-300-100, sparsity 0.9, by size of the
# scoring batch.
REPRODUCED_BATCH_SIZES = {1: 2.73, 10: 2.39, 100: 2.23, 1000: 2.30, 10000: 2.24}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of score, sparsity, scoring batch size and seed is one case; each is resumable."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, or a path to an .npz
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    model: str = "lenet300"  # a name of jaxlib_methods.models
    sparsity: tuple[float, ...] = (0.9, 0.95, 0.98)  # shares of connections removed, each in [0, 1)
    scores: tuple[Score, ...] = ("snip", "magnitude", "random")
    scoring_batch_sizes: tuple[int, ...] = (100,)  # examples that score the connections
    gated: Literal["snip", "weights"] = "snip"  # "snip": weights and biases, as the authors; "weights": rank >= 2 only
    redraw: bool = True  # train from a new draw of the weights, as the authors' code, not from the scored ones
    dense: bool = True  # also train the network unpruned
    seeds: int = 1
    recipe: Literal["short", "paper"] = "short"
    steps: int | None = None  # None: the recipe's; the learning-rate steps move in proportion
    batch_size: int = 100
    learning_rate: float | None = None  # None: 0.1 as in the paper; 0.02 for LeNet-5, which diverges at 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    validation_fraction: float = 0.1
    evaluate_every: int = 1000
    tensorboard: bool = False

    def __post_init__(self):
        for value in self.sparsity:
            if not 0 <= value < 1:
                raise ValueError(f"sparsity must lie in [0, 1), got {value}; 0.98 removes 98 of 100 connections")
        for name in ("sparsity", "scores", "scoring_batch_sizes"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        if self.model not in models.NAMES:
            raise ValueError(f"unknown model {self.model!r}; known are {', '.join(models.NAMES)}")
        for name in ("batch_size", "seeds", "learning_rate", "steps"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.scoring_batch_sizes) < 1:
            raise ValueError(f"scoring_batch_sizes must be positive, got {self.scoring_batch_sizes}")


SMOKE = {"steps": 60, "sparsity": (0.9,), "scores": ("snip", "random"), "evaluate_every": 60}


def PAPER(config: Config) -> dict[str, float]:
    """The published numbers that this configuration can be compared with."""
    published = PUBLISHED.get(f"{config.dataset}/{config.model}", {})
    return {_metric("snip" if s else "dense", s, 100): error for s, error in published.items()} | (
        {_metric("snip", 0.9, size): error for size, error in REPRODUCED_BATCH_SIZES.items()}
        if (config.dataset, config.model) == ("mnist", "lenet300")
        else {}
    )


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figures and returns the test errors, one per seed."""
    task = _Task.of(config)
    errors: dict[str, list[float]] = {}
    histories: dict[str, list[dict[str, float]]] = {}
    for score, sparsity, size in _grid(config):
        for seed in range(config.seeds):
            name = f"{score}-{sparsity:g}-{size}-seed{seed}" if score != "dense" else f"dense-seed{seed}"
            run_case = functools.partial(_run_case, task, score, sparsity, size, seed)
            result = cases.run_or_load(workdir / "cases" / name, run_case, keep_checkpoints=True)
            metric = _metric(score, sparsity, size)
            errors.setdefault(metric, []).append(result["test_error"])
            errors.setdefault(metric.replace("test_error", "best_test_error"), []).append(result["best_test_error"])
            histories.setdefault(metric, result["history"])
    if jax.process_index() == 0:
        _figures(task, errors, histories, workdir)
    return errors


def _grid(config: Config) -> list[tuple[str, float, int]]:
    """(score, sparsity, scoring batch size) of every case; scores that see no data have one batch size."""
    grid = [("dense", 0.0, 0)] if config.dense else []
    for score in config.scores:
        sizes = config.scoring_batch_sizes if score in ("snip", "grasp") else config.scoring_batch_sizes[:1]
        grid += [(score, sparsity, size) for sparsity in config.sparsity if sparsity for size in sizes]
    return grid


def _metric(score: str, sparsity: float, size: int) -> str:
    if score == "dense":
        return "test_error dense"
    batch = f" scored on {size}" if score in ("snip", "grasp") and size != 100 else ""
    return f"test_error {score} {100 * sparsity:g}%{batch}"


class _Task(NamedTuple):
    """What all cases of a run share; compiled functions are kept because these objects stay the same."""

    config: Config
    recipe: Recipe
    dataset: data.Dataset
    train_split: device_data.OnDevice
    standardise: Callable[[jax.Array], jax.Array]
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]  # key -> (params, model_state)
    apply: Callable[..., tuple[jax.Array, PyTree]]  # (params, model_state, inputs, train) -> (logits, model_state)
    loss_fn: training.LossFn
    optimizer: optax.GradientTransformation
    evaluate: Callable[[training.TrainState], dict[str, float]]

    @classmethod
    def of(cls, config: Config) -> "_Task":
        dataset = data.load(config.dataset, config.data_dir, config.validation_fraction)
        dataset = _for_model(dataset, config.model)
        grey = dataset.train.images.shape[-1] == 1
        mean, std = (data.global_statistics if grey else data.channel_statistics)(dataset.train.images)
        standardise = lambda images: data.standardise(images, mean, std)

        def build(key: jax.Array) -> nnx.Module:
            shape = dataset.train.images.shape[1:]
            return models.create(
                config.model, num_classes=dataset.num_classes, input_shape=shape, rngs=nnx.Rngs(params=key)
            )

        graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, ...)[0]

        @jax.jit
        def init(key: jax.Array) -> tuple[PyTree, PyTree]:
            return nnx.split(build(key), nnx.Param, ...)[1:]

        def apply(params: PyTree, model_state: PyTree, inputs: jax.Array, train: bool) -> tuple[jax.Array, PyTree]:
            model = nnx.merge(graph, params, model_state)
            model.train() if train else model.eval()
            out = model(inputs)
            return out, nnx.split(model, nnx.Param, ...)[2]

        def loss_fn(params: PyTree, model_state: PyTree, batch: data.Split, key: jax.Array):
            del key
            out, model_state = apply(params, model_state, standardise(batch.images), True)
            loss = optax.softmax_cross_entropy_with_integer_labels(out, batch.labels).mean()
            return loss, (model_state, {})

        recipe = _recipe(config)
        learning_rate = config.learning_rate or (0.02 if config.model == "lenet5" else 0.1)
        schedule = optax.exponential_decay(learning_rate, recipe.decay_every, recipe.decay, staircase=True)
        dense = jax.tree.map(lambda p: jnp.ones(p.shape, bool), jax.eval_shape(init, jax.random.key(0))[0])
        optimizer = pruning.pruned(
            optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=lambda p: pruning.mark_prunable(p, "snip")),
                optax.sgd(schedule, config.momentum),
            ),
            dense,  # replaced by each case's masks, so that all cases share one compiled program
        )
        mesh = device_data.data_mesh(config.batch_size)
        eval_logits = lambda params, model_state, images: apply(params, model_state, standardise(images), False)[0]
        return cls(
            config,
            recipe,
            dataset,
            device_data.put(dataset.train, mesh),
            standardise,
            init,
            apply,
            loss_fn,
            optimizer,
            training.evaluator(training.classification(eval_logits), dataset.test),
        )


def _recipe(config: Config) -> Recipe:
    kind = "cifar10" if config.dataset == "cifar10" else "mnist"
    fast = config.model == "lenet300" and config.dataset != "digits"
    short = SHORT_RECIPE_LENET300 if fast else SHORT_RECIPE[kind]
    recipe = PAPER_RECIPE[kind] if config.recipe == "paper" else short
    if config.steps is None:
        return recipe
    return recipe._replace(steps=config.steps, decay_every=max(1, recipe.decay_every * config.steps // recipe.steps))


def _for_model(dataset: data.Dataset, model: str) -> data.Dataset:
    """LeNet-5 needs 28 x 28 pixels: the 8 x 8 digits are enlarged three times and framed."""
    if model != "lenet5" or dataset.train.images.shape[1] >= 16:
        return dataset

    def enlarge(split: data.Split | None) -> data.Split | None:
        if split is None:
            return None
        images = split.images.repeat(3, axis=1).repeat(3, axis=2)
        return split._replace(images=np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))))

    return dataset._replace(
        train=enlarge(dataset.train), validation=enlarge(dataset.validation), test=enlarge(dataset.test)
    )


def _run_case(task: _Task, score: str, sparsity: float, size: int, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
    """Prunes and trains one network; returns its test errors in percent and its learning curve."""
    config = task.config
    scored_key, drawn_key, score_key, train_key = jax.random.split(jax.random.key(seed), 4)
    params, model_state = task.init(scored_key)
    masks = _masks(task, score, sparsity, size, params, model_state, score_key)
    if config.redraw:
        params, model_state = task.init(drawn_key)
    params = pruning.apply_masks(params, masks)
    state = training.init_state(params, task.optimizer, key=train_key, model_state=model_state)
    state = state._replace(opt_state=state.opt_state._replace(masks=masks))
    label = f"{config.model} {score}" + (f" {100 * sparsity:g}%" if sparsity else "") + f" seed {seed}"
    tensorboard = [log.TensorBoard(case_dir)] if config.tensorboard else []
    state, history = training.fit(
        task.loss_fn,
        task.optimizer,
        state,
        task.train_split,
        batch_size=config.batch_size,
        steps=task.recipe.steps,
        augment=_augment if config.dataset == "cifar10" else None,
        evaluate=task.evaluate,
        evaluate_every=config.evaluate_every,
        workdir=case_dir,
        mesh=task.train_split.mesh,
        label=label,
        log=tensorboard,
    )
    evaluated = [
        {name: record[name] for name in ("step", "loss", "test_error")} for record in history if "test_error" in record
    ]
    kept = {row.path: row.kept for row in pruning.sparsity.summarize_sparsity(masks)}
    return {
        "test_error": evaluated[-1]["test_error"],
        "best_test_error": min(record["test_error"] for record in evaluated),  # what the authors' test.py reports
        "history": evaluated,
        "kept": kept,
    }


def _masks(task: _Task, score: str, sparsity: float, size: int, params: PyTree, model_state: PyTree, key: jax.Array):
    """The masks of one case; the batch norm is in evaluation mode while scoring, as in the authors' code."""
    gated = pruning.mark_prunable(params, task.config.gated)
    candidates, others = trees.partition(params, gated)
    if score == "dense":
        scores, sparsity = pruning.scores.magnitude(candidates), 0.0
    elif score == "magnitude":
        scores = pruning.scores.magnitude(candidates)
    elif score == "random":
        scores = pruning.scores.random(candidates, key=key)
    elif score == "synflow":  # 100 cuts without data, as its authors
        forward = lambda c, x: task.apply(trees.combine(c, others), model_state, x, False)[0]
        example = jnp.zeros((1, *task.dataset.train.images.shape[1:]))
        return pruning.iterative_prune(lambda c: pruning.synflow(forward, c, example), candidates, sparsity)
    else:
        images, labels = task.dataset.train
        rows = np.asarray(jax.random.choice(key, len(labels), (min(size, len(labels)),), replace=False))
        batch = data.Split(jnp.asarray(images[rows]), jnp.asarray(labels[rows]))
        scores = _score(task, score, params, model_state, gated, batch)
    return pruning.prune_masks(scores, sparsity)


def _score(task: _Task, score: str, params: PyTree, model_state: PyTree, gated: PyTree, batch: data.Split) -> PyTree:
    """Scores of the gated parameters from one batch, without weight decay and augmentation."""
    candidates, others = trees.partition(params, gated)

    def loss(temperature: float, candidates: PyTree, batch: data.Split) -> jax.Array:
        inputs = task.standardise(batch.images)
        out = task.apply(trees.combine(candidates, others), model_state, inputs, False)[0] / temperature
        return optax.softmax_cross_entropy_with_integer_labels(out, batch.labels).mean()

    if score == "snip":
        return pruning.connection_sensitivity(functools.partial(loss, 1.0), candidates, batch)
    return pruning.grasp(functools.partial(loss, 200.0), candidates, batch)  # 200 as the authors of GraSP


def _augment(batch: data.Split, key: jax.Array) -> data.Split:
    crop_key, flip_key = jax.random.split(key)
    return batch._replace(images=device_data.random_flip(device_data.random_crop(batch.images, crop_key), flip_key))


def _figures(
    task: _Task, errors: dict[str, list[float]], histories: dict[str, list[dict]], workdir: pathlib.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    config = task.config
    name = f"{config.model} on {pathlib.Path(config.dataset).stem}, {task.recipe.steps:,} steps"
    published = PAPER(config)
    figure, axis = plt.subplots(figsize=(6, 4))
    for score in config.scores:
        kept, values = [], []
        for sparsity in sorted(s for s in config.sparsity if s):
            kept.append(100 * (1 - sparsity))
            values.append(errors[_metric(score, sparsity, config.scoring_batch_sizes[0])])
        means, spread = np.mean(values, axis=1), np.std(values, axis=1)
        axis.errorbar(kept, means, spread, marker="o", capsize=3, label=score)
    if config.dense:
        axis.axhline(np.mean(errors["test_error dense"]), color="black", linewidth=1, label="dense")
    paper = [(s, published[_metric("snip", s, 100)]) for s in config.sparsity if _metric("snip", s, 100) in published]
    if paper:
        axis.plot(
            [100 * (1 - s) for s, _ in paper], [e for _, e in paper], "k*", markersize=10, label="published (snip)"
        )
    axis.set(xscale="log", yscale="log", xlabel="connections kept (%)", ylabel="test error (%)", title=name)
    axis.set_xticks(kept, [f"{share:g}" for share in kept])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.invert_xaxis()
    axis.legend()
    figure.savefig(workdir / "error_vs_sparsity.png", dpi=150, bbox_inches="tight")
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(6, 4))
    for metric, history in histories.items():
        label = metric.removeprefix("test_error ")
        axis.plot([r["step"] for r in history], [r["test_error"] for r in history], marker=".", label=label)
    axis.set(yscale="log", xlabel="step", ylabel="test error (%)", title=name)
    axis.legend(fontsize="small")
    figure.savefig(workdir / "training.png", dpi=150, bbox_inches="tight")
    plt.close(figure)

    if len(config.scoring_batch_sizes) > 1 and "snip" in config.scores:
        figure, axis = plt.subplots(figsize=(6, 4))
        for sparsity in (s for s in config.sparsity if s):
            values = [errors[_metric("snip", sparsity, size)] for size in config.scoring_batch_sizes]
            label = f"{100 * sparsity:g}% removed"
            axis.errorbar(
                config.scoring_batch_sizes, np.mean(values, 1), np.std(values, 1), marker="o", capsize=3, label=label
            )
        axis.set(xscale="log", xlabel="examples that score the connections", ylabel="test error (%)", title=name)
        axis.legend()
        figure.savefig(workdir / "scoring_batch_size.png", dpi=150, bbox_inches="tight")
        plt.close(figure)

    if config.model == "lenet300":
        _connections(task, workdir)


def _connections(task: _Task, workdir: pathlib.Path) -> None:
    """Share of the first layer's connections kept at each pixel when the examples of one class alone are scored."""
    import matplotlib.pyplot as plt

    config, split = task.config, task.dataset.train
    sparsities = sorted(s for s in config.sparsity if s)[-3:]
    params, model_state = task.init(jax.random.key(0))
    gated = pruning.mark_prunable(params, config.gated)
    height, width, channels = split.images.shape[1:]
    shape = (len(sparsities), task.dataset.num_classes)
    figure, axes = plt.subplots(*shape, figsize=(shape[1], shape[0] + 0.3), squeeze=False)
    for c in range(shape[1]):
        rows = np.flatnonzero(split.labels == c)[:100]
        batch = data.Split(jnp.asarray(split.images[rows]), jnp.asarray(split.labels[rows]))
        scores = _score(task, "snip", params, model_state, gated, batch)
        for r, sparsity in enumerate(sparsities):
            kernel = pruning.prune_masks(scores, sparsity)["dense1"]["kernel"][...]
            axes[r, c].imshow(kernel.mean(axis=1).reshape(height, width, channels).mean(axis=-1), cmap="gray")
            axes[r, c].set(xticks=[], yticks=[])
            if c == 0:
                axes[r, c].set_ylabel(f"{100 * sparsity:g}%")
    figure.suptitle("First-layer connections kept, by the class that scored them")
    figure.savefig(workdir / "connections.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
