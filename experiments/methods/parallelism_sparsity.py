"""How many steps to a validation error, by batch size and sparsity, with everything else tuned anew each time.

Paper: Lee et al., "Understanding the Effects of Data Parallelism and Sparsity on Neural Network Training", ICLR 2021

    python -m experiments run parallelism_sparsity                                     # embedded digits: minutes
    python -m experiments run parallelism_sparsity --data-dir DIR --dataset mnist --model simple_cnn --goal-error 0.02 \
        --batch-sizes 2 4 8 16 32 64 128 256 512 1024 2048 4096 8192 16384 --sparsities 0 0.5 0.7 0.9 --trials 100 \
        --max-steps 40000 --interval 100                                               # the authors' protocol: a GPU
    python -m experiments run parallelism_sparsity --data-dir DIR --dataset cifar10 --model resnet8 --goal-error 0.4 \
        --optimizers nesterov --decay linear --max-steps 100000 --interval 100

For every optimizer, sparsity and batch size a number of trials with quasi-random metaparameters is trained at once
(`tasks/trials.py`); K* is the least number of steps to the goal over the trials. Trial i has its own draw of the
weights, pruned by connection sensitivity summed over the training set, and its own order of the examples; the
metaparameters of trial i are the same everywhere. `--early-stop` (the default) ends a search with its first success,
which is exact for K*. The law K* = c1 / B + c2 is fitted to what was found, and the local Lipschitz constant of the
gradient measured along the best trial of each sparsity, trained again.
Figures: K* against B with the fits; local Lipschitz constants by step.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._machinery import cases as machinery, device_data, options, plots
from experiments._machinery.options import Count, OneOf, Range, Share
from experiments._machinery.records import Case, Outcome, Targets
from experiments.data import images
from experiments.tasks import classification, metaparameters, trials as vmapped
from jaxlib_methods import models, pruning, training_dynamics as dynamics
from jaxlib_methods.typing import PyTree

SCORING_BATCH = 100  # examples of one gradient of the accumulated score


@dataclasses.dataclass(frozen=True)
class Config(options.Options):
    """Every combination of optimizer and sparsity is one case; its batch sizes are searched and resumed one by one."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, a path to an .npz or to a folder of images
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    # Without batch norm; the paper's are simple_cnn and resnet8.
    model: Annotated[str, OneOf(models.NAMES)] = "lenet300"
    optimizers: tuple[Literal["sgd", "momentum", "nesterov"], ...] = ("sgd", "momentum")
    decay: Literal["constant", "linear"] = "constant"  # linear: to a searched factor over a searched number of steps
    sparsities: tuple[Annotated[float, Range(0, 1, "left", "0.9 removes 90 of 100 connections")], ...] = (0.0, 0.9)
    batch_sizes: tuple[Count, ...] = (4, 16, 64, 256, 1024)
    goal_error: Annotated[float, Range(0, 1, remedy="0.05 is five percent")] = 0.05  # share of wrong examples
    trials: Count = 16  # of each search; the paper's: 100
    trials_at_once: Count | None = None  # vmapped; None: all of them
    max_steps: Count = 4000
    interval: Count = 20  # steps between checks, the resolution of K*; the paper's: 100
    early_stop: bool = True
    lipschitz_batch_size: int | None = 64  # of the trainings along which the Lipschitz constant is measured; None: none
    lipschitz_every: Annotated[int, Range(2)] = 50  # steps between measurements; the paper's: 1000
    lipschitz_steps: Count = 400
    lipschitz_examples: int | None = None  # of the full gradient; None: the training set
    validation_fraction: Share = 0.1


SMOKE = {
    "optimizers": ("sgd",), "sparsities": (0.9,), "batch_sizes": (16, 64), "goal_error": 0.5, "trials": 2,
    "max_steps": 200, "lipschitz_every": 21, "lipschitz_steps": 42,
}  # fmt: skip


class Variant(NamedTuple):
    optimizer: str
    sparsity: float  # share of connections removed, biases counted


def variants(config: Config) -> dict[str, Variant]:
    rows = [Variant(optimizer, sparsity) for optimizer in config.optimizers for sparsity in config.sparsities]
    return {f"{row.optimizer} s={row.sparsity:g}": row for row in rows}


def targets(config: Config) -> Targets:
    """None: the paper's results are figures."""
    del config
    return {}


def load(config: Config) -> "Study":
    return Study(config)


def run(study: "Study", variant: Variant, seed: int, workdir: pathlib.Path) -> Outcome:
    """K* of every batch size, the law that fits them, and the local Lipschitz constant along the best trial."""
    del seed  # the trials have their own
    config, metrics, found = study.config, {}, {}
    for size in config.batch_sizes:
        search = functools.partial(study.search, *variant, size)
        found[size] = machinery.run_or_load(workdir / f"B{size}", search)
        if found[size]["steps"] is not None:
            metrics[f"steps_to_result B={size}"] = found[size]["steps"]
    if (law := fit(found)) is not None:
        metrics |= {"c1": law.c1, "c2": law.c2}
        if math.isfinite(law.critical_batch_size):
            metrics["critical_batch_size"] = law.critical_batch_size
    curve = []
    best = found.get(config.lipschitz_batch_size, {}).get("trial")
    if best is not None:
        curve = [{"step": step, "lipschitz": value} for step, value in study.lipschitz(*variant, best)]
        metrics["lipschitz"] = float(np.mean([point["lipschitz"] for point in curve]))
    return Outcome(metrics, curve, {"searches": {str(size): result for size, result in found.items()}})


def fit(results: dict[int, dict[str, Any]]) -> dynamics.BatchSizeLaw | None:
    """The law of the batch sizes at which some trial reached the goal; None where there are fewer than two."""
    reached = {batch_size: result["steps"] for batch_size, result in results.items() if result["steps"] is not None}
    return dynamics.fit_steps_to_result(list(reached), list(reached.values())) if len(reached) > 1 else None


class _Start(NamedTuple):
    params: PyTree  # leading axis: trials
    scores: PyTree  # likewise


class Study:
    """The workload, and what all searches share."""

    def __init__(self, config: Config):
        self.config = config
        names = ("dataset", "data_dir", "validation_fraction")
        data = classification.Options(**{name: getattr(config, name) for name in names})
        task = classification.load(data, classification.network(config.model))
        rest = jax.eval_shape(task.init, jax.random.key(0))[1]
        if jax.tree.leaves(rest):
            raise ValueError(f"model {config.model!r} has state beside its parameters; take one without batch norm")
        self.init = lambda key: task.init(key)[0]
        self.logits = lambda params, pixels: task.logits(params, rest, pixels)
        self.dataset = task.dataset
        self._programs: dict[tuple[str, int, int], vmapped.Program] = {}

    def loss(self, params: PyTree, batch: images.Split) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(params, batch.images), batch.labels).mean()

    def program(self, optimizer: str, batch_size: int, trials: int) -> vmapped.Program:
        """The compiled training of so many trials; the same for every sparsity."""
        if (optimizer, batch_size, trials) not in self._programs:
            mesh = vmapped.trials_mesh(trials)
            self._programs[optimizer, batch_size, trials] = vmapped.Program(
                self.loss,
                self.logits,
                metaparameters.make_optimizer(optimizer, self.config.decay)(learning_rate=1.0),
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
        batch = device_data.replicate(images.Split(*(x[: count * SCORING_BATCH] for x in split)), mesh)

        def score(params: PyTree, batch: images.Split) -> PyTree:
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
        values = metaparameters.search(metaparameters.searched(optimizer, config.decay), config.trials)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(config.trials, dtype=jnp.int32))
        values = {name: value[chosen] for name, value in values.items()}
        return vmapped.start(
            params, masks, values, keys[chosen], metaparameters.make_optimizer(optimizer, config.decay)
        )

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

    def lipschitz(self, optimizer: str, sparsity: float, trial: int) -> list[tuple[int, float]]:
        """Trains one trial again: (step, local Lipschitz constant on the way to it from the step before)."""
        config = self.config
        program = self.program(optimizer, config.lipschitz_batch_size, 1)
        state = self.start(optimizer, sparsity, slice(trial, trial + 1))
        masks = jax.tree.map(lambda x: x[0], state.masks)
        split = images.Split(*(jnp.asarray(x[: config.lipschitz_examples]) for x in self.dataset.train))

        @jax.jit
        def measure(params: PyTree, after: PyTree, masks: PyTree, split: images.Split) -> jax.Array:
            loss = lambda params, batch: self.loss(pruning.apply_masks(params, masks), batch)
            gradient = lambda params: dynamics.mean_gradient(loss, params, split)
            first = lambda tree: jax.tree.map(lambda x: x[0], tree)
            return dynamics.local_lipschitz(gradient, first(params), first(after))

        curve = []
        for step in range(config.lipschitz_every, config.lipschitz_steps + 1, config.lipschitz_every):
            before = program.advance(state, goal_error=-1.0, length=config.lipschitz_every - 1)  # no error is below it
            state = program.advance(before, goal_error=-1.0, length=1)
            curve.append((step, float(measure(before.params, state.params, masks, split))))
        return curve


def figures(study: Study, cases: list[Case]) -> dict[str, Any]:
    config = study.config
    figure, ((left, right),) = plots.axes(1, 2, size=(5.5, 4.0))
    grid = np.geomspace(min(config.batch_sizes), max(config.batch_sizes), 100)
    for i, case in enumerate(cases):
        style = {"color": f"C{i}", "label": f"{case.variant.optimizer}, {100 * case.variant.sparsity:g}% removed"}
        found = {int(size): result for size, result in case.details["searches"].items()}
        reached = [(size, result["steps"]) for size, result in found.items() if result["steps"] is not None]
        if reached:
            left.plot(*zip(*reached, strict=True), "o", **style)
            left.set(xscale="log", yscale="log")
        if (law := fit(found)) is not None:
            left.plot(grid, law.steps(grid), color=style["color"], linewidth=1)
        if case.curve:
            right.plot(*zip(*((p["step"], p["lipschitz"]) for p in case.curve), strict=True), "o-", **style)
            right.set(yscale="log")
    workload = f"{config.model} on {pathlib.Path(config.dataset).stem}, error {config.goal_error:g}, c1 / B + c2"
    left.set(xlabel="batch size", ylabel="steps to the goal", title=workload)
    if left.has_data():
        left.legend(fontsize="small")
    right.set(xlabel="step", ylabel="local Lipschitz constant of the gradient")
    right.set_title(f"best trial at batch size {config.lipschitz_batch_size}")
    return {"steps_to_result": figure}
