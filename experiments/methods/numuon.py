"""Train a language model with AdamW, Muon and NuMuon, then take parameters away: which one loses least?

Paper: Dolatabadi et al., "NuMuon: Nuclear-Norm-Constrained Muon for Compressible LLM Training", 2026

    python -m experiments run numuon                                           # 0.86M parameters, for 2 cores
    python -m experiments run numuon --text tiny_shakespeare --data-dir DIR
    python -m experiments run numuon --text train.npy --validation-text validation.npy --preset gpt2_small \
        --width None --block None --dtype bfloat16 --batch-size 64 --steps 20000 --tune-steps 2000   # 124M: for a GPU

All three get the same parameters, batches, steps and schedule (linear warm-up, cosine to a tenth). They differ in the
step of the hidden matrices: AdamW; Newton-Schulz of the Nesterov momentum (optax.contrib.muon); the top dyads of the
momentum, their share falling from `rank_start` to `rank_end` along a cosine (NuMuon, no Nesterov). Both Muons scale by
0.2 sqrt(max(m, n)), so that one learning rate serves the matrices and the AdamW of everything else; weight decay acts
on the hidden matrices alone. The learning rate of each optimizer is the best of one grid, by validation loss of a
shorter run from a seed that is not among those reported.

Then the matrices of the blocks are replaced by low-rank products: plain SVD, ASVD (activations to the power 1/2, one
rank for all) and SVD-LLM, each keeping rank floor(m n keep / (m + n)). "at equal loss" compares the optimizers where
their uncompressed losses are the same: SVD-LLM is also measured during training, and the curve of the optimizer that
ends lower is read off where it passes the other's final loss.
Figures: loss curves; loss against the share removed; stable rank by type of layer; compressed against full loss.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments._machinery import cases as case_folders, loop, plots
from experiments._machinery.errors import NonFiniteLossError
from experiments._machinery.options import Count, Positive, Range
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import compression, language_modelling
from experiments.tasks.compression import MATRICES
from jaxlib_methods import low_rank, optimizers, trees

PyTree = Any
Optimizer = Literal["adamw", "muon", "numuon", "muon_without_nesterov"]
Removed = Annotated[float, Range(0, 1, closed="left", remedy="0.4 removes 40 of 100")]
DyadShare = Annotated[float, Range(0, 1, closed="right")]

RMS = 0.2  # of an update, relative to the learning rate: AdamW's usual one


@dataclasses.dataclass(frozen=True)
class Config(language_modelling.Options):
    """Every combination of optimizer and seed is one case, after one case for each optimizer and learning rate."""

    width: Count | None = 128
    block: Count | None = 64
    steps: Count = 600
    evaluate_every: Count = 150
    optimizers: tuple[Optimizer, ...] = ("adamw", "muon", "numuon")
    learning_rates: tuple[Positive, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # the grid; with one value nothing is tuned
    tune_steps: Count = 150
    weight_decay: float = 0.1
    rank_start: DyadShare = 1.0  # NuMuon's share of the dyads in a step
    rank_end: DyadShare = 0.25
    methods: tuple[compression.Method, ...] = ("svd", "asvd", "svd_llm")
    removed: tuple[Removed, ...] = (0.2, 0.4, 0.6, 0.8)  # shares of the parameters of every hidden matrix
    calibration_windows: Count = 256  # of the training text, for ASVD and SVD-LLM
    watched: Removed = 0.6  # share removed with SVD-LLM during training

    def __post_init__(self):
        super().__post_init__()
        if self.rank_end > self.rank_start:
            raise ValueError(f"rank_end must be at most rank_start, {self.rank_start}, got {self.rank_end}")


SMOKE: dict[str, Any] = {
    "layers": 1, "width": 32, "block": 32, "batch_size": 8, "steps": 20, "tune_steps": 5, "evaluate_every": 10,
    "seeds": 1, "validation_windows": 16, "calibration_windows": 16, "learning_rates": (3e-3, 1e-2),
}  # fmt: skip
SHOWN = (
    "validation_loss", "loss svd_llm -20%", "loss svd_llm -40%", "loss svd_llm -60%", "loss svd_llm -80%",
    "loss svd -40%", "loss svd -60%", "stable_rank query", "stable_rank gate",
)  # fmt: skip


def targets(config: Config) -> Targets:
    """None: no table entry of the paper is confirmed; its claim is the order of the optimizers."""
    del config
    return {}


def variants(config: Config) -> dict[str, Optimizer]:
    return {name: name for name in config.optimizers}


class Study(NamedTuple):
    config: Config
    task: language_modelling.Task
    compression: compression.Compression

    def fit(self, name: Optimizer, rate: float, seed: int, workdir: pathlib.Path, *, label: str, **changes: Any) -> Any:
        """The final state and the history of one training."""
        optimizer = make_optimizer(name, self.config, changes.get("steps") or self.config.steps)
        state = self.task.start(optimizer, seed)
        state = state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, step_size=jnp.float32(rate)))
        return self.task.fit(optimizer, seed, workdir, label=label, state=state, **changes)

    def tune(self, name: Optimizer, folder: pathlib.Path) -> float:
        """The learning rate with the lowest validation loss after a short run of an unreported seed.

        The grid is walked from its middle: a rate is taken when both its neighbours are worse. Finished runs are read
        back from the folder.
        """
        seed, rates = self.config.seeds, sorted(self.config.learning_rates)
        if len(rates) == 1:
            return rates[0]

        def final_loss(rate: float, workdir: pathlib.Path) -> dict[str, Any]:
            label = f"{name} at {rate:g}"
            try:
                _, history = self.fit(name, rate, seed, workdir, label=label, steps=self.config.tune_steps)
            except NonFiniteLossError:
                return {"validation_loss": None}
            return {"validation_loss": history[-1]["validation_loss"]}

        losses: dict[float, float] = {}
        best = None
        while best != (nearest := min(losses, key=losses.get, default=rates[len(rates) // 2])):
            best = nearest
            at = rates.index(best)
            for rate in rates[max(0, at - 1) : at + 2]:
                if rate not in losses:
                    measure = functools.partial(final_loss, rate)
                    found = case_folders.run_or_load(folder / f"tune-{name}-{rate:g}", measure)["validation_loss"]
                    losses[rate] = math.inf if found is None else found
        return best


def load(config: Config) -> Study:
    task = language_modelling.load(config)
    return Study(config, task, compression.Compression(task, config.calibration_windows))


def run(study: Study, name: Optimizer, seed: int, workdir: pathlib.Path) -> Outcome:
    """Losses of one model, losses after compression, ranks."""
    config, task = study.config, study.task
    statistics, loss = study.compression.statistics, study.compression.loss
    rate = study.tune(name, workdir.parent)

    def evaluate(state: loop.TrainState) -> dict[str, float]:
        watched = loss(state, "svd_llm", config.watched, statistics(state.params))
        return task.evaluate(state) | {"watched": watched}

    state, history = study.fit(name, rate, seed, workdir, label=f"{name} seed {seed}", evaluate=evaluate)
    given = statistics(state.params)
    pairs = itertools.product(config.methods, config.removed)
    losses = {f"loss {method} -{100 * share:g}%": loss(state, method, share, given) for method, share in pairs}
    stable = compression.rank_by_type(state.params, low_rank.stable_rank)
    effective = compression.rank_by_type(state.params, low_rank.effective_rank)
    metrics = {"validation_loss": history[-1]["validation_loss"], "learning_rate": rate, **losses}
    metrics |= {f"stable_rank {kind}": value for kind, value in stable.items()}
    return Outcome(metrics, history, {"stable rank": stable, "effective rank": effective})


def compare(study: Study, cases: list[Case]) -> list[tuple[str, int, dict[str, float]]]:
    """Muon's and NuMuon's losses after compression where their uncompressed losses are the same."""
    watched = lambda case: [(point["validation_loss"], point["watched"]) for point in case.curve if "watched" in point]
    curves = {(case.name, case.seed): watched(case) for case in cases}
    found = []
    for seed in sorted({seed for name, seed in curves if name == "numuon" and ("muon", seed) in curves}):
        loss, *compressed = compression.at_equal_loss(curves["muon", seed], curves["numuon", seed])
        label = f"loss svd_llm -{100 * study.config.watched:g}% at equal loss"
        for name, value in zip(("muon", "numuon"), compressed, strict=True):
            found.append((name, seed, {"equal loss": loss, label: value}))
    return found


@functools.lru_cache(maxsize=8)  # the same object for every seed, so that the training step is compiled once
def make_optimizer(name: str, config: Config, steps: int) -> optax.GradientTransformation:
    """One of the optimizers at learning rate 1, times the `step_size` in its state: all rates share one program."""
    schedule = language_modelling.warmup_cosine(1.0, steps)
    adam = {"b1": 0.9, "b2": 0.95}
    hidden = lambda params: trees.mask_tree(params, MATRICES)
    if name == "adamw":
        rule = optax.adamw(schedule, weight_decay=config.weight_decay, mask=hidden, **adam)
    elif name == "numuon":
        buckets = (config.rank_end, *(r for r in (0.375, 0.5, 0.75, 1.0) if r > config.rank_end))
        rule = optimizers.numuon(
            schedule,
            optimizers.schedules.cosine_rank_schedule(steps, config.rank_start, config.rank_end),
            weight_decay=config.weight_decay,
            key=jax.random.key(0),
            adam=optimizers.muon.AdamConfig(**adam),
            shape_scaling=RMS,
            decomposition=optimizers.BlockKrylovConfig(rank_buckets=buckets),
        )
    else:
        # optax.contrib.muon would give its own AdamW Nesterov momentum; here all three share one AdamW.
        muon = optax.contrib.muon(
            schedule, weight_decay=config.weight_decay, consistent_rms=RMS, nesterov=name == "muon"
        )
        labels = lambda params: trees.label_tree(params, [(MATRICES, "hidden")], default="others")
        rule = optax.partition({"hidden": muon, "others": optax.adamw(schedule, weight_decay=0.0, **adam)}, labels)
    return optax.chain(rule, optax.inject_hyperparams(optax.scale)(step_size=1.0))


def figures(study: Study, cases: list[Case]) -> dict[str, Any]:
    """Loss curves; loss against the share removed; ranks by type of layer; compressed against full loss."""
    config, task = study.config, study.task
    size = language_modelling.parameter_count(jax.eval_shape(task.init, jax.random.key(0)))
    name = f"{size / 1e6:.2f}M parameters ({config.preset}) on {pathlib.Path(config.text).stem}"
    title = f"{name}, {config.steps:,} steps, {config.seeds} seeds"
    removals = [
        case._replace(
            variant=100 * share,
            metrics={
                method: case.metrics[f"loss {method} -{100 * share:g}%" if share else "validation_loss"]
                for method in config.methods
            },
        )
        for case in cases
        for share in (0, *config.removed)
    ]
    ranks = [
        case._replace(variant=kind, metrics={name: of_kinds[kind] for name, of_kinds in case.details.items()})
        for case in cases
        for kind in case.details["stable rank"]
    ]
    variable, name_of = lambda case: case.variant, lambda case: case.name
    return {
        "training": plots.curves(
            cases, "step", {"loss": "training loss", "validation_loss": "validation loss"}, title=title
        ),
        "loss_vs_removed": plots.over(
            removals,
            variable,
            {method: f"validation loss after {method}" for method in config.methods},
            label=name_of,
            title=title,
            xlabel="parameters removed from the blocks (%)",
        ),
        "rank_by_type": plots.over(
            ranks, variable, {name: name for name in cases[0].details}, label=name_of, title=title
        ),
        "compressed_vs_full": plots.curves(
            cases,
            "validation_loss",
            {"watched": f"after SVD-LLM removed {100 * config.watched:g}%"},
            label=lambda case: f"{case.name} seed {case.seed}",
            title=title,
            xlabel="validation loss",
        ),
    }
