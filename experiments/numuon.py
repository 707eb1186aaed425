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
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._machinery import cases, loop as training
from experiments._machinery.errors import NonFiniteLossError
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import low_rank, optimizers, trees

PyTree = Any
Optimizer = Literal["adamw", "muon", "numuon", "muon_without_nesterov"]
Method = Literal["svd", "asvd", "svd_llm"]

MATRICES = "^blocks/.*kernel$"
RMS = 0.2  # of an update, relative to the learning rate: AdamW's usual one


@dataclasses.dataclass(frozen=True)
class Config(language_model.Options):
    """Every combination of optimizer and seed is one case, after one case for each optimizer and learning rate."""

    width: int | None = 128
    block: int | None = 64
    steps: int = 600
    evaluate_every: int = 150
    optimizers: tuple[Optimizer, ...] = ("adamw", "muon", "numuon")
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # the grid; with one value nothing is tuned
    tune_steps: int = 150
    weight_decay: float = 0.1
    rank_start: float = 1.0  # NuMuon's share of the dyads in a step
    rank_end: float = 0.25
    methods: tuple[Method, ...] = ("svd", "asvd", "svd_llm")
    removed: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)  # shares of the parameters of every hidden matrix
    calibration_windows: int = 256  # of the training text, for ASVD and SVD-LLM
    watched: float = 0.6  # share removed with SVD-LLM during training

    def __post_init__(self):
        super().__post_init__()
        for name in ("optimizers", "learning_rates", "methods", "removed"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        for name in ("tune_steps", "calibration_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for value in (*self.removed, self.watched):
            if not 0 <= value < 1:
                raise ValueError(f"removed and watched must lie in [0, 1), got {value}; 0.4 removes 40 of 100")
        if min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}")
        if not 0 < self.rank_end <= self.rank_start <= 1:
            raise ValueError(f"ranks must fall within (0, 1], got {self.rank_start} to {self.rank_end}")


SMOKE = {
    "layers": 1, "width": 32, "block": 32, "batch_size": 8, "steps": 20, "tune_steps": 5, "evaluate_every": 10,
    "seeds": 1, "validation_windows": 16, "calibration_windows": 16, "learning_rates": (3e-3, 1e-2),
}  # fmt: skip
PAPER: dict[str, float] = {}  # no table entry of the paper is confirmed; its claim is the order of the optimizers


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Tunes, trains and compresses; returns losses and ranks, one per seed, and draws the figures."""
    study = _Study(config, language_model.load(config))
    rates = {name: study.tune(name, workdir / "cases") for name in config.optimizers}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in config.optimizers}
    for seed in range(config.seeds):
        for name, rate in rates.items():
            case = functools.partial(study.run_case, name, rate, seed)
            results[name].append(cases.run_or_load(workdir / "cases" / f"{name}-seed{seed}", case))
    if jax.process_index() == 0:
        _figures(config, study.task, results, workdir)
    return _metrics(config, results)


class _Study(NamedTuple):
    config: Config
    task: language_model.Task

    def tune(self, name: str, folder: pathlib.Path) -> float:
        """The learning rate with the lowest validation loss after a short run of an unreported seed.

        The grid is walked from its middle: a rate is taken when both its neighbours are worse.
        """
        config = self.config
        rates = sorted(config.learning_rates)
        if len(rates) == 1:
            return rates[0]
        optimizer = make_optimizer(name, config, config.tune_steps)

        def final_loss(learning_rate: float, case_dir: pathlib.Path) -> dict[str, Any]:
            state = with_learning_rate(self.task.start(optimizer, config.seeds), learning_rate)
            label = f"{name} at {learning_rate:g}"
            try:
                _, history = self.task.fit(
                    optimizer, config.seeds, case_dir, label=label, steps=config.tune_steps, state=state
                )
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
                    case = functools.partial(final_loss, rate)
                    loss = cases.run_or_load(folder / f"tune-{name}-{rate:g}", case)["validation_loss"]
                    losses[rate] = np.inf if loss is None else loss
        return best

    def run_case(self, name: str, learning_rate: float, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
        """Trains one model and measures it: losses, losses after compression, ranks."""
        config, task = self.config, self.task
        optimizer = _optimizer_of(name, config)

        def evaluate(state: training.TrainState) -> dict[str, float]:
            statistics = self.statistics(state.params)
            return task.evaluate(state) | {"watched": self.compressed(state, "svd_llm", config.watched, statistics)}

        state, history = task.fit(
            optimizer,
            seed,
            case_dir,
            label=f"{name} seed {seed}",
            state=with_learning_rate(task.start(optimizer, seed), learning_rate),
            evaluate=evaluate,
        )
        statistics = self.statistics(state.params)
        losses = {
            method: [self.compressed(state, method, removed, statistics) for removed in config.removed]
            for method in config.methods
        }
        return {
            "learning_rate": learning_rate,
            "validation_loss": history[-1]["validation_loss"],
            "compressed": losses,
            "stable_rank": _rank_by_type(state.params, low_rank.stable_rank),
            "effective_rank": _rank_by_type(state.params, low_rank.effective_rank),
            "curve": [[record["step"], record["loss"]] for record in history],
            "watched": [
                [record["step"], record["validation_loss"], record["watched"]]
                for record in history
                if "watched" in record
            ],
        }

    def statistics(self, params: PyTree) -> dict[str, low_rank.compression.InputStatistics]:
        """What the linear layers are given on the calibration windows, the same ones for every model."""
        size = min(self.config.batch_size, self.config.calibration_windows)
        windows = self.task.calibration(self.config.calibration_windows)[:, :-1]
        batches = np.split(windows[: len(windows) // size * size], len(windows) // size)
        params = jax.device_get(params)
        # The parameters are part of the batch, so that the compiled program is the same for every model.
        inputs = lambda batch: low_rank.linear_inputs(self.task.merge(batch[0]), batch[1])
        return low_rank.collect_inputs(inputs, [(params, tokens) for tokens in batches])

    def compressed(self, state: training.TrainState, method: str, removed: float, statistics: dict[str, Any]) -> float:
        """Validation loss with a share of every hidden matrix's parameters removed."""
        params = low_rank.compress_kernels(
            state.params, MATRICES, removal=removed, method=method, statistics=statistics
        )
        return self.task.evaluate(state._replace(params=params))["validation_loss"]


@functools.lru_cache(maxsize=8)
def _optimizer_of(name: str, config: Config) -> optax.GradientTransformation:
    """The same object for every seed, so that the training step is compiled once."""
    return make_optimizer(name, config, config.steps)


def make_optimizer(name: str, config: Config, steps: int) -> optax.GradientTransformation:
    """One of the optimizers at learning rate 1, times a rate in its state: see `with_learning_rate`."""
    schedule = language_model.warmup_cosine(1.0, steps)
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


def with_learning_rate(state: training.TrainState, learning_rate: float) -> training.TrainState:
    """The state of `make_optimizer`'s optimizer with its learning rate set; every rate runs the same program."""
    *rule, scale = state.opt_state
    rate = jnp.full_like(scale.hyperparams["step_size"], learning_rate)
    return state._replace(opt_state=(*rule, scale._replace(hyperparams={"step_size": rate})))


def _rank_by_type(params: PyTree, rank: Callable[[jax.Array], jax.Array]) -> dict[str, float]:
    """Mean rank over the blocks, by the last module's name in the path: query, key, ..., down."""
    found: dict[str, list[float]] = {}
    names, leaves = jax.tree.leaves(trees.path_names(params)), jax.tree.leaves(params)
    chosen = jax.tree.leaves(trees.mask_tree(params, MATRICES))
    for path, leaf, hidden in zip(names, leaves, chosen, strict=True):
        if hidden:
            found.setdefault(path.split("/")[-2], []).append(float(rank(jnp.asarray(leaf))))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def at_equal_loss(one: list[list[float]], other: list[list[float]]) -> tuple[float, float, float]:
    """Both curves (step, full loss, compressed loss) at the higher of their final full losses.

    Returns:
      (that full loss, the first's compressed loss there, the second's), between evaluations by linear interpolation.
    """
    target = max(one[-1][1], other[-1][1])

    def read_off(curve: list[list[float]]) -> float:
        points = sorted((full, compressed) for _, full, compressed in curve)
        return float(np.interp(target, *zip(*points, strict=True)))

    return target, read_off(one), read_off(other)


def _metrics(config: Config, results: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    metrics: dict[str, list[float]] = {}
    for name, runs in results.items():
        metrics[f"validation_loss {name}"] = [run["validation_loss"] for run in runs]
        metrics[f"learning_rate {name}"] = [run["learning_rate"] for run in runs]
        for method in config.methods:
            for i, removed in enumerate(config.removed):
                metrics[f"loss {method} -{100 * removed:g}% {name}"] = [run["compressed"][method][i] for run in runs]
        for kind in runs[0]["stable_rank"]:
            metrics[f"stable_rank {kind} {name}"] = [run["stable_rank"][kind] for run in runs]
    if {"muon", "numuon"} <= set(results):
        pairs = zip(results["muon"], results["numuon"], strict=True)
        pairs = [at_equal_loss(muon["watched"], numuon["watched"]) for muon, numuon in pairs]
        label = f"svd_llm -{100 * config.watched:g}% at equal loss"
        metrics["equal loss of muon and numuon"] = [loss for loss, _, _ in pairs]
        metrics[f"loss {label} muon"] = [muon for _, muon, _ in pairs]
        metrics[f"loss {label} numuon"] = [numuon for _, _, numuon in pairs]
    return metrics


def _figures(
    config: Config, task: language_model.Task, results: dict[str, list[dict[str, Any]]], workdir: pathlib.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = language_model.parameter_count(jax.eval_shape(task.init, jax.random.key(0)))
    name = f"{size / 1e6:.2f}M parameters ({config.preset}) on {pathlib.Path(config.text).stem}"
    title = f"{name}, {config.steps:,} steps, {config.seeds} seeds"
    colours = {name: f"C{i}" for i, name in enumerate(results)}
    mean = lambda runs, pick: np.mean([pick(run) for run in runs], axis=0)

    def save(figure: Any, name: str) -> None:
        figure.suptitle(title, fontsize="medium")
        figure.savefig(workdir / f"{name}.png", dpi=130)
        plt.close(figure)

    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, runs in results.items():
        for i, run in enumerate(runs):
            labels = [None, None] if i else [f"{name}, training", f"{name}, validation"]
            steps, loss = np.array(run["curve"]).T
            axis.plot(steps, loss, color=colours[name], alpha=0.5, linewidth=1, label=labels[0])
            steps, loss, _ = np.array(run["watched"]).T
            axis.plot(steps, loss, "o", color=colours[name], label=labels[1])
    lowest = min(min(point[1] for point in run["curve"]) for runs in results.values() for run in runs)
    axis.set(xlabel="step", ylabel="nats per token", ylim=(0.95 * lowest, 2.2 * lowest))
    axis.legend(fontsize="small")
    save(figure, "training")

    count = len(config.methods)
    figure, axes = plt.subplots(1, count, figsize=(4 * count, 3.8), layout="constrained", sharey=True, squeeze=False)
    shares = [0, *(100 * removed for removed in config.removed)]
    for axis, method in zip(axes[0], config.methods, strict=True):
        for name, runs in results.items():
            losses = np.array([[run["validation_loss"], *run["compressed"][method]] for run in runs])
            spread = np.stack([losses.mean(0) - losses.min(0), losses.max(0) - losses.mean(0)])
            axis.errorbar(shares, losses.mean(0), spread, marker="o", capsize=3, color=colours[name], label=name)
        axis.set(title=method, xlabel="parameters removed from the blocks (%)")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("validation loss (nats per token)")
    axes[0, 0].legend()
    save(figure, "loss_vs_removed")

    kinds = list(next(iter(results.values()))[0]["stable_rank"])
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for axis, metric in zip(axes, ("stable_rank", "effective_rank"), strict=True):
        width = 0.8 / len(results)
        for i, (name, runs) in enumerate(results.items()):
            values = mean(runs, lambda run: [run[metric][kind] for kind in kinds])
            axis.bar(np.arange(len(kinds)) + i * width, values, width, color=colours[name], label=name)
        axis.set_xticks(np.arange(len(kinds)) + 0.4 - width / 2, kinds)
        axis.set_ylabel(metric.replace("_", " "))
    axes[0].legend()
    save(figure, "rank_by_type")

    figure, axis = plt.subplots(figsize=(5, 4.2), layout="constrained")
    for name, runs in results.items():
        for i, run in enumerate(runs):
            _, full, compressed = np.array(run["watched"]).T
            axis.plot(full, compressed, marker=".", color=colours[name], label=None if i else name)
    axis.set(xlabel="validation loss", ylabel=f"after SVD-LLM removed {100 * config.watched:g}%")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, "compressed_vs_full")
