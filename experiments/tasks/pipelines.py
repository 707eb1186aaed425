"""Next-token prediction by a pipeline over a mesh: options, the decoder in stages, its training and its checkpoints.

    task = pipelines.load(config)
    pipe = pipelines.build(task, num_stages=4, optimizer=pipelines.chain(config, optax.scale_by_adam()))
    curve = pipelines.fit(task, pipe, functools.partial(pipelines.evaluate, task, pipe), workdir, rate=1e-3, seed=0)

Every run of a seed starts from the same parameters and reads the same microbatches, whatever the pipeline. A run
resumes from its last checkpoint, on as many processes as the mesh has.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import device_data, loop, plots
from experiments._machinery.checkpoint import Checkpoints
from experiments._machinery.errors import ExperimentError
from experiments._machinery.log import JsonLines, Record
from experiments._machinery.options import Count, OneOf, Positive, Share
from experiments._machinery.progress import Progress
from experiments._machinery.records import Case, Outcome
from experiments.data import text
from experiments.tasks import language_modelling
from jaxlib_methods import models, optimizers, parallel
from jaxlib_methods.parallel.pipelines import Pipeline
from jaxlib_methods.parallel.pipelines.synchronous import SynchronousPipeline

PyTree = Any
Split = tuple[PyTree, list[PyTree], PyTree]  # parameters of the embedding, of each block and of the head
PAPER_STEPS = 50_000  # updates of Ajanthan et al. (ICML 2025), to which their schedules belong


@dataclasses.dataclass(frozen=True)
class Options(language_modelling.Options):
    """Options of every experiment with a pipeline."""

    preset: Annotated[str, OneOf(models.GPT_CONFIGS)] = "gpt_tiny"  # a name of jaxlib_methods.models.GPT_CONFIGS
    layers: Count | None = 8
    width: Count | None = 32
    heads: Count | None = 2
    block: Count | None = 64
    init_std: Positive | None = 0.1  # of the matrices: 0.02 at a width of 768, kept in proportion to width^-1/2
    steps: Count = 400  # microbatches; updates, if each makes one
    validation_windows: Count = 48
    evaluate_every: Count = 40
    checkpoint_every: Count = 200
    replicas: Count = 1  # pipelines side by side, which share a microbatch
    warmup: Share = 0.2  # share of the steps; the papers' are 0.06 to 0.1 of over a hundred times as many
    weight_decay: float = 0.01
    clip: Positive = 1.0  # norm of a stage's gradient

    def check_mesh(self, *num_stages: int) -> None:
        """Raises ValueError for stages that do not divide the blocks, or replicas that do not divide a microbatch."""
        layers = self.model().layers
        for P in num_stages:
            if layers % P:
                raise ValueError(f"stages must divide the {layers} blocks, got {P}; change --stages or --layers")
        if self.batch_size % self.replicas:
            raise ValueError(f"replicas must divide the batch size {self.batch_size}, got {self.replicas}")


class Network(NamedTuple):
    """A decoder as stages can hold it."""

    config: models.GPTConfig
    functions: models.GPTStages  # embedding, block and head
    init: Callable[[jax.Array], Split]  # key -> parameters


def dense(config: models.GPTConfig) -> Network:
    """The decoder as it is."""
    init = lambda key: models.split_gpt_params(config, nnx.state(models.GPT(config, rngs=nnx.Rngs(key)), nnx.Param))
    return Network(config, models.gpt_stages(config), init)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What all pipelines of the same options share."""

    options: Any
    config: models.GPTConfig
    text: text.Text
    model: parallel.StageModel
    init: Callable[[jax.Array], Split]  # key -> parameters
    evaluate: Callable[[Split], dict[str, float]]  # parameters on the host -> {"validation_loss": nats per token}

    @functools.cached_property
    def message_bytes(self) -> float:
        """Of one token, across one boundary, forwards."""
        tokens = jnp.zeros((1, self.config.block_size), jnp.int32)
        embed, _, _ = jax.eval_shape(self.init, jax.random.key(0))
        message = jax.tree.leaves(jax.eval_shape(self.model.embed, embed, tokens))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in message) / tokens.size


def load(options: language_modelling.Options, network: Callable[[models.GPTConfig], Network] = dense) -> Task:
    """Loads the text and puts the network together, which is made of the decoder's configuration."""
    loaded = text.load(
        options.text, validation=options.validation_text, tokenizer=options.tokenizer, data_dir=options.data_dir
    )
    config, functions, init = network(options.model(loaded.vocab_size))

    def head(params: PyTree, x: PyTree, targets: jax.Array) -> jax.Array:
        return language_modelling.cross_entropy(functions.head(params, x), targets).mean()

    def per_window(params: Split, model_state: PyTree, windows: jax.Array) -> dict[str, jax.Array]:
        del model_state
        embed, blocks, of_head = params
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        x = functions.embed(embed, windows[:, :-1])
        x, _ = jax.lax.scan(lambda x, block: (functions.block(block, x), None), x, stacked)
        return {"loss": language_modelling.cross_entropy(functions.head(of_head, x), windows[:, 1:]).mean(axis=1)}

    held_out = text.validation_rows(loaded.validation, config.block_size, options.validation_windows)
    mesh = device_data.data_mesh()
    on_held_out = loop.evaluator(per_window, held_out, prefix="validation_", mesh=mesh)

    def evaluate(params: Split) -> dict[str, float]:
        state = loop.init_state(device_data.replicate(params, mesh), optax.identity(), key=jax.random.key(0))
        return on_held_out(state)

    return Task(options, config, loaded, parallel.StageModel(functions.embed, functions.block, head), init, evaluate)


def chain(
    options: Options,
    rule: optax.GradientTransformation,
    *last: optax.GradientTransformation,
    updates: int | None = None,
    decays: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """A rule with clipping, weight decay where `decays` says and a schedule; the learning rate is in the state."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip),  # of the stage: it is applied to nothing else
        rule,
        optax.add_decayed_weights(options.weight_decay, decays),
        optax.scale_by_schedule(language_modelling.warmup_cosine(1.0, updates or options.steps, warmup=options.warmup)),
        optax.inject_hyperparams(optax.scale)(step_size=1.0),
        optax.scale(-1.0),
        *last,
    )


def nadam(updates: int, b1: Any) -> optax.GradientTransformation:
    """NAdam for asynchronous pipelines, its momentum schedule compressed to the length of the run."""
    return optimizers.nesterov.scale_by_nadam(b1=b1, momentum_decay=0.004 * PAPER_STEPS / updates)


def ema_weight(steps: int) -> optax.Schedule:
    """lambda of AsyncMesh's EMA rule, the paper's 1,000 rounds of 30,000 at 0.5 in proportion to the run."""
    warmup = max(1, round(1_000 * steps / 30_000))
    return parallel.replicas.ema_weight_schedule(max(steps, warmup + 2), warmup_rounds=warmup)


def build(
    task: Task,
    num_stages: int,
    optimizer: Any,
    *,
    num_microbatches: int | None = None,
    model: parallel.StageModel | None = None,
    **hooks: Any,
) -> Pipeline:
    """A pipeline on a mesh of this experiment's devices: GPipe with so many microbatches an update, or asynchronous."""
    try:
        mesh = parallel.make_mesh(num_stages, task.options.replicas)
    except ValueError as error:
        raise ExperimentError(str(error)) from error
    stages = parallel.split_stages(jax.eval_shape(task.init, jax.random.key(0)), num_stages)
    tokens = jax.ShapeDtypeStruct((task.options.batch_size, task.config.block_size), jnp.int32)
    of_all, hooks = (model or task.model, stages, optimizer, mesh), hooks | {"batch": (tokens, tokens)}
    if num_microbatches is None:
        return parallel.asynchronous_pipeline(*of_all, **hooks)
    return parallel.synchronous_pipeline(*of_all, num_microbatches=num_microbatches, schedule="gpipe", **hooks)


def evaluate(task: Task, pipe: Pipeline, state: PyTree) -> dict[str, float]:
    """Validation loss at the newest parameters."""
    return task.evaluate(parallel.join_stages(pipe.stages(state)))


def evaluate_mean(task: Task, pipe: Pipeline, state: PyTree) -> dict[str, float]:
    """Validation loss of the replicas' mean, and their root mean square distance from it relative to its norm."""
    layout, packed = pipe.layout, pipe.current(state)[0]
    replicas = [parallel.join_stages(layout.rows(layout.params, packed, r)) for r in range(layout.num_replicas)]
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *replicas)
    norm = lambda tree: math.sqrt(sum(float(np.square(leaf, dtype=np.float64).sum()) for leaf in jax.tree.leaves(tree)))
    away = [norm(jax.tree.map(np.subtract, replica, mean)) for replica in replicas]
    return task.evaluate(mean) | {"spread": math.sqrt(np.mean(np.square(away))) / norm(mean)}


def start(task: Task, pipe: Pipeline, rate: float, seed: int) -> PyTree:
    """The state before the first microbatch."""
    init_key, _ = jax.random.split(jax.random.key(seed))
    params = jax.jit(task.init)(init_key)
    fresh = pipe.snapshot(pipe.init(parallel.split_stages(params, pipe.layout.num_stages)))
    counters = {
        name: np.full_like(value, rate) if name.endswith("step_size") else value
        for name, value in fresh.counters.items()
    }
    return pipe.restore(fresh._replace(counters=counters))


def microbatches(task: Task, seed: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of microbatches begin..end - 1, int32 [n, B, T]; seed and number place their windows."""
    tokens, block, rows = task.text.train, task.config.block_size, []
    for m in range(begin, end):
        starts = np.random.default_rng((seed, m)).integers(len(tokens) - block, size=task.options.batch_size)
        rows.append(tokens[starts[:, None] + np.arange(block + 1)])
    windows = np.stack(rows).astype(np.int32)
    return windows[..., :-1], windows[..., 1:]


def advance(task: Task, pipe: Pipeline, state: PyTree, seed: int, begin: int, end: int) -> tuple[PyTree, np.ndarray]:
    """Trains on microbatches begin..end - 1; their losses, as far as the last stage has them."""
    batch, losses = microbatches(task, seed, begin, end), []
    size = pipe.num_microbatches if isinstance(pipe, SynchronousPipeline) else end - begin
    for at in range(0, end - begin, size):
        part = tuple(array[at : at + size] for array in batch)
        state, done = pipe.step(state, *parallel.shard_batch(pipe.layout.mesh, part, task.config.vocab_size))
        losses.append(finished_losses(done))
    return state, np.concatenate(losses)


def finished_losses(done: Any) -> np.ndarray:
    """Those of the microbatches that the last stage has finished."""
    return np.asarray(done.loss)[np.asarray(done.microbatch) >= 0]


def fit(
    task: Task,
    pipe: Pipeline,
    evaluate: Callable[[PyTree], dict[str, float]],
    workdir: pathlib.Path,
    *,
    rate: float,
    seed: int,
    advance: Callable[..., tuple[PyTree, np.ndarray]] = advance,
    pause: int = 0,
) -> list[Record]:
    """Trains for the options' steps, resuming what lies in the workdir, and returns the points of evaluation.

    Args:
      task, pipe: what is trained.
      evaluate: state -> {name: number}, every `evaluate_every` microbatches and at the end.
      workdir: of the case, for its checkpoints and `log.jsonl`.
      rate: the learning rate.
      seed: of parameters and microbatches.
      advance: in place of the function of that name.
      pause: `advance` never runs across a multiple of so many microbatches; 0: as far as the evaluations let it.

    Returns:
      Records with "step" (microbatches), "updates", "tokens", "wall_s", "loss" and what was evaluated; none if a loss
      was not finite.
    """
    options = task.options
    chunk = math.gcd(options.evaluate_every, options.checkpoint_every, options.steps, pause)
    per_update = pipe.num_microbatches if isinstance(pipe, SynchronousPipeline) else 1
    state, history, label = start(task, pipe, rate, seed), [], f"{workdir.name} lr={rate:g}"
    with contextlib.ExitStack() as at_end:
        checkpoints = at_end.enter_context(contextlib.closing(Checkpoints(workdir)))
        if found := checkpoints.restore(state):
            state, history = found
        lines = at_end.enter_context(contextlib.closing(JsonLines(workdir / "log.jsonl", history)))
        step = history[-1]["step"] if history else 0
        bar = at_end.enter_context(Progress(label, options.steps, step, options.batch_size))
        began = time.perf_counter() - (history[-1]["wall_s"] if history else 0.0)
        while step < options.steps:
            state, losses = advance(task, pipe, state, seed, step, step + chunk)
            step += chunk
            if not np.isfinite(losses).all():
                print(f"diverged: {label}: a loss before microbatch {step} is not finite", flush=True)
                return []
            record = {
                "step": step,
                "updates": step // per_update,
                "tokens": step * options.batch_size * task.config.block_size,
                "wall_s": round(time.perf_counter() - began, 3),
                "loss": float(np.mean(losses)),
            }
            bar.update(step, record["loss"], step / record["wall_s"])
            if step % options.evaluate_every == 0 or step == options.steps:
                record |= evaluate(state)
                bar.evaluated(step, {name: record[name] for name in ("loss", "validation_loss")})
            history.append(record)
            lines(record)
            if step % options.checkpoint_every == 0 or step == options.steps:
                checkpoints.save(step, state, history)
    return [record for record in history if "validation_loss" in record]


def outcome(curve: list[Record], *names: str, **metrics: float) -> Outcome:
    """The last values of a curve by name, whether there is one, and further metrics."""
    last = {name: curve[-1][name] for name in names if curve and name in curve[-1]}
    return Outcome({"diverged": float(not curve)} | last | metrics, curve)


def losses_and_spreads(cases: list[Case]) -> plots.Figure:
    """Validation loss of the replicas' mean and their spread by updates, of each row."""
    shown = {"validation_loss": "validation loss of the mean (nats per token)", "spread": "spread"}
    return plots.curves(cases, "updates", shown, yscale="log")
