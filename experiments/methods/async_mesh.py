"""Replicas of a pipeline that average a twentieth of their weights, late: loss against fully synchronous training.

Paper: Ajanthan et al., "AsyncMesh: Fully Asynchronous Optimization for Data and Pipeline Parallelism", 2026

    python -m experiments run async_mesh                                   # embedded text, a 4 x 2 mesh on one CPU
    python -m experiments run async_mesh --text tiny_shakespeare --data-dir DIR
    python -m experiments run async_mesh --text huggingface:wikitext/wikitext-103-raw-v1 --preset asyncpp --layers 12 \
        --width 768 --heads 12 --block 1024 --dtype bfloat16 --init-std 0.02 --warmup 0.1 --batch-size 16 \
        --steps 30000 --evaluate-every 1000 --learning-rate 3e-4                # the paper's base model: 8 accelerators

Every device of the mesh ("stage", "data") holds one stage of one replica. Methods:

    full_sync      synchronous pipeline, NAdam with b1 = 0.9, gradients averaged before every update
    dp             asynchronous pipeline, b1 = 0.99 as in all that follow; all weights averaged after every update
    sparta         5 % of the weights after every update
    async_sparta   the same, with the average arriving 10 updates late
    ema            the same, corrected by the moving average of each replica's drift: the paper's method
    weight_update  the same, corrected by the drift itself
    fed_avg, diloco  all weights every `local_steps` updates, averaged or moved by an outer optimizer
    alone          no exchange at all: what averaging is worth

The validation loss is that of the replicas' mean; `spread` is the root mean square distance of the replicas from it,
relative to its own. All methods read the same microbatches, each replica its part of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax

from experiments._machinery import plots
from experiments._machinery.options import Count, Positive, Range
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import pipelines
from jaxlib_methods.parallel import replicas
from jaxlib_methods.parallel.pipelines import DataHook, Pipeline

Method = Literal["full_sync", "dp", "sparta", "async_sparta", "ema", "weight_update", "fed_avg", "diloco", "alone"]


@dataclasses.dataclass(frozen=True)
class Config(pipelines.Options):
    """Every combination of method and seed is one case; each is resumable."""

    batch_size: Count = 8  # windows of a microbatch, shared by the replicas
    seeds: Count = 2
    stages: Count = 4  # P
    replicas: Annotated[int, Range(2, remedy="one has nothing to average")] = 2  # R
    methods: tuple[Method, ...] = (
        "full_sync", "dp", "sparta", "async_sparta", "ema", "weight_update", "diloco", "alone"
    )  # fmt: skip
    fraction: Annotated[float, Range(0, 1, closed="right")] = 0.05  # p
    tau: Annotated[int, Range(0)] = 10  # updates between a snapshot and the arrival of its average
    redraw: bool = True  # another partition when the last one is used up, as the paper's code
    local_steps: Count = 50  # of fed_avg and diloco; the paper's code has 500 of 30,000
    learning_rate: Positive = 3e-3
    b1: float = 0.99  # of NAdam in asynchronous pipelines

    def __post_init__(self):
        super().__post_init__()
        self.check_mesh(self.stages)


SMOKE = {
    "layers": 2, "width": 8, "block": 16, "batch_size": 4, "steps": 8, "seeds": 1, "stages": 2, "methods": ("ema",),
    "tau": 2, "validation_windows": 8, "evaluate_every": 4, "checkpoint_every": 8,
}  # fmt: skip
SHOWN = ("validation_loss", "spread", "averaged share per update")


class Shared(NamedTuple):
    task: pipelines.Task
    pipe: Callable[[Method], Pipeline]  # kept for all seeds of a method


def variants(config: Config) -> dict[str, Method]:
    return {method: method for method in config.methods}


def devices(config: Config) -> int:
    return config.stages * config.replicas


def load(config: Config) -> Shared:
    task = pipelines.load(config)
    return Shared(task, functools.lru_cache(maxsize=1)(functools.partial(build, task)))


def build(task: pipelines.Task, method: Method) -> Pipeline:
    config = task.options
    nadam = lambda b1: pipelines.chain(config, pipelines.nadam(config.steps, b1))
    if method == "full_sync":
        return pipelines.build(task, config.stages, nadam(0.9), num_microbatches=1)
    exchange = averaging(config, method)
    return pipelines.build(task, config.stages, nadam(config.b1), average_gradients=False, data_hook=exchange)


def averaging(config: Config, method: Method) -> DataHook | None:
    """What the replicas exchange after their own update; None where that is nothing."""
    key = jax.random.key(0)
    if method == "alone":
        return None
    if method == "fed_avg":
        return replicas.fed_avg(config.local_steps)
    if method == "diloco":
        return replicas.diloco(config.local_steps)
    if method == "dp":
        return replicas.sparse_averaging(1.0, key=key, delay=0, method="avg")
    return replicas.sparse_averaging(
        config.fraction,
        key=key,
        delay=0 if method == "sparta" else config.tau,
        method=method if method in ("ema", "weight_update") else "avg",
        ema_weight=pipelines.ema_weight(config.steps),
        redraw=config.redraw,
    )


def averaged_share(config: Config, method: Method) -> float:
    """Numbers reduced over the replicas per update, relative to the number of parameters."""
    if method in ("fed_avg", "diloco"):
        return 1 / config.local_steps
    return {"alone": 0.0, "full_sync": 1.0, "dp": 1.0}.get(method, config.fraction)


def run(shared: Shared, method: Method, seed: int, workdir: Any) -> Outcome:
    task, pipe = shared.task, shared.pipe(method)
    evaluate = functools.partial(pipelines.evaluate_mean, task, pipe)
    curve = pipelines.fit(task, pipe, evaluate, workdir, rate=task.options.learning_rate, seed=seed)
    share = {"averaged share per update": averaged_share(task.options, method)}
    return pipelines.outcome(curve, "validation_loss", "spread", **share)


def targets(config: Config) -> Targets:
    """None: the paper's perplexities are of another model and text, and the methods' rows were not seen."""
    return {}


def figures(shared: Shared, cases: list[Case]) -> dict[str, plots.Figure]:
    return {"async_mesh": pipelines.losses_and_spreads(cases)}
