"""How many steps to a validation error, by batch size and sparsity, with everything else tuned anew each time.

Paper: Lee et al., "Understanding the Effects of Data Parallelism and Sparsity on Neural Network Training", ICLR 2021

    python -m experiments run parallelism_sparsity                                     # embedded digits: minutes
    python -m experiments run parallelism_sparsity --data-dir DIR --dataset mnist --model simple_cnn --goal-error 0.02 \
        --batch-sizes 2 4 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 --sparsities 0 0.5 0.7 0.9 --trials 100 \
        --max-steps 40000 --interval 100                                               # the authors' protocol: a GPU
    python -m experiments run parallelism_sparsity --data-dir DIR --dataset cifar10 --model resnet8 --goal-error 0.4 \
        --optimizers nesterov --decay linear --max-steps 100000 --interval 100

For every optimizer, sparsity and batch size a number of trials with quasi-random metaparameters (`metaparameters.py`)
is trained at once (`trials.py`); K* is the least number of steps to the goal over the trials. Trial i has its own draw
of the weights, pruned by connection sensitivity summed over the training set, and its own order of the examples; the
metaparameters of trial i are the same everywhere. `--early-stop` (the default) ends a search with its first success,
which is exact for K*. The law K* = c1 / B + c2 is fitted to what was found, and the local Lipschitz constant of the
gradient measured along the best trial of each sparsity, trained again.
Figures: K* against B with the fits; local Lipschitz constants by step.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases, device_data
from experiments.data import images as data
from experiments.tasks import metaparameters, trials as vmapped
from jaxlib_methods import models, pruning, training_dynamics as dynamics

PyTree = Any
Optimizer = Literal["sgd", "momentum", "nesterov"]
SCORING_BATCH = 100  # examples of one gradient of the accumulated score


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of optimizer, sparsity and batch size is one case; each is resumable."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, or a path to an .npz
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    model: str = "lenet300"  # a name of jaxlib_methods.models without batch norm; the paper's: simple_cnn, resnet8
    optimizers: tuple[Optimizer, ...] = ("sgd", "momentum")
    decay: Literal["constant", "linear"] = "constant"  # linear: to a searched factor over a searched number of steps
    sparsities: tuple[float, ...] = (0.0, 0.9)  # shares of connections removed, biases counted
    batch_sizes: tuple[int, ...] = (4, 16, 64, 256, 1024)
    goal_error: float = 0.05  # share of wrong validation examples
    trials: int = 16  # of each case; the paper's: 100
    trials_at_once: int | None = None  # vmapped; None: all of them
    max_steps: int = 4000
    interval: int = 20  # steps between checks, the resolution of K*; the paper's: 100
    early_stop: bool = True
    lipschitz_batch_size: int | None = 64  # of the trainings along which the Lipschitz constant is measured; None: none
    lipschitz_every: int = 50  # steps between measurements; the paper's: 1000
    lipschitz_steps: int = 400
    lipschitz_examples: int | None = None  # of the full gradient; None: the training set
    validation_fraction: float = 0.1

    def __post_init__(self):
        if self.model not in models.NAMES:
            raise ValueError(f"unknown model {self.model!r}; known are {', '.join(models.NAMES)}")
        for name in ("optimizers", "sparsities", "batch_sizes"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        for value in self.sparsities:
            if not 0 <= value < 1:
                raise ValueError(f"sparsities must lie in [0, 1), got {value}; 0.9 removes 90 of 100 connections")
        if not 0 <= self.goal_error <= 1:
            raise ValueError(f"goal_error must lie in [0, 1], got {self.goal_error}; 0.05 is five percent")
        if self.lipschitz_every < 2:
            raise ValueError(f"lipschitz_every must be at least 2, got {self.lipschitz_every}")
        for name in ("trials", "max_steps", "interval", "lipschitz_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be positive, got {self.batch_sizes}")
        if self.trials_at_once is not None and self.trials_at_once < 1:
            raise ValueError(f"trials_at_once must be positive, got {self.trials_at_once}")


SMOKE = {
    "optimizers": ("sgd",),
    "sparsities": (0.9,),
    "batch_sizes": (16, 64),
    "goal_error": 0.5,
    "trials": 2,
    "max_steps": 200,
    "lipschitz_every": 21,
    "lipschitz_steps": 42,
}
PAPER: dict[str, float] = {}  # its results are figures


def train(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Runs all searches, fits the law, measures Lipschitz constants, draws the figures and returns the numbers."""
    study = Study(config)
    metrics: dict[str, float] = {}
    found: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for optimizer in config.optimizers:
        for sparsity in config.sparsities:
            for batch_size in config.batch_sizes:
                folder = workdir / "cases" / f"{optimizer}-{sparsity:g}-{batch_size}"
                search = functools.partial(study.search, optimizer, sparsity, batch_size)
                result = cases.run_or_load(folder, search)
                found.setdefault((optimizer, sparsity), {})[batch_size] = result
                if result["steps"] is not None:
                    metrics[f"steps_to_result {optimizer} s={sparsity:g} B={batch_size}"] = result["steps"]
    laws = {of: fit(results) for of, results in found.items()}
    curves: dict[tuple[str, float], list[list[float]]] = {}
    for (optimizer, sparsity), law in laws.items():
        name = f"{optimizer} s={sparsity:g}"
        if law is not None:
            metrics |= {f"c1 {name}": law.c1, f"c2 {name}": law.c2}
            if math.isfinite(law.critical_batch_size):
                metrics[f"critical_batch_size {name}"] = law.critical_batch_size
        best = found[optimizer, sparsity].get(config.lipschitz_batch_size, {}).get("trial")
        if best is not None:
            folder = workdir / "cases" / f"lipschitz-{optimizer}-{sparsity:g}"
            measure = functools.partial(study.lipschitz, optimizer, sparsity, best)
            curves[optimizer, sparsity] = cases.run_or_load(folder, measure)["curve"]
            metrics[f"lipschitz {name}"] = float(np.mean([value for _, value in curves[optimizer, sparsity]]))
    if jax.process_index() == 0:
        _figures(config, found, laws, curves, workdir)
    return metrics


def fit(results: dict[int, dict[str, Any]]) -> dynamics.BatchSizeLaw | None:
    """The law of the batch sizes at which some trial reached the goal; None where there are fewer than two."""
    reached = {batch_size: result["steps"] for batch_size, result in results.items() if result["steps"] is not None}
    return dynamics.fit_steps_to_result(list(reached), list(reached.values())) if len(reached) > 1 else None


def make_optimizer(kind: str, decay: str) -> Callable[..., optax.GradientTransformation]:
    """`(learning_rate, ...) -> optimizer` whose metaparameters are arrays in its state, one set for each trial.

    SGD, momentum v <- mu v + g, w <- w - lr v, or Nesterov's w <- w - lr (g + mu v); with the linear decay the rate
    goes to end_learning_rate_factor times its start over decay_steps and stays there.
    """

    def factory(
        learning_rate: float, momentum: float = 0.0, decay_steps: float = 1.0, end_learning_rate_factor: float = 1.0
    ) -> optax.GradientTransformation:
        def linear(count: jax.Array) -> jax.Array:
            progress = jnp.minimum(count.astype(jnp.float32) / decay_steps, 1.0)
            return learning_rate * (1 - (1 - end_learning_rate_factor) * progress)

        schedule = linear if decay == "linear" else learning_rate
        return optax.sgd(schedule, None if kind == "sgd" else momentum, nesterov=kind == "nesterov")

    return optax.inject_hyperparams(factory)


def searched(kind: str, decay: str) -> tuple[str, ...]:
    """The metaparameters of an optimizer, in the order of the search's coordinates."""
    names = ("learning_rate",) if kind == "sgd" else ("learning_rate", "momentum")
    return (*names, "decay_steps", "end_learning_rate_factor") if decay == "linear" else names


class _Start(NamedTuple):
    params: PyTree  # leading axis: trials
    scores: PyTree  # likewise


class Study:
    """The workload, and what all searches share."""

    def __init__(self, config: Config):
        self.config = config
        dataset = data.load(config.dataset, config.data_dir, config.validation_fraction)
        grey = dataset.train.images.shape[-1] == 1
        mean, std = (data.global_statistics if grey else data.channel_statistics)(dataset.train.images)
        shape = dataset.train.images.shape[1:]

        def build(key: jax.Array) -> nnx.Module:
            rngs = nnx.Rngs(params=key)
            return models.create(config.model, num_classes=dataset.num_classes, input_shape=shape, rngs=rngs)

        graph, _, rest = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, ...)
        if jax.tree.leaves(rest):
            raise ValueError(f"model {config.model!r} has state beside its parameters; take one without batch norm")
        self.init = lambda key: nnx.split(build(key), nnx.Param, ...)[1]
        self.logits = lambda params, images: nnx.merge(graph, params, rest)(data.standardise(images, mean, std))
        self.dataset = dataset
        self._programs: dict[tuple[str, int, int], vmapped.Program] = {}

    def loss(self, params: PyTree, batch: data.Split) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(params, batch.images), batch.labels).mean()

    def program(self, optimizer: str, batch_size: int, trials: int) -> vmapped.Program:
        """The compiled training of so many trials; the same for every sparsity."""
        if (optimizer, batch_size, trials) not in self._programs:
            mesh = vmapped.trials_mesh(trials)
            self._programs[optimizer, batch_size, trials] = vmapped.Program(
                self.loss,
                self.logits,
                make_optimizer(optimizer, self.config.decay)(learning_rate=1.0),
                *(device_data.replicate(split, mesh) for split in (self.dataset.train, self.dataset.validation)),
                batch_size=batch_size,
                interval=self.config.interval,
                mesh=mesh,
            )
        return self._programs[optimizer, batch_size, trials]

    @functools.cached_property
    def _initial(self) -> _Start:
        """Weights and scores of all trials: trial i is drawn from key i, whatever is searched."""
        config, split = self.config, self.dataset.train
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(config.trials, dtype=jnp.int32))
        count = len(split.labels) // SCORING_BATCH
        mesh = vmapped.trials_mesh(config.trials)
        batch = device_data.replicate(data.Split(*(x[: count * SCORING_BATCH] for x in split)), mesh)

        def score(params: PyTree, batch: data.Split) -> PyTree:
            return pruning.connection_sensitivity(self.loss, params, batch, num_microbatches=count)

        params = jax.jit(jax.vmap(self.init))(keys)
        scored = any(config.sparsities)  # a study of dense networks alone needs no scores
        return _Start(params, vmapped.per_trial(score, mesh)(params, batch) if scored else params)

    def start(self, optimizer: str, sparsity: float, chosen: slice) -> vmapped.Trials:
        """Initial weights, masks, metaparameters and keys of some of the trials."""
        config = self.config
        params, scores = jax.tree.map(lambda x: x[chosen], self._initial)
        cut = lambda scores: pruning.prune_masks(scores, sparsity)
        masks = jax.jit(lambda scores: jax.lax.map(cut, scores))(scores)
        values = metaparameters.search(searched(optimizer, config.decay), config.trials)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(config.trials, dtype=jnp.int32))
        values = {name: value[chosen] for name, value in values.items()}
        return vmapped.start(params, masks, values, keys[chosen], make_optimizer(optimizer, config.decay))

    def search(self, optimizer: str, sparsity: float, batch_size: int, folder: pathlib.Path | None) -> dict[str, Any]:
        """K* (None where no trial reached the goal), its trial, and the status of every trial."""
        config = self.config
        size = min(config.trials_at_once or config.trials, config.trials)
        statuses: list[int] = []
        for first in range(0, config.trials, size):
            chosen = slice(first, min(first + size, config.trials))
            program = self.program(optimizer, batch_size, chosen.stop - chosen.start)
            _, status = program.run(
                self.start(optimizer, sparsity, chosen),
                goal_error=config.goal_error,
                max_steps=config.max_steps,
                early_stop=config.early_stop,
                best=min((s for s in statuses if s > 0), default=None),
                folder=None if folder is None else folder / f"trials-{first}",
            )
            statuses += status.tolist()
        steps = min((s for s in statuses if s > 0), default=None)
        if folder is not None:
            print(f"{optimizer} s={sparsity:g} B={batch_size}: K* = {steps}", flush=True)
        return {"steps": steps, "trial": None if steps is None else statuses.index(steps), "statuses": statuses}

    def lipschitz(self, optimizer: str, sparsity: float, trial: int, folder: pathlib.Path) -> dict[str, Any]:
        """Trains one trial again: (step, local Lipschitz constant on the way to it from the step before)."""
        del folder
        config = self.config
        program = self.program(optimizer, config.lipschitz_batch_size, 1)
        state = self.start(optimizer, sparsity, slice(trial, trial + 1))
        masks = jax.tree.map(lambda x: x[0], state.masks)
        split = data.Split(*(jnp.asarray(x[: config.lipschitz_examples]) for x in self.dataset.train))

        @jax.jit
        def measure(params: PyTree, after: PyTree, masks: PyTree, split: data.Split) -> jax.Array:
            loss = lambda params, batch: self.loss(pruning.apply_masks(params, masks), batch)
            gradient = lambda params: dynamics.mean_gradient(loss, params, split)
            first = lambda tree: jax.tree.map(lambda x: x[0], tree)
            return dynamics.local_lipschitz(gradient, first(params), first(after))

        curve = []
        for step in range(config.lipschitz_every, config.lipschitz_steps + 1, config.lipschitz_every):
            before = program.advance(state, goal_error=-1.0, length=config.lipschitz_every - 1)  # no error is below it
            state = program.advance(before, goal_error=-1.0, length=1)
            curve.append([step, float(measure(before.params, state.params, masks, split))])
        return {"curve": curve, "trial": trial}


def _figures(
    config: Config,
    found: dict[tuple[str, float], dict[int, dict[str, Any]]],
    laws: dict[tuple[str, float], dynamics.BatchSizeLaw | None],
    curves: dict[tuple[str, float], list[list[float]]],
    workdir: pathlib.Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(found, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    grid = np.geomspace(min(config.batch_sizes), max(config.batch_sizes), 100)
    for of, results in found.items():
        label = f"{of[0]}, {100 * of[1]:g}% removed"
        reached = [(B, result["steps"]) for B, result in results.items() if result["steps"] is not None]
        if reached:
            axes[0].plot(*zip(*reached, strict=True), "o", color=colours[of], label=label)
            axes[0].set(xscale="log", yscale="log")
        if laws[of] is not None:
            axes[0].plot(grid, laws[of].steps(grid), color=colours[of], linewidth=1)
        if of in curves:
            axes[1].plot(*zip(*curves[of], strict=True), "o-", color=colours[of], label=label)
            axes[1].set(yscale="log")
    axes[0].set(xlabel="batch size", ylabel="steps to the goal")
    axes[0].set_title(
        f"{config.model} on {pathlib.Path(config.dataset).stem}, error {config.goal_error:g}, c1 / B + c2"
    )
    if axes[0].has_data():
        axes[0].legend(fontsize="small")
    axes[1].set(xlabel="step", ylabel="local Lipschitz constant of the gradient")
    axes[1].set_title(f"best trial at batch size {config.lipschitz_batch_size}")
    figure.savefig(workdir / "steps_to_result.png", dpi=150)
    plt.close(figure)
