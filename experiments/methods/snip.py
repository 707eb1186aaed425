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
import pathlib
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._machinery import log, loop, plots
from experiments._machinery.options import Count, OneOf, Positive, Range
from experiments._machinery.records import Case, Outcome, Target, Targets
from experiments.data import images
from experiments.tasks import classification, pruned_networks
from experiments.tasks.pruned_networks import READS_DATA
from jaxlib_methods import models, pruning, trees
from jaxlib_methods.typing import PyTree

Score = Literal["snip", "magnitude", "random", "grasp", "synflow"]


class Recipe(NamedTuple):
    steps: int
    decay_every: int  # steps between divisions of the learning rate
    decay: float


# The paper's: learning rate times 0.1 every 25k (MNIST) or 30k (CIFAR) steps. The README of the authors' code trains
# VGG-D for 150k steps and multiplies by 0.2; the number of MNIST steps is not given.
PAPER_RECIPE = {"mnist": Recipe(100_000, 25_000, 0.1), "cifar10": Recipe(150_000, 30_000, 0.2)}
SHORT_RECIPE = {"mnist": Recipe(2_000, 800, 0.1), "cifar10": Recipe(2_000, 800, 0.2)}
SHORT_RECIPE_LENET300 = Recipe(8_000, 3_000, 0.1)  # a step costs a millisecond, a convolution's tens of them

# Test error in percent by sparsity.
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
# LeNet-300-100, sparsity 0.9, by size of the scoring batch.
REPRODUCED_BATCH_SIZES = {1: 2.73, 10: 2.39, 100: 2.23, 1000: 2.30, 10000: 2.24}


@dataclasses.dataclass(frozen=True)
class Config(classification.Options):
    """Every combination of score, sparsity, scoring batch size and seed is one case; each is resumable."""

    model: Annotated[str, OneOf(models.NAMES)] = "lenet300"
    sparsity: tuple[Annotated[float, Range(0, 1, "left", "0.98 removes 98 of 100 connections")], ...] = (
        0.9, 0.95, 0.98,
    )  # fmt: skip
    scores: tuple[Score, ...] = ("snip", "magnitude", "random")
    scoring_batch_sizes: tuple[Count, ...] = (100,)  # examples that score the connections
    gated: Literal["snip", "weights"] = "snip"  # "snip": weights and biases, as the authors; "weights": rank >= 2 only
    redraw: bool = True  # train from a new draw of the weights, as the authors' code, not from the scored ones
    dense: bool = True  # also train the network unpruned
    recipe: Literal["short", "paper"] = "short"
    steps: Count | None = None  # None: the recipe's; the learning-rate steps move in proportion
    learning_rate: Positive | None = None  # None: 0.1 as in the paper; 0.02 for LeNet-5, which diverges at 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    validation_fraction: Annotated[float, Range(0, 1, closed="left")] = 0.1
    evaluate_every: int = 1000
    tensorboard: bool = False


SMOKE = {"steps": 60, "sparsity": (0.9,), "scores": ("snip", "random"), "evaluate_every": 60}
SHOWN = ("test_error",)
KEEP_CHECKPOINTS = True


class Variant(NamedTuple):
    score: str  # "dense", or a Score
    sparsity: float
    size: int  # of the scoring batch


def variants(config: Config) -> dict[str, Variant]:
    rows = [Variant("dense", 0.0, 0)] if config.dense else []
    for score in config.scores:
        sizes = config.scoring_batch_sizes if score in READS_DATA else config.scoring_batch_sizes[:1]
        rows += [Variant(score, sparsity, size) for sparsity in config.sparsity if sparsity for size in sizes]
    return {_name(row): row for row in rows}


def _name(row: Variant) -> str:
    if row.score == "dense":
        return "dense"
    batch = f" scored on {row.size}" if row.score in READS_DATA and row.size != 100 else ""
    return f"{row.score} {100 * row.sparsity:g}%{batch}"


def targets(config: Config) -> Targets:
    """Published errors, and an independent run of the authors' code by size of the scoring batch."""
    of = f"{config.dataset}/{config.model}"
    published = "Lee et al. 2019, as remembered, not checked against its text"
    found = {
        _name(Variant("snip" if s else "dense", s, 100)): Target(error, published, "paper")
        for s, error in PUBLISHED.get(of, {}).items()
    }
    if of == "mnist/lenet300":
        reproduced = "independent run of the authors' code (aygong/snip-tensorflow)"
        for size, error in REPRODUCED_BATCH_SIZES.items():
            found[_name(Variant("snip", 0.9, size))] = Target(error, reproduced, "reproduction")
    return {row: {"test_error": target} for row, target in found.items()}


class Shared(NamedTuple):
    """What all cases of a run share; compiled functions are kept because these objects stay the same."""

    config: Config
    task: classification.Task
    steps: int
    optimizer: optax.GradientTransformation
    evaluate: Any


def load(config: Config) -> Shared:
    side = 16 if config.model == "lenet5" else 0
    task = classification.load(config, classification.network(config.model), minimum_side=side)
    recipe = _recipe(config)
    learning_rate = config.learning_rate or (0.02 if config.model == "lenet5" else 0.1)
    schedule = optax.exponential_decay(learning_rate, recipe.decay_every, recipe.decay, staircase=True)
    dense = jax.tree.map(lambda p: jnp.ones(p.shape, bool), jax.eval_shape(task.init, jax.random.key(0))[0])
    optimizer = pruning.pruned(
        optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=lambda p: pruning.mark_prunable(p, "snip")),
            optax.sgd(schedule, config.momentum),
        ),
        dense,  # replaced by each case's masks, so that all cases share one compiled program
    )
    return Shared(config, task, recipe.steps, optimizer, task.evaluator(task.logits))


def _recipe(config: Config) -> Recipe:
    kind = "cifar10" if config.dataset == "cifar10" else "mnist"
    fast = config.model == "lenet300" and config.dataset != "digits"
    short = SHORT_RECIPE_LENET300 if fast else SHORT_RECIPE[kind]
    recipe = PAPER_RECIPE[kind] if config.recipe == "paper" else short
    if config.steps is None:
        return recipe
    return recipe._replace(steps=config.steps, decay_every=max(1, recipe.decay_every * config.steps // recipe.steps))


def run(shared: Shared, variant: Variant, seed: int, workdir: pathlib.Path) -> Outcome:
    """Prunes and trains one network; its test errors in percent, and how many connections each leaf keeps."""
    config, task = shared.config, shared.task
    scored_key, drawn_key, score_key, train_key = jax.random.split(jax.random.key(seed), 4)
    params, model_state = task.init(scored_key)
    score, sparsity, size = variant
    masks = pruned_networks.masks_of(
        task, score, sparsity, params, model_state, key=score_key, batch_size=size, gated=config.gated
    )
    if config.redraw:
        params, model_state = task.init(drawn_key)
    params = pruning.apply_masks(params, masks)
    state = loop.init_state(params, shared.optimizer, key=train_key, model_state=model_state)
    state, history = task.fit(
        shared.optimizer,
        state._replace(opt_state=state.opt_state._replace(masks=masks)),
        workdir,
        steps=shared.steps,
        label=f"{config.model} {_name(variant)} seed {seed}",
        evaluate=shared.evaluate,
        evaluate_every=config.evaluate_every,
        log=[log.TensorBoard(workdir)] if config.tensorboard else [],
    )
    names = ("step", "loss", "test_error")
    curve = [{name: record[name] for name in names} for record in history if "test_error" in record]
    errors = [point["test_error"] for point in curve]
    kept = {row.path: row.kept for row in pruning.sparsity.summarize_sparsity(masks)}
    # The best one is what the authors' test.py reports.
    return Outcome({"test_error": errors[-1], "best_test_error": min(errors)}, curve, {"kept": kept})


def figures(shared: Shared, cases: list[Case]) -> dict[str, Any]:
    config = shared.config
    title = f"{config.model} on {pathlib.Path(config.dataset).stem}, {shared.steps:,} steps"
    first = [c for c in cases if c.variant.score == "dense" or c.variant.size == config.scoring_batch_sizes[0]]
    kept = lambda case: 100 * (1 - case.variant.sparsity) if case.variant.sparsity else None
    published = [
        (100 * (1 - row.sparsity), found["test_error"].value)
        for name, row in variants(config).items()
        if row.score == "snip" and (found := targets(config).get(name)) and found["test_error"].kind == "paper"
    ]
    error = {"test_error": "test error (%)"}
    found = {
        "error_vs_sparsity": plots.over(
            first, kept, error, label=lambda case: case.variant.score, title=title, xscale="log", yscale="log",
            targets={"published (snip)": published} if published else None, xlabel="connections kept (%)",
        ),
        "training": plots.curves(cases, "step", error, title=title, yscale="log"),
    }  # fmt: skip
    scored = [case for case in cases if case.variant.score == "snip"]
    if len(config.scoring_batch_sizes) > 1 and scored:
        found["scoring_batch_size"] = plots.over(
            scored, lambda case: case.variant.size, error, label=lambda case: f"{case.variant.sparsity:.4g} removed",
            title=title, xscale="log", xlabel="examples that score the connections",
        )  # fmt: skip
    if config.model == "lenet300":
        found["connections"] = _connections(shared)
    return found


def _connections(shared: Shared) -> Any:
    """Share of the first layer's connections kept at each pixel when the examples of one class alone are scored."""
    config, task = shared.config, shared.task
    split, scores = task.dataset.train, []
    params, model_state = task.init(jax.random.key(0))
    candidates, others = trees.partition(params, pruning.mark_prunable(params, config.gated))
    height, width, channels = split.images.shape[1:]
    for c in range(task.dataset.num_classes):
        rows = np.flatnonzero(split.labels == c)[:100]
        batch = images.Split(split.images[rows], split.labels[rows])
        scores.append(pruned_networks.score_batch(task, "snip", candidates, others, model_state, batch))

    def share(scores: PyTree, sparsity: float) -> np.ndarray:
        kernel = np.asarray(pruning.prune_masks(scores, sparsity)["dense1"]["kernel"][...])
        return kernel.mean(axis=1).reshape(height, width, channels).mean(axis=-1)

    sparsities = sorted(s for s in config.sparsity if s)[-3:]
    panels = [(f"{c}, {100 * s:g}%", share(of_class, s)) for s in sparsities for c, of_class in enumerate(scores)]
    return plots.images(panels, columns=len(scores), cmap="gray")
