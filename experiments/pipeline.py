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

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases, device_data, loop as training
from experiments._machinery.checkpoint import Checkpoints
from experiments._machinery.errors import ExperimentError
from experiments._machinery.log import JsonLines
from experiments._machinery.progress import Progress
from experiments.data import text
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import models, optimizers, parallel

PyTree = Any
Method = Literal["gpipe", "pipedream", "nesterov", "nesterov_no_stash", "pipemare"]
PAPER_STEPS = 50_000
ANNEALED = 7_000  # of the paper's updates with a corrected learning rate
MICROBATCHES = 4  # of gpipe's update


@dataclasses.dataclass(frozen=True)
class Config(language_model.Options):
    """Every combination of stages, method, learning rate and seed is one case; each is resumable."""

    preset: str = "gpt_tiny"
    layers: int | None = 8
    width: int | None = 32
    heads: int | None = 2
    block: int | None = 64
    init_std: float | None = 0.1  # of the matrices: 0.02 at the paper's width of 768, kept in proportion to width^-1/2
    batch_size: int = 4  # windows of a microbatch
    steps: int = 400  # microbatches; updates, but for gpipe
    validation_windows: int = 48
    evaluate_every: int = 40  # microbatches; a multiple of gpipe's four
    checkpoint_every: int = 200
    seeds: int = 3
    stages: tuple[int, ...] = (4, 8)  # P
    replicas: int = 1  # pipelines side by side, which share a microbatch
    methods: tuple[Method, ...] = ("gpipe", "pipedream", "nesterov", "nesterov_no_stash", "pipemare")
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)  # the first seed tries all of them
    warmup: float = 0.2  # share of the steps; the paper's is 0.06 of over a hundred times as many
    b1: float = 0.99  # of nesterov
    weight_decay: float = 0.01
    clip: float = 10.0  # norm of a stage's gradient

    def __post_init__(self):
        super().__post_init__()
        for name in ("stages", "methods", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        layers = self.model().layers
        for P in self.stages:
            if P < 1 or layers % P:
                raise ValueError(f"stages must divide the {layers} blocks, got {P}; change --stages or --layers")
        if self.replicas < 1 or self.batch_size % self.replicas:
            raise ValueError(f"replicas must divide the batch size {self.batch_size}, got {self.replicas}")
        for name in ("steps", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1 or getattr(self, name) % MICROBATCHES:
                raise ValueError(f"{name} must be a multiple of gpipe's {MICROBATCHES}, got {getattr(self, name)}")
        if not min(self.learning_rates) > 0:
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")


SMOKE = {
    "layers": 2,
    "width": 8,
    "block": 16,
    "steps": 16,
    "seeds": 1,
    "stages": (2,),
    "methods": ("gpipe", "nesterov"),
    "learning_rates": (1e-2,),
    "validation_windows": 8,
    "evaluate_every": 8,
    "checkpoint_every": 8,
}
PAPER: dict[str, float] = {}  # its perplexities are of another model and text


def prepare(config: Config) -> None:
    """Gives a single process on a CPU the devices of the largest mesh."""
    fake_devices(max(config.stages) * config.replicas)


def fake_devices(count: int) -> None:
    """A single process on a CPU gets that many devices, unless JAX_NUM_CPU_DEVICES says how many."""
    if "JAX_NUM_CPU_DEVICES" not in os.environ and not jax.distributed.is_initialized():
        jax.config.update("jax_num_cpu_devices", count)


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figure and returns the losses at the chosen learning rates, one per seed."""
    model = Model(config)
    metrics: dict[str, list[float] | float] = {}
    chosen: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for P, method in itertools.product(config.stages, config.methods):
        run = Runs(config, model, method, P, workdir / "cases")
        first = {rate: run(rate, seed=0) for rate in config.learning_rates}
        rate = min(first, key=lambda rate: first[rate].get("validation_loss", math.inf))
        results = [first[rate], *(run(rate, seed) for seed in range(1, config.seeds))]
        chosen[method, P] = results
        name = f"{method} P={P}"
        metrics[f"learning_rate {name}"] = rate
        metrics[f"diverged {name}"] = [float("validation_loss" not in result) for result in results]
        if losses := [result["validation_loss"] for result in results if "validation_loss" in result]:
            metrics[f"validation_loss {name}"] = losses
    if jax.process_index() == 0:
        _figure(config, chosen, workdir)
    return metrics


class Model:
    """The decoder, its text and its validation loss, for all methods and numbers of stages."""

    def __init__(self, config: Any):
        self.text = text.load(
            config.text, validation=config.validation_text, tokenizer=config.tokenizer, data_dir=config.data_dir
        )
        self.config = self.decoder(config, self.text.vocab_size)
        functions = self.functions()

        def head(params: PyTree, x: jax.Array, targets: jax.Array) -> jax.Array:
            return language_model.cross_entropy(functions.head(params, x), targets).mean()

        def per_window(params: PyTree, model_state: PyTree, windows: jax.Array) -> dict[str, jax.Array]:
            del model_state
            embed, blocks, of_head = params
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
            x = functions.embed(embed, windows[:, :-1])
            x, _ = jax.lax.scan(lambda x, block: (functions.block(block, x), None), x, stacked)
            return {"loss": language_model.cross_entropy(functions.head(of_head, x), windows[:, 1:]).mean(axis=1)}

        self.parts = parallel.StageModel(functions.embed, functions.block, head)
        held_out = text.validation_rows(self.text.validation, self.config.block_size, config.validation_windows)
        self._mesh = device_data.data_mesh()
        self._evaluate = training.evaluator(per_window, held_out, prefix="validation_", mesh=self._mesh)

    def decoder(self, config: Any, vocab_size: int) -> models.GPTConfig:
        """The decoder's configuration."""
        return config.model(vocab_size)

    def functions(self) -> models.GPTStages:
        """Embedding, block and head."""
        return models.gpt_stages(self.config)

    def init(self, key: jax.Array) -> tuple[PyTree, list[PyTree], PyTree]:
        """Parameters of the embedding, of each block and of the head."""
        params = nnx.state(models.GPT(self.config, rngs=nnx.Rngs(key)), nnx.Param)
        return models.split_gpt_params(self.config, params)

    @functools.cached_property
    def message_bytes(self) -> float:
        """Of one token, across one boundary, forwards."""
        embed, tokens = (
            jax.eval_shape(self.init, jax.random.key(0))[0],
            jnp.zeros((1, self.config.block_size), jnp.int32),
        )
        message = jax.tree.leaves(jax.eval_shape(self.parts.embed, embed, tokens))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in message) / tokens.size

    def evaluate(self, params: tuple[PyTree, list[PyTree], PyTree]) -> dict[str, float]:
        """{"validation_loss": nats per token} of parameters on the host."""
        state = training.init_state(device_data.replicate(params, self._mesh), optax.identity(), key=jax.random.key(0))
        return self._evaluate(state)


class Runs:
    """All runs of one method at one P share one compiled program: the learning rate is an array in the state."""

    def __init__(self, config: Any, model: Model, method: str, P: int, folder: pathlib.Path):
        self.config, self.model, self.method, self.P, self.folder = config, model, method, P, folder
        self.synchronous = method in ("gpipe", "full_sync")
        self.per_update = MICROBATCHES if method == "gpipe" else 1

    def __call__(self, rate: float, seed: int) -> dict[str, Any]:
        case_dir = self.folder / f"P{self.P}-{self.method}-lr{rate:g}-seed{seed}"
        return cases.run_or_load(case_dir, functools.partial(self._run, rate, seed))

    @property
    def chunk(self) -> int:
        """Microbatches between two looks at the state."""
        return math.gcd(self.config.evaluate_every, self.config.checkpoint_every, self.config.steps)

    @functools.cached_property
    def pipe(self) -> parallel.pipelines.Pipeline:
        """The pipeline, from the shapes of the parameters and of a microbatch."""
        config, P = self.config, self.P
        try:
            mesh = parallel.make_mesh(P, config.replicas)
        except ValueError as error:
            raise ExperimentError(str(error)) from error
        stages = parallel.split_stages(jax.eval_shape(self.model.init, jax.random.key(0)), P)
        tokens = jax.ShapeDtypeStruct((config.batch_size, self.model.config.block_size), jnp.int32)
        optimizer = make_optimizer(config, self.method, P)
        if self.method == "gpipe":
            return parallel.synchronous_pipeline(
                self.model.parts,
                stages,
                optimizer,
                mesh,
                batch=(tokens, tokens),
                schedule="gpipe",
                num_microbatches=MICROBATCHES,
            )
        return parallel.asynchronous_pipeline(
            self.model.parts,
            stages,
            optimizer,
            mesh,
            batch=(tokens, tokens),
            stash=self.method in ("pipedream", "nesterov"),
            predict_backward=optimizers.no_stash.discrepancy_corrected if self.method == "pipemare" else None,
        )

    def _run(self, rate: float, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
        config, chunk = self.config, self.chunk
        state, history = self._start(rate, seed), []
        label = f"{self.method} P={self.P} lr={rate:g} seed={seed}"
        with contextlib.ExitStack() as at_end:
            checkpoints = at_end.enter_context(contextlib.closing(Checkpoints(case_dir)))
            if found := checkpoints.restore(state):
                state, history = found
            lines = at_end.enter_context(contextlib.closing(JsonLines(case_dir / "log.jsonl", history)))
            step = history[-1]["step"] if history else 0
            bar = at_end.enter_context(Progress(label, config.steps, step, config.batch_size))
            began = time.perf_counter() - (history[-1]["wall_s"] if history else 0.0)
            while step < config.steps:
                state, losses = self._advance(state, seed, step, step + chunk)
                step += chunk
                if not np.isfinite(losses).all():
                    print(f"diverged: {label}: a loss before microbatch {step} is not finite", flush=True)
                    return {"curve": []}
                record = {
                    "step": step,  # microbatches
                    "updates": step // self.per_update,
                    "tokens": step * config.batch_size * self.model.config.block_size,
                    "wall_s": round(time.perf_counter() - began, 3),
                    "loss": float(np.mean(losses)),
                }
                bar.update(step, record["loss"], step / record["wall_s"])
                if step % config.evaluate_every == 0 or step == config.steps:
                    record |= self.evaluate(state)
                    bar.evaluated(step, {name: record[name] for name in ("loss", "validation_loss")})
                history.append(record)
                lines(record)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    checkpoints.save(step, state, history)
        curve = [record for record in history if "validation_loss" in record]
        return {"curve": curve, "validation_loss": curve[-1]["validation_loss"], "loss": curve[-1]["loss"]}

    def evaluate(self, state: PyTree) -> dict[str, float]:
        """What is measured on the newest parameters."""
        return self.model.evaluate(parallel.join_stages(self.pipe.stages(state)))

    def _start(self, rate: float, seed: int) -> PyTree:
        """The state before the first microbatch: every method starts from the parameters of the seed."""
        init_key, _ = jax.random.split(jax.random.key(seed))
        params = jax.jit(self.model.init)(init_key)
        fresh = self.pipe.snapshot(self.pipe.init(parallel.split_stages(params, self.P)))
        counters = {
            name: np.full_like(value, rate) if name.endswith("step_size") else value
            for name, value in fresh.counters.items()
        }
        return self.pipe.restore(fresh._replace(counters=counters))

    def _advance(self, state: PyTree, seed: int, begin: int, end: int) -> tuple[PyTree, np.ndarray]:
        """Trains on microbatches begin..end - 1; their losses, as far as the last stage has them."""
        batch = microbatches(self.model.text.train, self.config, seed, begin, end)
        losses = []
        size = self.per_update if self.synchronous else end - begin
        for at in range(0, end - begin, size):
            part = tuple(array[at : at + size] for array in batch)
            vocabulary = self.model.config.vocab_size
            state, done = self.pipe.step(state, *parallel.shard_batch(self.pipe.layout.mesh, part, vocabulary))
            losses.append((done.loss, done.microbatch))
        found = [np.asarray(loss)[np.asarray(number) >= 0] for loss, number in losses]
        return state, np.concatenate(found)


def microbatches(tokens: np.ndarray, config: Config, seed: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of microbatches begin..end - 1, int32 [n, B, T]; seed and number place their windows."""
    block = config.model().block_size
    rows = []
    for m in range(begin, end):
        starts = np.random.default_rng((seed, m)).integers(len(tokens) - block, size=config.batch_size)
        rows.append(tokens[starts[:, None] + np.arange(block + 1)])
    windows = np.stack(rows).astype(np.int32)
    return windows[..., :-1], windows[..., 1:]


def make_optimizer(config: Config, method: str, P: int) -> Any:
    """What each stage updates itself with; a function of the stage's delay where the method distinguishes stages."""
    updates = config.steps // (MICROBATCHES if method == "gpipe" else 1)
    compression = PAPER_STEPS / updates
    anneal_steps = max(1, round(ANNEALED / compression))
    nadam = functools.partial(optimizers.nesterov.scale_by_nadam, momentum_decay=0.004 * compression)

    def chain(rule: optax.GradientTransformation, *last: optax.GradientTransformation) -> Any:
        return optax.chain(
            optax.clip_by_global_norm(config.clip),  # of the stage: it is applied to nothing else
            rule,
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_schedule(language_model.warmup_cosine(1.0, updates, warmup=config.warmup)),
            optax.inject_hyperparams(optax.scale)(step_size=1.0),
            optax.scale(-1.0),
            *last,
        )

    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    if method in ("gpipe", "pipedream"):
        return chain(adam)
    if method == "nesterov":
        return chain(nadam(b1=config.b1))
    slower = lambda delay: optimizers.no_stash.scale_by_delay(delay, anneal_steps)
    if method == "nesterov_no_stash":
        b1 = lambda delay: 0.9 + 0.09 * delay.astype(jnp.float32) / P
        return lambda delay: chain(nadam(b1=b1(delay)), slower(delay))
    return lambda delay: chain(adam, slower(delay), optimizers.no_stash.discrepancy_correction(delay))


def _figure(config: Config, chosen: dict[tuple[str, int], list[dict[str, Any]]], workdir: pathlib.Path) -> None:
    """Validation loss by updates and by tokens, a row for each number of stages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(config.methods, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(
        len(config.stages), 2, figsize=(9, 3.6 * len(config.stages)), layout="constrained", sharey=True, squeeze=False
    )
    for (method, P), results in chosen.items():
        curves = [result["curve"] for result in results if result["curve"]]
        for axis, name in zip(axes[config.stages.index(P)], ("updates", "tokens"), strict=True):
            if curves:
                loss = np.mean([[point["validation_loss"] for point in curve] for curve in curves], axis=0)
                axis.plot([point[name] for point in curves[0]], loss, color=colours[method], label=method)
            axis.set(title=f"P = {P}", xlabel=name, ylabel="validation loss (nats per token)")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="x-small")
    model = config.model()
    name = pathlib.Path(config.text).stem
    figure.suptitle(f"GPT of {model.layers} blocks of width {model.width} on {name}, {config.seeds} seed(s)")
    figure.savefig(workdir / "pipeline.png", dpi=130)
    plt.close(figure)
