"""Language models trained with the stale gradients of asynchronous pipelines: does discounted Nesterov survive them?

Paper: Ajanthan, Ramasinghe, Zuo, Avraham, Long, "Nesterov Method for Asynchronous Pipeline Parallel Optimization", ICML
2025

    python -m experiments run staleness                                        # embedded text, 16 thin blocks: 2 cores
    python -m experiments run staleness --text tiny_shakespeare --data-dir DIR
    python -m experiments run staleness --text huggingface:wikitext/wikitext-103-raw-v1 --preset asyncpp --layers None \
        --width None --heads None --block None --dtype bfloat16 --init-std 0.02 --warmup 0.06 \
        --batch-size 8 --stages 1 8 --steps 50000 --evaluate-every 1000 --learning-rates 3e-4         # 134M: a GPU

The pipeline is simulated exactly on one device: update m takes the full gradient at {w_j^(max(m - tau_j, 0))}_j with
tau_j = P - j for stage j of P, clips each stage by its own norm and changes the newest weights. The first stage holds
the embedding and the first blocks, the last one the last blocks, the final norm and the head. The parameters of a stage
are one vector and the blocks are scanned, so that what XLA has to compile does not grow with the depth.

Methods: adamw (PipeDream); nadam (ours: b1 = 0.99, discounted gradient); no_discount (NAdam whose direction takes the
gradient whole); no_discount_eq10 (no factor 1 - gamma anywhere, as eq. 10 without it); lr_correction, compensation,
forecast (AdamW with a correction); gpipe (synchronous AdamW, four microbatches per update, the same data). P = 1 is
synchronous. Each method and P picks its learning rate by the validation loss of the first seed. A run whose loss is not
finite counts as diverged and has no other numbers.

The schedule of NAdam's momentum and the annealing of the learning-rate correction are the paper's, compressed from
50,000 steps to the length of the run.
Figures: validation loss by step for each P and final loss by P; how the change over the delay lines up with the step
before it, and how far apart the newest and the stale weights are.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments._machinery import loop, plots
from experiments._machinery.errors import NonFiniteLossError
from experiments._machinery.options import Count, OneOf, Positive, Share
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import language_modelling
from experiments.tasks.staged_decoder import StagedDecoder, measure_staleness, stage_name
from jaxlib_methods import models, optimizers, trees

PyTree = Any
Method = Literal[
    "adamw", "nadam", "no_discount", "no_discount_eq10", "lr_correction", "compensation", "forecast", "gpipe"
]
PAPER_STEPS = 50_000
MICROBATCHES = 4  # of GPipe
SYNCHRONOUS = ("adamw", "nadam", "gpipe")  # what runs at P = 1


@dataclasses.dataclass(frozen=True)
class Config(language_modelling.Options):
    """Every combination of P, method, learning rate and seed is one case; each is resumable."""

    preset: Annotated[str, OneOf(models.GPT_CONFIGS)] = "gpt_tiny"  # a name of jaxlib_methods.models.GPT_CONFIGS
    layers: Count | None = 16
    width: Count | None = 32
    heads: Count | None = 2
    block: Count | None = 64
    init_std: Positive | None = 0.1  # of the matrices: 0.02 at the paper's width of 768, in proportion to width^-1/2
    batch_size: Count = 4  # windows of a microbatch
    steps: Count = 800  # microbatches; updates, but for gpipe
    validation_windows: Count = 48
    evaluate_every: Count = 100
    stages: tuple[Count, ...] = (1, 4, 8, 16)  # P
    methods: tuple[Method, ...] = ("adamw", "nadam", "no_discount", "lr_correction", "gpipe")
    learning_rates: tuple[Positive, ...] = (3e-4, 1e-3, 3e-3, 1e-2)  # the first seed tries all of them
    warmup: Share = 0.2  # share of the steps; the paper's is 0.06 of fifty times as many
    b1: float = 0.99  # of the methods with NAdam
    weight_decay: float = 0.01
    clip: Positive = 10.0  # norm of a stage's gradient

    def __post_init__(self):
        super().__post_init__()
        if max(self.stages) > (blocks := self.model().layers):
            raise ValueError(f"stages must be at most the number of blocks, {blocks}, got {self.stages}")


SMOKE: dict[str, Any] = {
    "layers": 3, "width": 8, "block": 16, "steps": 12, "seeds": 1, "stages": (1, 3), "methods": ("nadam", "gpipe"),
    "learning_rates": (1e-2,), "validation_windows": 8, "evaluate_every": 6,
}  # fmt: skip
SHOWN = ("validation_loss", "learning_rate", "alignment", "gap")
TUNED_BY = "validation_loss"


class Row(NamedTuple):
    num_stages: int
    method: Method


def targets(config: Config) -> Targets:
    """None: the paper's perplexities are of another model and text."""
    del config
    return {}


def variants(config: Config) -> dict[str, Row]:
    """At P = 1 what is synchronous, else what is not."""
    rows = [Row(P, method) for P in config.stages for method in config.methods]
    runs = [row for row in rows if (row.method in SYNCHRONOUS if row.num_stages == 1 else row.method != "gpipe")]
    return {f"{row.method} P={row.num_stages}": row for row in runs}


def candidates(config: Config, name: str, chosen: dict[str, float]) -> tuple[float, ...]:
    """Learning rates, the same ones for every row."""
    del name, chosen
    return config.learning_rates


def load(config: Config) -> language_modelling.Task:
    return language_modelling.load(config)


stage_decoder = functools.lru_cache(maxsize=1)(StagedDecoder)  # the methods of the same P follow one another


class Compiled(NamedTuple):
    """What all learning rates and seeds of a row share: the learning rate is an array in the state."""

    decoder: StagedDecoder
    optimizer: optax.GradientTransformation
    evaluate: Callable[[loop.TrainState], dict[str, float]]


@functools.lru_cache(maxsize=1)
def compile_row(task: language_modelling.Task, row: Row) -> Compiled:
    """What trains a row."""
    decoder = stage_decoder(task, row.num_stages)

    def evaluate(state: loop.TrainState) -> dict[str, float]:
        measured = task.evaluate(state._replace(params=decoder.join(state.params)))
        histories = trees.find_states(state.opt_state, optimizers.delays.ParamHistoryState)
        if histories and row.num_stages > 2:
            measured |= measure_staleness(histories[0], state.params)
        return measured

    return Compiled(decoder, make_optimizer(task.options, row.method, row.num_stages), evaluate)


def run(task: language_modelling.Task, row: Row, seed: int, workdir: pathlib.Path, rate: float) -> Outcome:
    """The last losses and diagnostics, and the evaluations."""
    config, (decoder, optimizer, evaluate) = task.options, compile_row(task, row)
    init_key, train_key = jax.random.split(jax.random.key(seed))  # as task.start: every method starts alike
    state = loop.init_state(decoder.split(task.init(init_key)), optimizer, key=train_key)
    state = state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, step_size=jnp.float32(rate)))
    try:
        _, history = task.fit(
            optimizer,
            seed,
            workdir,
            label=f"{row.method} P={row.num_stages} lr={rate:g} seed={seed}",
            state=state,
            evaluate=evaluate,
            loss_fn=decoder.loss_fn,
            gradient_at=None if row.num_stages == 1 else optimizers.delays.stale_params,
            steps_per_call=min(50, config.evaluate_every),
            checkpoint_every=max(500, config.steps // 10),
        )
    except NonFiniteLossError as error:
        print(f"diverged: {error}", flush=True)
        return Outcome({"learning_rate": rate, "diverged": 1.0})
    curve = [record for record in history if "validation_loss" in record]
    last = {name: curve[-1][name] for name in ("validation_loss", "alignment", "gap") if name in curve[-1]}
    return Outcome({"learning_rate": rate, "diverged": 0.0, **last}, curve)


def make_optimizer(config: Config, method: str, P: int) -> optax.GradientTransformation:
    """History of the weights, clipping of each stage, the rule, weight decay, the learning rate and its correction."""
    stages = [(stage_name(stage), stage) for stage in range(P)]
    tau = [(stage_name(stage), delay) for stage, delay in enumerate(optimizers.delays.pipeline_delays(P))]
    updates = config.steps // MICROBATCHES if method == "gpipe" else config.steps
    compression = PAPER_STEPS / updates
    nadam = functools.partial(optimizers.nesterov.scale_by_nadam, b1=config.b1, momentum_decay=0.004 * compression)
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "nadam": nadam,
        "no_discount": functools.partial(nadam, discount="momentum"),
        "no_discount_eq10": functools.partial(nadam, discount="none"),
    }
    adam = functools.partial(optax.scale_by_adam, b1=0.9, b2=0.999, eps=1e-8)
    keep = {"compensation": optimizers.delay_corrections.delay_compensation}.get(
        method, optimizers.delays.keep_param_history
    )
    links = [keep(tau)] if P > 1 else []
    if method == "forecast":
        links.append(optimizers.delay_corrections.forecast_gradients(tau))
    links += [
        optimizers.delays.clip_by_group_norm(config.clip, stages),
        rules.get(method, adam)(),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_schedule(language_modelling.warmup_cosine(1.0, updates, warmup=config.warmup)),
        optax.inject_hyperparams(optax.scale)(step_size=1.0),
        optax.scale(-1.0),
    ]
    if method == "lr_correction":
        links.append(optimizers.no_stash.scale_by_delay(tau, anneal_steps=round(7000 / compression)))
    chain = optax.chain(*links)
    return optax.MultiSteps(chain, MICROBATCHES).gradient_transformation() if method == "gpipe" else chain


def figures(task: language_modelling.Task, cases: list[Case]) -> dict[str, Any]:
    """Loss by step for each P beside the synchronous runs, final loss by P, and diagnostics of the largest P."""
    stages = [P for P in task.options.stages if P > 1] or [1]
    beside = [
        case._replace(variant=Row(P, f"{case.variant.method}, synchronous"))
        for case in cases
        if case.variant.num_stages == 1
        for P in stages
    ]
    loss = {"validation_loss": "validation loss (nats per token)"}
    of_text = f"{task.config.layers} blocks of width {task.config.width} on {pathlib.Path(task.options.text).stem}"
    title = f"GPT of {of_text}, {task.options.seeds} seed(s)"
    method_of = lambda case: case.variant.method
    found = {
        "staleness": plots.curves(
            [case for case in cases if case.variant.num_stages > 1] + beside,
            "step",
            loss,
            label=method_of,
            panel=lambda case: f"P = {case.variant.num_stages}",
            title=title,
            xlabel="microbatch",
        ),
        "final_loss": plots.over(
            cases,
            lambda case: case.variant.num_stages,
            loss,
            label=method_of,
            title=title,
            xlabel="stages P",
        ),
    }
    measured = [case for case in cases if case.variant.num_stages == max(stages) and "alignment" in case.metrics]
    if measured:
        diagnostics = {
            "alignment": "cosine of a step and the change that follows",
            "gap": "RMS of newest minus stale weights, first stage",
        }
        of_largest = f"P = {max(stages)}"
        figure = plots.curves(measured, "step", diagnostics, label=method_of, title=of_largest, xlabel="microbatch")
        figure.axes[1].set_yscale("log")
        found["alignment"] = figure
    return found
