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
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._machinery import cases, loop as training
from experiments._machinery.errors import NonFiniteLossError
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import models, optimizers, trees

PyTree = Any
Method = Literal[
    "adamw", "nadam", "no_discount", "no_discount_eq10", "lr_correction", "compensation", "forecast", "gpipe"
]
PAPER_STEPS = 50_000
MICROBATCHES = 4  # of GPipe
SYNCHRONOUS = ("adamw", "nadam", "gpipe")  # what runs at P = 1


@dataclasses.dataclass(frozen=True)
class Config(language_model.Options):
    """Every combination of P, method, learning rate and seed is one case; each is resumable."""

    preset: str = "gpt_tiny"
    layers: int | None = 16
    width: int | None = 32
    heads: int | None = 2
    block: int | None = 64
    init_std: float | None = 0.1  # of the matrices: 0.02 at the paper's width of 768, kept in proportion to width^-1/2
    batch_size: int = 4  # windows of a microbatch
    steps: int = 800  # microbatches; updates, but for gpipe
    validation_windows: int = 48
    evaluate_every: int = 100
    stages: tuple[int, ...] = (1, 4, 8, 16)  # P
    methods: tuple[Method, ...] = ("adamw", "nadam", "no_discount", "lr_correction", "gpipe")
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)  # the first seed tries all of them
    warmup: float = 0.2  # share of the steps; the paper's is 0.06 of fifty times as many
    b1: float = 0.99  # of the methods with NAdam
    weight_decay: float = 0.01
    clip: float = 10.0  # norm of a stage's gradient

    def __post_init__(self):
        super().__post_init__()
        for name in ("stages", "methods", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        if min(self.stages) < 1 or max(self.stages) > self.model().layers:
            raise ValueError(
                f"stages must lie between 1 and the number of blocks, {self.model().layers}, got {self.stages}"
            )
        if not min(self.learning_rates) > 0:
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}")
        if not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")


SMOKE = {
    "layers": 3,
    "width": 8,
    "block": 16,
    "steps": 12,
    "seeds": 1,
    "stages": (1, 3),
    "methods": ("nadam", "gpipe"),
    "learning_rates": (1e-2,),
    "validation_windows": 8,
    "evaluate_every": 6,
}
PAPER: dict[str, float] = {}  # its perplexities are of another model and text


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figures and returns the losses at the chosen learning rates, one per seed."""
    task = language_model.load(config)
    metrics: dict[str, list[float] | float] = {}
    chosen: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for P in config.stages:
        staged = Staged(task, P)
        for method in config.methods:
            if (P == 1 and method not in SYNCHRONOUS) or (P > 1 and method == "gpipe"):
                continue
            run = _Runs(config, task, method, P, workdir / "cases", staged)
            first = {rate: run(rate, seed=0) for rate in config.learning_rates}
            rate = min(first, key=lambda rate: first[rate].get("validation_loss", math.inf))
            results = [first[rate], *(run(rate, seed) for seed in range(1, config.seeds))]
            chosen[method, P] = results
            name = f"{method} P={P}"
            metrics[f"learning_rate {name}"] = rate
            metrics[f"diverged {name}"] = [float("validation_loss" not in result) for result in results]
            finished = [result for result in results if "validation_loss" in result]
            for key in ("validation_loss", "alignment", "gap"):
                if values := [result[key] for result in finished if result.get(key) is not None]:
                    metrics[f"{key} {name}"] = values
    if jax.process_index() == 0:
        _figures(config, chosen, workdir)
    return metrics


class _Runs:
    """All runs of one method at one P share one compiled program: the learning rate is an array in the state."""

    def __init__(
        self, config: Config, task: language_model.Task, method: str, P: int, folder: pathlib.Path, staged: "Staged"
    ):
        self.config, self.task, self.method, self.P, self.folder = config, task, method, P, folder
        self.staged = staged
        self.optimizer = make_optimizer(config, method, P)
        self.gradient_at = None if P == 1 else optimizers.delays.stale_params

    def __call__(self, rate: float, seed: int) -> dict[str, Any]:
        case_dir = self.folder / f"P{self.P}-{self.method}-lr{rate:g}-seed{seed}"
        return cases.run_or_load(case_dir, functools.partial(self._run, rate, seed))

    def _run(self, rate: float, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
        config, task = self.config, self.task
        init_key, train_key = jax.random.split(jax.random.key(seed))  # as task.start: every method starts alike
        params = self.staged.split(task.init(init_key))
        state = training.init_state(params, self.optimizer, key=train_key)
        state = state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, step_size=jnp.float32(rate)))
        try:
            state, history = training.fit(
                self.staged.loss_fn,
                self.optimizer,
                state,
                task.rows,
                batch_size=config.batch_size,
                steps=config.steps,
                steps_per_call=min(50, config.evaluate_every),
                augment=task.window,
                gradient_at=self.gradient_at,
                evaluate=self._evaluate,
                evaluate_every=config.evaluate_every,
                workdir=case_dir,
                checkpoint_every=max(500, config.steps // 10),
                mesh=task.rows.mesh,
                label=f"{self.method} P={self.P} lr={rate:g} seed={seed}",
            )
        except NonFiniteLossError as error:
            print(f"diverged: {error}", flush=True)
            return {"curve": []}
        curve = [record for record in history if "validation_loss" in record]
        last = curve[-1]
        return {"curve": curve} | {name: last.get(name) for name in ("loss", "validation_loss", "alignment", "gap")}

    def _evaluate(self, state: training.TrainState) -> dict[str, float]:
        measured = self.task.evaluate(state._replace(params=self.staged.join(state.params)))
        histories = trees.find_states(state.opt_state, optimizers.delays.ParamHistoryState)
        if histories and self.P > 2:
            measured |= staleness(histories[0], state.params)
        return measured


class Staged:
    """A decoder whose parameters are one vector for each of P stages, {"stage00": [n0], "stage01": [n1], ...}."""

    def __init__(self, task: language_model.Task, P: int):
        config, stages = task.config, models.gpt_stages(task.config)
        like = jax.eval_shape(task.init, jax.random.key(0))
        leaves, structure = jax.tree.flatten(like)
        labels = jax.tree.leaves(trees.label_tree(like, stage_rules(config.layers, P)))
        members = [[i for i, label in enumerate(labels) if label == stage] for stage in range(P)]

        def split(params: PyTree) -> dict[str, jax.Array]:
            flat = [leaf.ravel() for leaf in jax.tree.leaves(params)]
            return {_name(stage): jnp.concatenate([flat[i] for i in members[stage]]) for stage in range(P)}

        def join(vectors: dict[str, jax.Array]) -> PyTree:
            found = {}
            for stage in range(P):
                ends = np.cumsum([math.prod(leaves[i].shape) for i in members[stage]])
                parts = jnp.split(vectors[_name(stage)], ends[:-1])
                found |= {i: part.reshape(leaves[i].shape) for i, part in zip(members[stage], parts, strict=True)}
            return structure.unflatten([found[i] for i in range(len(leaves))])

        def loss_fn(vectors: PyTree, model_state: PyTree, windows: jax.Array, key: jax.Array):
            del key
            embed, blocks, head = models.split_gpt_params(config, join(vectors))
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
            x = stages.embed(embed, windows[:, :-1])
            x, _ = jax.lax.scan(lambda x, block: (stages.block(block, x), None), x, stacked)
            return language_model.cross_entropy(stages.head(head, x), windows[:, 1:]).mean(), (model_state, {})

        self.split, self.join, self.loss_fn = jax.jit(split), jax.jit(join), loss_fn


def _name(stage: int) -> str:
    return f"stage{stage:02d}"


def stage_rules(blocks: int, P: int) -> list[tuple[str, int]]:
    """Rules that label the parameters of a `models.GPT` with their stage, counted from 0; blocks are spread evenly."""
    of_blocks = [(f"^blocks/{block}/", block * P // blocks) for block in range(blocks)]
    return [("^embed/", 0), *of_blocks, ("^head/", P - 1)]


def make_optimizer(config: Config, method: str, P: int) -> optax.GradientTransformation:
    """History of the weights, clipping of each stage, the rule, weight decay, the learning rate and its correction."""
    stages = [(_name(stage), stage) for stage in range(P)]
    tau = [(_name(stage), delay) for stage, delay in enumerate(optimizers.delays.pipeline_delays(P))]
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
        optax.scale_by_schedule(language_model.warmup_cosine(1.0, updates, warmup=config.warmup)),
        optax.inject_hyperparams(optax.scale)(step_size=1.0),
        optax.scale(-1.0),
    ]
    if method == "lr_correction":
        links.append(optimizers.no_stash.scale_by_delay(tau, anneal_steps=round(7000 / compression)))
    chain = optax.chain(*links)
    return optax.MultiSteps(chain, MICROBATCHES).gradient_transformation() if method == "gpipe" else chain


def staleness(history: optimizers.delays.ParamHistoryState, params: PyTree) -> dict[str, float]:
    r"""How far apart the newest and the stale weights of the first stage are, and whether momentum points there.

    alignment: cosine of the angle between the step that made version s + 1 from s and the change from s + 1 to now,
    for the second oldest version s + 1 in the ring: the delay is the first stage's less one. gap: root mean square of
    newest minus stale weights.
    """
    tau = max(len(ring) for ring in jax.tree.leaves(history.history))
    m = int(history.count)
    if m < 2 * tau:
        return {}
    leaves, structure = jax.tree.flatten(params)
    pairs = zip(leaves, structure.flatten_up_to(history.history), strict=True)
    ((newest, ring),) = [pair for pair in pairs if pair[1] is not None and len(pair[1]) == tau]
    newest, ring = np.asarray(newest, np.float64), np.asarray(ring, np.float64)
    version = lambda v: ring[v % tau]
    stale, next_one = version(m - tau), version(m - tau + 1)
    step, change = next_one - stale, newest - next_one
    size = np.linalg.norm(step) * np.linalg.norm(change)
    return {
        "alignment": float(step @ change / size) if size > 0 else 0.0,
        "gap": float(np.sqrt(np.mean((newest - stale) ** 2))),
    }


def _figures(config: Config, chosen: dict[tuple[str, int], list[dict[str, Any]]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(dict.fromkeys(method for method, _ in chosen), plt.get_cmap("tab10").colors, strict=False))
    finished = {key: [r for r in results if r["curve"]] for key, results in chosen.items()}
    mean = lambda results, name: np.mean([[point[name] for point in r["curve"]] for r in results], axis=0)
    asynchronous = [P for P in config.stages if P > 1]
    text = pathlib.Path(config.text).stem

    figure, axes = plt.subplots(
        1, len(asynchronous) + 1, figsize=(4.2 * (len(asynchronous) + 1), 4), layout="constrained", squeeze=False
    )
    for axis, P in zip(axes[0], asynchronous, strict=False):
        for (method, at), results in finished.items():
            if results and at in (1, P):
                steps = [point["step"] for point in results[0]["curve"]]
                label = f"{method}, synchronous" if at == 1 else method
                axis.plot(
                    steps, mean(results, "validation_loss"), ":" if at == 1 else "-", color=colours[method], label=label
                )
        axis.set(title=f"P = {P}", xlabel="microbatch", ylabel="validation loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    for method in colours:
        points = [
            (P, [r["validation_loss"] for r in results])
            for (m, P), results in finished.items()
            if m == method and results
        ]
        if points:
            P, values = zip(*points, strict=True)
            axes[0, -1].errorbar(
                P,
                [np.mean(v) for v in values],
                [np.std(v) for v in values],
                marker="o",
                color=colours[method],
                label=method,
            )
    axes[0, -1].set(
        title="final loss", xlabel="stages P", xscale="log", xticks=config.stages, xticklabels=config.stages
    )
    axes[0, -1].grid(alpha=0.3)
    axes[0, -1].legend(fontsize="x-small")
    figure.suptitle(
        f"GPT of {config.model().layers} blocks of width {config.model().width} on {text}, {config.seeds} seed(s)"
    )
    figure.savefig(workdir / "staleness.png", dpi=130)
    plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (method, P), results in finished.items():
        points = [point for r in results[:1] for point in r["curve"] if "alignment" in point]
        if max(config.stages) == P and points:
            for axis, name in zip(axes, ("alignment", "gap"), strict=True):
                axis.plot([p["step"] for p in points], [p[name] for p in points], color=colours[method], label=method)
    axes[0].set(title=f"cosine of a step and the change that follows, P = {max(config.stages)}", xlabel="microbatch")
    axes[1].set(title="RMS of newest minus stale weights, first stage", xlabel="microbatch", yscale="log")
    if axes[0].has_data():
        axes[0].legend(fontsize="small")
    figure.savefig(workdir / "alignment.png", dpi=130)
    plt.close(figure)
