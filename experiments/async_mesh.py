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
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import pipeline
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import parallel
from jaxlib_methods.parallel.pipelines import hooks

PyTree = Any
Method = Literal["full_sync", "dp", "sparta", "async_sparta", "ema", "weight_update", "fed_avg", "diloco", "alone"]
PAPER_STEPS = 30_000
WARMUP_ROUNDS = 1000  # of the paper's, with lambda = 0.5


@dataclasses.dataclass(frozen=True)
class Config(language_model.Options):
    """Every combination of method and seed is one case; each is resumable."""

    preset: str = "gpt_tiny"
    layers: int | None = 8
    width: int | None = 32
    heads: int | None = 2
    block: int | None = 64
    init_std: float | None = 0.1  # of the matrices: 0.02 at the paper's width of 768, kept in proportion to width^-1/2
    batch_size: int = 8  # windows of a microbatch, shared by the replicas
    steps: int = 400  # updates
    validation_windows: int = 48
    evaluate_every: int = 40
    checkpoint_every: int = 200
    seeds: int = 2
    stages: int = 4  # P
    replicas: int = 2  # R
    methods: tuple[Method, ...] = (
        "full_sync",
        "dp",
        "sparta",
        "async_sparta",
        "ema",
        "weight_update",
        "diloco",
        "alone",
    )
    fraction: float = 0.05  # p
    tau: int = 10  # updates between a snapshot and the arrival of its average
    redraw: bool = True  # another partition when the last one is used up, as the paper's code
    local_steps: int = 50  # of fed_avg and diloco; the paper's code has 500 of 30,000
    learning_rate: float = 3e-3
    warmup: float = 0.2  # share of the steps; the paper's is 0.1 of many times as many
    b1: float = 0.99  # of NAdam in asynchronous pipelines
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of a stage's gradient

    def __post_init__(self):
        super().__post_init__()
        if not self.methods:
            raise ValueError("methods is empty; name at least one")
        layers = self.model().layers
        if self.stages < 1 or layers % self.stages:
            raise ValueError(f"stages must divide the {layers} blocks, got {self.stages}; change --stages or --layers")
        if self.replicas < 2:
            raise ValueError(f"replicas must be at least 2, got {self.replicas}: one has nothing to average")
        if self.batch_size % self.replicas:
            raise ValueError(f"replicas must divide the batch size {self.batch_size}, got {self.replicas}")
        for name in ("learning_rate", "clip", "local_steps", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction}")
        if self.tau < 0:
            raise ValueError(f"tau must be at least 0, got {self.tau}")


SMOKE = {
    "layers": 2,
    "width": 8,
    "block": 16,
    "batch_size": 4,
    "steps": 8,
    "seeds": 1,
    "stages": 2,
    "methods": ("ema",),
    "tau": 2,
    "validation_windows": 8,
    "evaluate_every": 4,
    "checkpoint_every": 8,
}
PAPER: dict[str, float] = {}  # its perplexities are of another model and text, and the methods' rows were not seen


def prepare(config: Config) -> None:
    """A single process on a CPU gets as many devices as the mesh needs, unless JAX_NUM_CPU_DEVICES says how many."""
    pipeline.fake_devices(config.stages * config.replicas)


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figure and returns losses, spreads and bytes, one per seed."""
    model = pipeline.Model(config)
    metrics: dict[str, list[float] | float] = {}
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for method in config.methods:
        run = Runs(config, model, method, config.stages, workdir / "cases")
        results = [run(config.learning_rate, seed) for seed in range(config.seeds)]
        curves[method] = [result["curve"] for result in results if result["curve"]]
        metrics[f"diverged {method}"] = [float("validation_loss" not in result) for result in results]
        if ends := [curve[-1] for curve in curves[method]]:
            metrics[f"validation_loss {method}"] = [end["validation_loss"] for end in ends]
            metrics[f"spread {method}"] = [end["spread"] for end in ends]
        metrics[f"averaged share per update {method}"] = averaged_share(config, method)
    if jax.process_index() == 0:
        figure(config, curves, workdir / "async_mesh.png")
    return metrics


def averaging(config: Config, method: str) -> hooks.DataHook | None:
    """What the replicas exchange after their own update; None where that is nothing."""
    key = jax.random.key(0)
    if method in ("full_sync", "alone"):
        return None
    if method == "fed_avg":
        return parallel.replicas.fed_avg(config.local_steps)
    if method == "diloco":
        return parallel.replicas.diloco(config.local_steps)
    if method == "dp":
        return parallel.replicas.sparse_averaging(1.0, key=key, delay=0, method="avg")
    return parallel.replicas.sparse_averaging(
        config.fraction,
        key=key,
        delay=0 if method == "sparta" else config.tau,
        method=method if method in ("ema", "weight_update") else "avg",
        ema_weight=ema_weight(config.steps),
        redraw=config.redraw,
    )


def ema_weight(steps: int) -> optax.Schedule:
    """lambda of the EMA rule, the paper's in proportion to the length of the run."""
    warmup = max(1, round(WARMUP_ROUNDS * steps / PAPER_STEPS))
    return parallel.replicas.ema_weight_schedule(max(steps, warmup + 2), warmup_rounds=warmup)


def averaged_share(config: Config, method: str) -> float:
    """Numbers reduced over the replicas per update, relative to the number of parameters."""
    if method in ("fed_avg", "diloco"):
        return 1 / config.local_steps
    return {"alone": 0.0, "full_sync": 1.0, "dp": 1.0}.get(method, config.fraction)


class Runs(pipeline.Runs):
    """All runs of one method."""

    @functools.cached_property
    def pipe(self) -> parallel.pipelines.Pipeline:
        """The pipeline, from the shapes of the parameters and of a microbatch."""
        config, synchronous = self.config, self.synchronous
        stages = parallel.split_stages(jax.eval_shape(self.model.init, jax.random.key(0)), config.stages)
        tokens = jax.ShapeDtypeStruct((config.batch_size, self.model.config.block_size), jnp.int32)
        b1 = 0.9 if synchronous else config.b1
        optimizer = pipeline.make_optimizer(dataclasses.replace(config, b1=b1), "nesterov", config.stages)
        of_all = self.model.parts, stages, optimizer, parallel.make_mesh(config.stages, config.replicas)
        if synchronous:
            return parallel.synchronous_pipeline(*of_all, batch=(tokens, tokens), num_microbatches=1, schedule="gpipe")
        return parallel.asynchronous_pipeline(
            *of_all, batch=(tokens, tokens), average_gradients=False, data_hook=averaging(config, self.method)
        )

    def evaluate(self, state: PyTree) -> dict[str, float]:
        """Validation loss of the replicas' mean, and how far they are from it."""
        layout = self.pipe.layout
        packed = self.pipe.current(state)[0]
        replicas = [parallel.join_stages(layout.rows(layout.params, packed, r)) for r in range(layout.num_replicas)]
        mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *replicas)
        norm = lambda tree: math.sqrt(
            sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in jax.tree.leaves(tree))
        )
        away = [norm(jax.tree.map(np.subtract, replica, mean)) for replica in replicas]
        return self.model.evaluate(mean) | {"spread": math.sqrt(np.mean(np.square(away))) / norm(mean)}


def figure(config: Any, curves: dict[str, list[list[dict[str, float]]]], path: pathlib.Path) -> None:
    """Validation loss and spread by updates, of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, name, label in zip(
        axes, ("validation_loss", "spread"), ("validation loss of the mean (nats per token)", "spread"), strict=True
    ):
        for (method, of_seeds), colour in zip(curves.items(), plt.get_cmap("tab10").colors, strict=False):
            if of_seeds:
                values = np.mean([[point[name] for point in curve] for curve in of_seeds], axis=0)
                axis.plot([point["updates"] for point in of_seeds[0]], values, color=colour, label=method)
        axis.set(xlabel="updates", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[0].legend(fontsize="x-small")
    model = config.model()
    drawing.suptitle(
        f"GPT of {model.layers} blocks of width {model.width} on {pathlib.Path(config.text).stem}, "
        f"{config.stages} x {config.replicas} mesh, {config.seeds} seed(s)"
    )
    drawing.savefig(path, dpi=130)
    plt.close(drawing)
