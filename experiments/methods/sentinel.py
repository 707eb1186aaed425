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

Numbers by attack: F1, precision (banned workers that attack) and recall (attackers that are banned) in percent, mean
steps from the first message to the ban, and the validation loss with and without protection, beside training without
attacks ("clean"), where every ban is a false one. "false alarms" are honest messages that were rejected, in percent.

The paper's F1 are of a model with 0.6B parameters, taken from summaries by third parties: they are no more than a hint.
Figures: training loss by step for each attack, protected and not; F1 and steps to the ban.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from experiments._machinery import plots
from experiments._machinery.options import Count, Positive, Range, Share
from experiments._machinery.records import Case, Outcome, Target, Targets
from experiments.tasks import language_modelling, pipelines
from experiments.tasks.verified_training import Training
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
class Config(language_modelling.Options):
    """The clean start is shared by all attacks; each (attack, protected or not, seed) is one case."""

    layers: Annotated[int, Range(3, remedy="the first and the last stage are honest")] | None = 6  # one stage each
    width: Count | None = 32
    heads: Count | None = 2
    block: Count | None = 32
    batch_size: Count = 2  # windows of a replica's micro-batch
    replicas: Count = 8
    share: Annotated[float, Range(0, 0.5, closed="neither")] = 0.25  # of malicious workers in a stage
    warmup: Count = 400  # steps before the attacks
    steps: Count = 250  # with attacks
    clean_steps: Count = 1600  # without attacks, after the warm-up
    seeds: Count = 1
    learning_rate: Positive = 3e-3
    decay: float = 0.9  # of the references to activations
    gradient_decay: float = 0.8
    votes: int = 1
    window: int = 100
    reduce_axes: tuple[int, ...] = (0,)
    distances: tuple[Literal["absolute", "euclidean", "sign", "wasserstein"], ...] = integrity.distances.DISTANCES
    collusion: Share = 0.0  # share of a stage's malicious workers that send what the first of them sends
    attacks: tuple[Literal[tuple([*ATTACKS, "mixed"])], ...] = (*MIXED, "adaptive", "mixed")

    def __post_init__(self):
        super().__post_init__()
        if round(self.share * self.replicas) < 1:
            raise ValueError(f"share must name at least one of {self.replicas} replicas, got {self.share}")
        if self.clean_steps < self.steps:
            raise ValueError(f"clean_steps must be no less than steps, got {self.clean_steps} and {self.steps}")
        self.verifiers()

    def verifiers(self) -> dict[str, integrity.VerifierConfig]:
        """What the verifiers do, by direction."""
        names = ("window", "reduce_axes", "distances")
        options = {name: getattr(self, name) for name in names} | {"warmup_steps": self.warmup, "num_votes": self.votes}
        return {
            "forward": integrity.VerifierConfig(decay=self.decay, **options),
            "backward": integrity.VerifierConfig(decay=self.gradient_decay, **options),
        }


SMOKE = {
    "layers": 3, "width": 8, "block": 8, "replicas": 4, "warmup": 20, "steps": 10, "clean_steps": 10,
    "validation_windows": 8, "attacks": ("sign flip",), "window": 20,
}  # fmt: skip


class Variant(NamedTuple):
    attack: str | None  # None: training without attacks
    protected: bool


def variants(config: Config) -> dict[str, Variant]:
    found = {"clean": Variant(None, True)}
    for attack in config.attacks:
        found |= {attack: Variant(attack, True), f"{attack} unprotected": Variant(attack, False)}
    return found


class Shared(NamedTuple):
    config: Config
    training: Callable[[int], Training]  # of a seed; kept, because all its cases go on from one clean start


def load(config: Config) -> Shared:
    return Shared(config, functools.cache(functools.partial(Training, config, pipelines.load(config))))


def run(shared: Shared, variant: Variant, seed: int, workdir: Any) -> Outcome:
    training = shared.training(seed)
    return _clean(training) if variant.attack is None else _attacked(training, *variant)


def _clean(training: Training) -> Outcome:
    """Training without attacks: its loss after as many steps as the attacked runs have, and false alarms to the end."""
    config, pipeline = training.config, training.pipeline()
    carry, seen = training.run(pipeline, training.start[0], config.warmup, config.steps)
    loss = float(training.validation_loss(carry[0]))
    rejected, bans = seen["rejected"], seen["bans"]
    if more := config.clean_steps - config.steps:
        _, later = training.run(pipeline, carry, config.warmup + config.steps, more)
        rejected, bans = np.concatenate([rejected, later["rejected"]]), later["bans"]
    alarms, banned = 100 * float(rejected.mean()), float(sum(b[-1].sum() for b in bans))
    metrics = {"validation loss": loss, "false alarms": alarms, "bans": banned}
    return Outcome(metrics, curve=_curve(config, seen["loss"]))


def _curve(config: Config, losses: np.ndarray) -> list[dict[str, float]]:
    """Training losses of honest micro-batches, the mean of five steps; none where it is not finite."""
    smooth = np.convolve(losses, np.ones(5) / 5, "valid")
    return [
        {"step": config.warmup + 4 + i, "loss": float(loss)} for i, loss in enumerate(smooth) if math.isfinite(loss)
    ]


def plan(config: Config, attack: str, seed: int = 0) -> tuple[integrity.Attack, ...]:
    """The malicious workers: a share of each stage but the first and the last, the same for all attacks of a seed."""
    random = np.random.default_rng(seed)
    count, chosen = round(config.share * config.replicas), []
    for stage in range(1, config.model().layers - 1):
        for replica in sorted(random.choice(config.replicas, count, replace=False).tolist()):
            kind, value = ATTACKS[MIXED[len(chosen) % len(MIXED)] if attack == "mixed" else attack]
            chosen.append(integrity.Attack(kind, stage, replica, value=value))
    return tuple(chosen)


def _attacked(training: Training, attack: str, protected: bool) -> Outcome:
    config = training.config
    attacks = plan(config, attack, training.seed)
    stages, opt_state, verified = training.start[0]
    pipeline = training.pipeline(attacks, protected)
    if attack == "adaptive" and not protected:  # it needs what it adapts to
        pipeline = pipeline._replace(
            **{name: dataclasses.replace(options, warmup_steps=2**30) for name, options in config.verifiers().items()}
        )
    fresh = training.fresh(pipeline, training.key)
    verified = fresh._replace(
        forward=None if fresh.forward is None else verified.forward,
        backward=None if fresh.backward is None else verified.backward,
    )
    (stages, _, _), seen = training.run(pipeline, (stages, opt_state, verified), config.warmup, config.steps)
    # A run that has blown up has a loss above that of guessing, and a number in the table.
    loss = float(np.nan_to_num(training.validation_loss(stages), nan=1e3, posinf=1e3))
    found = scores(seen["bans"], attacks) if protected else {}
    metrics = {"validation loss": loss} | {name: value for name, value in found.items() if value is not None}
    return Outcome(metrics, curve=_curve(config, seen["loss"]))


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


def targets(config: Config) -> Targets:
    """Of a model with 0.6 billion parameters: compare the order."""
    source = "SENTINEL at 0.6 billion parameters, through third-party summaries; not seen"
    published = {"zeros": 100.0, "random": 100.0, "sign flip": 100.0, "invisible noise": 100.0, "delay 100": 94.1}
    return {name: {"F1": Target(value, source, "paper")} for name, value in published.items()}


def figures(shared: Shared, cases: list[Case]) -> dict[str, plots.Figure]:
    rows, attacks = plots.by_name(cases), shared.config.attacks
    columns = min(3, len(attacks))
    losses, panels = plots.axes(math.ceil(len(attacks) / columns), columns, size=(4.0, 2.8), sharex=True)
    for panel, attack in zip(panels.flat, attacks, strict=False):
        for row, label in (("clean", "no attack"), (attack, "SENTINEL"), (f"{attack} unprotected", "unprotected")):
            points = [(point["step"], point["loss"]) for point in rows[row][0].curve]
            panel.plot(*zip(*points, strict=True), label=label, linewidth=1)
        panel.set(title=attack, ylim=(1.5, 8))
    panels[0, 0].legend(fontsize="small")
    losses.supxlabel("step")
    losses.supylabel("training loss of honest micro-batches (nats per token)")
    detected = [case for case in cases if case.variant.attack and case.variant.protected]
    return {"losses": losses, "detection": plots.bars(detected, {"F1": "F1 (%)", "steps to ban": "steps to the ban"})}
