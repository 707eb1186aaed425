"""Language models trained by pipelines over a mesh, synchronous and asynchronous: loss by updates and by tokens.

Paper: Ajanthan, Ramasinghe, Zuo, Avraham, Long, "Nesterov Method for Asynchronous Pipeline Parallel Optimization", ICML
2025

    python -m experiments run pipeline                                     # embedded text, 8 stages on one CPU
    python -m experiments run pipeline --text tiny_shakespeare --data-dir DIR
    python -m experiments run pipeline --distributed --coordinator-address HOST:PORT --num-processes 8 --process-id I
    python -m experiments run pipeline --text huggingface:wikitext/wikitext-103-raw-v1 --preset asyncpp --layers None \
        --width None --heads None --block None --dtype bfloat16 --init-std 0.02 --warmup 0.06 --batch-size 8 \
        --stages 8 --steps 50000 --evaluate-every 1000 --learning-rates 3e-4                      # 134M: 8 accelerators

Every device of the mesh ("stage", "data") holds one stage. `staleness` simulates the same updates on one device, at
any number of stages; here they are made by the pipeline itself, with its schedule, stash and messages.

Methods: gpipe (synchronous, AdamW, four microbatches per update); pipedream (asynchronous, weight stashing, AdamW);
nesterov (the same with NAdam, b1 = 0.99); nesterov_no_stash (newest weights in the backward pass, learning rate
/ tau^rho and momentum 0.9 + 0.09 tau / P); pipemare (AdamW without stash, learning rate / tau^rho, backward weights
corrected by the average increment). All read the same microbatches in the same order, so that gpipe makes a quarter of
the updates. Each picks its learning rate by the validation loss of the first seed.

The momentum schedule and the annealing of the learning-rate correction are the paper's, compressed from 50,000 updates
to the length of the run.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from experiments._machinery import plots
from experiments._machinery.options import Count, Positive
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import pipelines
from jaxlib_methods import optimizers
from jaxlib_methods.parallel.pipelines import Pipeline

Method = Literal["gpipe", "pipedream", "nesterov", "nesterov_no_stash", "pipemare"]
ANNEALED = 7_000  # of the paper's updates with a corrected learning rate
MICROBATCHES = 4  # of gpipe's update


@dataclasses.dataclass(frozen=True)
class Config(pipelines.Options):
    """Every combination of stages, method, learning rate and seed is one case; each is resumable."""

    batch_size: Count = 4  # windows of a microbatch
    seeds: Count = 3
    stages: tuple[Count, ...] = (4, 8)  # P
    methods: tuple[Method, ...] = ("gpipe", "pipedream", "nesterov", "nesterov_no_stash", "pipemare")
    learning_rates: tuple[Positive, ...] = (1e-3, 3e-3, 1e-2, 3e-2)  # the first seed tries all of them
    b1: float = 0.99  # of nesterov
    clip: Positive = 10.0  # norm of a stage's gradient

    def __post_init__(self):
        super().__post_init__()
        self.check_mesh(*self.stages)
        for name in ("steps", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) % MICROBATCHES:
                raise ValueError(f"{name} must be a multiple of gpipe's {MICROBATCHES}, got {getattr(self, name)}")


SMOKE = {
    "layers": 2, "width": 8, "block": 16, "steps": 16, "seeds": 1, "stages": (2,), "methods": ("gpipe", "nesterov"),
    "learning_rates": (1e-2,), "validation_windows": 8, "evaluate_every": 8, "checkpoint_every": 8,
}  # fmt: skip
SHOWN = ("validation_loss", "learning_rate")
TUNED_BY = "validation_loss"


class Variant(NamedTuple):
    method: Method
    stages: int


class Shared(NamedTuple):
    task: pipelines.Task
    pipe: Callable[[Variant], Pipeline]  # kept for all learning rates and seeds of a variant


def variants(config: Config) -> dict[str, Variant]:
    return {f"{method} P={P}": Variant(method, P) for P in config.stages for method in config.methods}


def candidates(config: Config, row: str, chosen: dict[str, float]) -> Sequence[float]:
    return config.learning_rates


def devices(config: Config) -> int:
    return max(config.stages) * config.replicas


def load(config: Config) -> Shared:
    task = pipelines.load(config)
    return Shared(task, functools.lru_cache(maxsize=1)(functools.partial(build, task)))


def build(task: pipelines.Task, variant: Variant) -> Pipeline:
    """The pipeline of a method; the learning rate is an array in its state."""
    (method, P), optimizer = variant, make_optimizer(task.options, *variant)
    if method == "gpipe":
        return pipelines.build(task, P, optimizer, num_microbatches=MICROBATCHES)
    predict = optimizers.no_stash.discrepancy_corrected if method == "pipemare" else None
    return pipelines.build(task, P, optimizer, stash=method in ("pipedream", "nesterov"), predict_backward=predict)


def run(shared: Shared, variant: Variant, seed: int, workdir: Any, rate: float) -> Outcome:
    task, pipe = shared.task, shared.pipe(variant)
    evaluate = functools.partial(pipelines.evaluate, task, pipe)
    curve = pipelines.fit(task, pipe, evaluate, workdir, rate=rate, seed=seed)
    return pipelines.outcome(curve, "validation_loss", learning_rate=rate)


def make_optimizer(config: Config, method: Method, P: int) -> Any:
    """What each stage updates itself with; a function of the stage's delay where the method distinguishes stages."""
    updates = config.steps // (MICROBATCHES if method == "gpipe" else 1)
    chain = functools.partial(pipelines.chain, config, updates=updates)
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    if method in ("gpipe", "pipedream"):
        return chain(adam)
    if method == "nesterov":
        return chain(pipelines.nadam(updates, config.b1))
    anneal_steps = max(1, round(ANNEALED * updates / pipelines.PAPER_STEPS))
    slower = lambda delay: optimizers.no_stash.scale_by_delay(delay, anneal_steps)
    if method == "nesterov_no_stash":
        b1 = lambda delay: 0.9 + 0.09 * delay.astype(jnp.float32) / P
        return lambda delay: chain(pipelines.nadam(updates, b1(delay)), slower(delay))
    return lambda delay: chain(adam, slower(delay), optimizers.no_stash.discrepancy_correction(delay))


def targets(config: Config) -> Targets:
    """None: the paper's perplexities are of another model and text."""
    return {}


def figures(shared: Shared, cases: list[Case]) -> dict[str, plots.Figure]:
    loss = {"validation_loss": "validation loss (nats per token)"}
    return {x: plots.curves(cases, x, loss, title="validation loss by " + x) for x in ("updates", "tokens")}
