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

import numpy as np

from experiments._machinery import cases as machinery, plots
from experiments._machinery.options import Count, Range
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import steps_to_result
from experiments.tasks.steps_to_result import Study
from jaxlib_methods import training_dynamics as dynamics


@dataclasses.dataclass(frozen=True)
class Config(steps_to_result.Options):
    """Every combination of optimizer and sparsity is one case; its batch sizes are searched and resumed one by one."""

    optimizers: tuple[Literal["sgd", "momentum", "nesterov"], ...] = ("sgd", "momentum")
    sparsities: tuple[Annotated[float, Range(0, 1, "left", "0.9 removes 90 of 100 connections")], ...] = (0.0, 0.9)
    batch_sizes: tuple[Count, ...] = (4, 16, 64, 256, 1024)


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


def load(config: Config) -> Study:
    return Study(config)


def run(study: Study, variant: Variant, seed: int, workdir: pathlib.Path) -> Outcome:
    """K* of every batch size, the law that fits them, and the local Lipschitz constant along the best trial."""
    del seed  # the trials have their own
    config, metrics, found = study.options, {}, {}
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


def figures(study: Study, cases: list[Case]) -> dict[str, Any]:
    config = study.options
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
