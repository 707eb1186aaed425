"""SENTINEL against seven kinds of malicious workers in a pipeline: who is found, how soon, and what it saves.

Paper: Dolatabadi et al., "SENTINEL: Stagewise Integrity Verification for Pipeline Parallel Decentralized Training",
2026

    python -m experiments run sentinel                                # embedded text, 6 stages x 8 replicas: one core
    python -m experiments run sentinel --share 0.375 --seeds 3
    python -m experiments run sentinel --text huggingface:wikitext/wikitext-103-raw-v1 --layers 16 --width 1024 \
        --heads 16 --block 512 --replicas 8 --warmup 1000 --steps 5000                             # as the paper: GPUs

All workers run on one device. Training without attacks for `warmup` steps builds the references and fences; from there
each case goes on for `steps` steps, with `share` of the workers of every stage but the first and the last attacking in
both directions from its first step on, with verification and without. A banned worker's slot goes to an honest one.

Numbers by attack: F1, precision (banned workers who attack) and recall (attackers who are banned) in percent, mean
steps from the first message to the ban, and the validation loss with and without protection, beside training without
attacks ("clean"), where every ban is a false one. "false alarms" are honest messages that were rejected, in percent.

The paper's F1 are of a model with 0.6B parameters, taken from summaries by third parties: they are no more than a hint.
Figures: training loss by step for each attack, protected and not; F1 and steps to the ban.
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
from flax import nnx

from experiments._machinery import cases
from experiments.data import text
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import models, parallel
from jaxlib_methods.parallel import integrity

PyTree = Any
ATTACKS: dict[str, tuple[str, float | int]] = {
    "zeros": ("constant", 0.0),
    "random": ("random", 0),
    "sign flip": ("scale", -1.0),
    "scale 2": ("scale", 2.0),
    "random sign": ("random_sign", 0.5),
    "delay 100": ("delay", 100),
    "delay 200": ("delay", 200),
    "bias": ("bias", 1.0),
    "invisible noise": ("invisible_noise", 0.99),
    "adaptive": ("adaptive", 0.9),
}
MIXED = ("zeros", "random", "sign flip", "random sign", "delay 100", "bias", "invisible noise")


@dataclasses.dataclass(frozen=True)
class Config(language_model.Options):
    """The clean start is shared by all attacks; each (attack, protected or not, seed) is one case."""

    layers: int | None = 6  # one stage each
    width: int | None = 32
    heads: int | None = 2
    block: int | None = 32
    batch_size: int = 2  # windows of a replica's micro-batch
    replicas: int = 8
    share: float = 0.25  # of malicious workers in a stage
    warmup: int = 400  # steps before the attacks
    steps: int = 250  # with attacks
    clean_steps: int = 1600  # without attacks, after the warm-up
    seeds: int = 1
    learning_rate: float = 3e-3
    decay: float = 0.9  # of the references to activations
    gradient_decay: float = 0.8
    votes: int = 1
    window: int = 100
    reduce_axes: tuple[int, ...] = (0,)
    distances: tuple[Literal["absolute", "euclidean", "sign", "wasserstein"], ...] = integrity.distances.DISTANCES
    collusion: float = 0.0  # share of a stage's malicious workers who send what the first of them sends
    attacks: tuple[Literal[tuple([*ATTACKS, "mixed"])], ...] = (*MIXED, "adaptive", "mixed")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share < 0.5 or round(self.share * self.replicas) < 1:
            raise ValueError(
                f"share must name at least one of {self.replicas} replicas and less than half, got {self.share}"
            )
        if not 0 <= self.collusion <= 1:
            raise ValueError(f"collusion must lie between 0 and 1, got {self.collusion}")
        if self.model().layers < 3:
            raise ValueError(f"the first and the last stage are honest: take 3 layers or more, got {self.layers}")
        if self.warmup < 1 or self.clean_steps < self.steps:
            raise ValueError(
                f"warmup must be positive and clean_steps no less than steps, got {self.warmup}, {self.clean_steps}"
            )
        self.verifiers()

    def verifiers(self) -> dict[str, integrity.VerifierConfig]:
        """Options of the verifiers by direction."""
        names = ("window", "reduce_axes", "distances")
        options = {name: getattr(self, name) for name in names} | {"warmup_steps": self.warmup, "num_votes": self.votes}
        return {
            "forward": integrity.VerifierConfig(decay=self.decay, **options),
            "backward": integrity.VerifierConfig(decay=self.gradient_decay, **options),
        }


SMOKE = {
    "layers": 3,
    "width": 8,
    "block": 8,
    "replicas": 4,
    "warmup": 20,
    "steps": 10,
    "clean_steps": 10,
    "validation_windows": 8,
    "attacks": ("sign flip",),
    "window": 20,
}
PAPER: dict[str, float] = {
    "F1 zeros": 100.0,
    "F1 random": 100.0,
    "F1 sign flip": 100.0,
    "F1 invisible noise": 100.0,
    "F1 delay 100": 94.1,
}


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the clean start and all cases, draws the figures and returns the numbers, one per seed."""
    metrics: dict[str, list[float]] = {}
    curves: dict[str, dict[str, Any]] = {}
    for seed in range(config.seeds):
        task = _Task(config, seed)
        clean = cases.run_or_load(workdir / "cases" / f"clean-seed{seed}", functools.partial(_clean, task))
        for name in ("validation_loss", "false_alarms", "bans"):
            metrics.setdefault(f"{name.replace('_', ' ')} clean", []).append(clean[name])
        curves.setdefault("clean", clean)
        for attack in config.attacks:
            for protected in (True, False):
                name = f"{attack}{'' if protected else ' unprotected'}"
                run = functools.partial(_attacked, task, attack, protected)
                result = cases.run_or_load(workdir / "cases" / f"{name.replace(' ', '_')}-seed{seed}", run)
                metrics.setdefault(f"validation loss {name}", []).append(result["validation_loss"])
                for measure in ("F1", "precision", "recall", "steps to ban") if protected else ():
                    if result[measure] is not None:
                        metrics.setdefault(f"{measure} {attack}", []).append(result[measure])
                curves.setdefault(name, result)
    _figures(config, curves, metrics, workdir)
    return metrics


class _Task:
    """A model cut into stages, its text, and the state after the clean start."""

    def __init__(self, config: Config, seed: int):
        self.config, self.seed = config, seed
        loaded = text.load(config.text, validation=config.validation_text, data_dir=config.data_dir)
        gpt = config.model(loaded.vocab_size)
        parts = models.gpt_stages(gpt)

        def head(params: PyTree, x: jax.Array, targets: jax.Array) -> jax.Array:
            return language_model.cross_entropy(parts.head(params, x), targets).mean()

        self.model = parallel.StageModel(parts.embed, parts.block, head)
        self.key = jax.random.key(seed)
        init = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(models.GPT(gpt, rngs=nnx.Rngs(key)), nnx.Param)))
        params = init(self.key)
        self.stages = parallel.split_stages(models.split_gpt_params(gpt, params), gpt.layers)
        self.rows = jnp.asarray(text.training_rows(loaded.train, gpt.block_size))
        self.held_out = jnp.asarray(text.validation_rows(loaded.validation, gpt.block_size, config.validation_windows))
        self.window = functools.partial(text.random_window, block=gpt.block_size)
        schedule = optax.warmup_constant_schedule(0.0, config.learning_rate, max(1, config.warmup // 10))
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
        self._start = None

    def batch(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(inputs, targets), (R, B, T), of a step."""
        config, (row_key, window_key) = self.config, jax.random.split(key)
        chosen = jax.random.randint(row_key, (config.replicas * config.batch_size,), 0, len(self.rows))
        windows = self.window(self.rows[chosen], window_key).astype(jnp.int32)
        windows = windows.reshape(config.replicas, config.batch_size, -1)
        return windows[..., :-1], windows[..., 1:]

    def pipeline(
        self, attacks: tuple[integrity.Attack, ...] = (), protected: bool = True
    ) -> integrity.VerifiedPipeline:
        verifiers = self.config.verifiers() if protected else {"forward": None, "backward": None}
        return integrity.VerifiedPipeline(
            self.model, self.config.replicas, attacks=attacks, collusion=self.config.collusion, **verifiers
        )

    @functools.cached_property
    def validation_loss(self) -> Any:
        loss = lambda stages, rows: parallel.sequential_loss(self.model, stages, rows[:, :-1], rows[:, 1:])
        return jax.jit(lambda stages: loss(stages, self.held_out.astype(jnp.int32)))

    def run(self, pipeline: integrity.VerifiedPipeline, carry: PyTree, first: int, steps: int) -> tuple[PyTree, PyTree]:
        """Steps first, first + 1, ... of training; (carry, by step: losses, bans and rejections of all workers)."""
        per_call, seen = math.gcd(steps, 50), []
        some = self._compiled(pipeline, per_call)
        for call in range(steps // per_call):
            carry, out = some(carry, jnp.int32(first + call * per_call))
            seen.append(jax.tree.map(np.asarray, out))
        return carry, jax.tree.map(lambda *parts: np.concatenate(parts), *seen)

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def _compiled(self, pipeline: integrity.VerifiedPipeline, steps: int) -> Any:
        def one(carry: PyTree, step: jax.Array) -> tuple[PyTree, PyTree]:
            stages, opt_state, verified = carry
            batch_key, attack_key = jax.random.split(jax.random.fold_in(self.key, step))
            batch = self.batch(batch_key)
            losses, gradients, verified, verdicts = pipeline.value_and_grad(stages, *batch, verified, key=attack_key)
            gradients = jax.tree.map(lambda g: jnp.mean(g, axis=0), tuple(gradients))
            updates, opt_state = self.optimizer.update(gradients, opt_state, stages)
            bans = [jnp.zeros_like(verdicts.forward, jnp.int32) if v is None else v.bans for v in verified[:2]]
            kept = jnp.maximum(jnp.sum(losses > 0), 1)
            seen = {"loss": jnp.sum(losses) / kept, "bans": bans, "rejected": ~jnp.stack(verdicts, axis=1)}
            return (optax.apply_updates(stages, updates), opt_state, verified), seen

        return jax.jit(lambda carry, start: jax.lax.scan(one, carry, start + jnp.arange(steps)))

    def start(self) -> PyTree:
        """The carry after the clean start; computed once."""
        if self._start is None:
            pipeline = self.pipeline()
            inputs = jax.ShapeDtypeStruct((self.config.batch_size, self.config.model().block_size), jnp.int32)
            verified = pipeline.init(self.stages, inputs, key=jax.random.fold_in(self.key, 2**31 - 1))
            carry = (self.stages, self.optimizer.init(self.stages), verified)
            carry, seen = self.run(pipeline, carry, 0, self.config.warmup)
            self._start = carry, seen
        return self._start


def _clean(task: _Task, case_dir: pathlib.Path) -> dict[str, Any]:
    """Training without attacks: its loss after as many steps as the attacked runs have, and false alarms to the end."""
    config = task.config
    carry, before = task.start()
    carry, seen = task.run(task.pipeline(), carry, config.warmup, config.steps)
    loss = float(task.validation_loss(carry[0]))
    rejected, bans = seen["rejected"], seen["bans"]
    if more := config.clean_steps - config.steps:
        _, later = task.run(task.pipeline(), carry, config.warmup + config.steps, more)
        rejected, bans = np.concatenate([rejected, later["rejected"]]), later["bans"]
    return {
        "validation_loss": loss,
        "false_alarms": 100 * float(rejected.mean()),
        "bans": int(sum(b[-1].sum() for b in bans)),
        "start": before["loss"].tolist(),
        "losses": seen["loss"].tolist(),
    }


def plan(config: Config, attack: str, seed: int = 0) -> tuple[integrity.Attack, ...]:
    """The malicious workers: a share of each stage but the first and the last, the same for all attacks of a seed."""
    random = np.random.default_rng(seed)
    count, chosen = round(config.share * config.replicas), []
    for stage in range(1, config.model().layers - 1):
        for replica in sorted(random.choice(config.replicas, count, replace=False).tolist()):
            kind, value = ATTACKS[MIXED[len(chosen) % len(MIXED)] if attack == "mixed" else attack]
            chosen.append(integrity.Attack(kind, stage, replica, value=value))
    return tuple(chosen)


def _attacked(task: _Task, attack: str, protected: bool, case_dir: pathlib.Path) -> dict[str, Any]:
    config = task.config
    attacks = plan(config, attack, task.seed)
    (stages, opt_state, verified), _ = task.start()
    pipeline = task.pipeline(attacks, protected)
    if attack == "adaptive" and not protected:  # it needs what it adapts to
        pipeline = pipeline._replace(
            **{name: dataclasses.replace(options, warmup_steps=2**30) for name, options in config.verifiers().items()}
        )
    inputs = jax.ShapeDtypeStruct((config.batch_size, config.model().block_size), jnp.int32)
    fresh = pipeline.init(stages, inputs, key=task.key)
    verified = fresh._replace(
        forward=None if fresh.forward is None else verified.forward,
        backward=None if fresh.backward is None else verified.backward,
    )
    (stages, _, verified), seen = task.run(pipeline, (stages, opt_state, verified), config.warmup, config.steps)
    result = {
        # A run that has blown up has a loss above that of guessing, and a number in the table.
        "validation_loss": float(np.nan_to_num(task.validation_loss(stages), nan=1e3, posinf=1e3)),
        "losses": [loss if math.isfinite(loss) else None for loss in seen["loss"].tolist()],
    }
    return result | (scores(seen["bans"], attacks) if protected else {})


def scores(bans: list[np.ndarray], attacks: tuple[integrity.Attack, ...]) -> dict[str, float | None]:
    """F1, precision and recall in percent, and mean steps to the ban, from bans [steps, S - 1, R] by direction."""
    forward, backward = bans
    first: dict[tuple[int, int], int] = {}
    for banned, offset in ((forward, 0), (backward, 1)):
        for boundary, replica in zip(*np.nonzero(banned[-1]), strict=True):
            worker = (int(boundary) + offset, int(replica))
            step = int(np.argmax(banned[:, boundary, replica] > 0)) + 1
            first[worker] = min(step, first.get(worker, step))
    malicious = {(attack.stage, attack.replica) for attack in attacks}
    found = malicious & set(first)
    precision = len(found) / len(first) if first else None
    recall = len(found) / len(malicious)
    return {
        "precision": None if precision is None else 100 * precision,
        "recall": 100 * recall,
        "F1": 200 * len(found) / (len(first) + len(malicious)),
        "steps to ban": float(np.mean([first[worker] for worker in found])) if found else None,
    }


def _figures(
    config: Config, curves: dict[str, dict[str, Any]], metrics: dict[str, list[float]], workdir: pathlib.Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    smooth = lambda values: np.convolve(np.array(values, float), np.ones(5) / 5, "valid")
    columns = min(3, len(config.attacks))
    rows = math.ceil(len(config.attacks) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 2.8 * rows), sharex=True, layout="constrained", squeeze=False
    )
    for axis, attack in zip(axes.flat, config.attacks, strict=False):
        for name, colour, label in (
            ("clean", "black", "no attack"),
            (attack, "tab:blue", "SENTINEL"),
            (f"{attack} unprotected", "tab:red", "unprotected"),
        ):
            losses = smooth(curves[name]["losses"])
            axis.plot(config.warmup + 4 + np.arange(len(losses)), losses, color=colour, label=label, linewidth=1)
        axis.set(title=attack, ylim=(1.5, 8))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    figure.supxlabel("step")
    figure.supylabel("training loss of honest micro-batches (nats per token)")
    figure.savefig(workdir / "losses.png", dpi=130)
    plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for axis, measure, label in ((axes[0], "F1", "F1 (%)"), (axes[1], "steps to ban", "steps to the ban")):
        shown = [(attack, metrics.get(f"{measure} {attack}")) for attack in config.attacks]
        axis.barh([a for a, _ in shown], [np.mean(values) if values else 0 for _, values in shown])
        axis.set(xlabel=label)
        axis.grid(alpha=0.3, axis="x")
    figure.suptitle(f"{config.model().layers} stages x {config.replicas} replicas, {100 * config.share:g}% malicious")
    figure.savefig(workdir / "detection.png", dpi=130)
    plt.close(figure)
