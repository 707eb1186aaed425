"""Unextractable models: what transforms of stage boundaries cost in precision and training, and what they prevent.

Paper: Long et al., "Unextractable Protocol Models: Collaborative Training and Inference without Weight
Materialization", NeurIPS 2025

    python -m experiments run unextractable                              # embedded text, 3 blocks of width 48: one core
    python -m experiments run unextractable --transforms 1000 --seeds 3
    python -m experiments run unextractable --text huggingface:wikitext/wikitext-103-raw-v1 --preset llama_small \
        --layers None --width None --heads None --block None --batch-size 8 --steps 20000       # 153M parameters: a GPU

A Llama of one block per stage is trained with Muon, momentum on the embedding and AdamW on the head, which no transform
touches. Four parts:

training   a transform of all boundaries every `morph_every` steps, the momentum mapped with it: validation loss without
           transforms, with orthogonal ones, and with spreads eps (condition number up to e^(2 eps));
inference  the trained model after up to `transforms` orthogonal transforms, in float32 and bfloat16: folded in that
           precision ("in place"), in float64 and rounded each time ("each"), or into a float64 master copy that is
           rounded once ("master"): change of the perplexity, and Jensen-Shannon divergence of the predictions in nats;
stitching  the first half of the blocks from one time and the second from `k` transforms later: perplexity, and with the
           known or estimated bridge;
learning   the stitched model fine-tuned until its validation loss is that of the trained one plus `margin`: tokens as a
           share of what training from scratch needs, at the better of the learning rates.

The paper's losses are of models of 124M parameters and more: compare the order.
Figures: drift by number of transforms; validation loss while training and while fine-tuning a stitched model.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._machinery import cases as cases_, plots
from experiments._machinery.options import Count, Positive, Range
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import language_modelling
from experiments.tasks.transformable_decoder import Decoder
from jaxlib_methods.parallel import unextractable
from jaxlib_methods.parallel.unextractable import gpt, morphing

PyTree = Any
PLAIN = "no transforms"


@dataclasses.dataclass(frozen=True)
class Config(language_modelling.Options):
    """Every part of every seed is a case that is finished or run again."""

    layers: Annotated[int, Range(2, remedy="stitching needs two blocks")] | None = 3
    width: Count | None = 48
    heads: Count | None = 2
    block: Count | None = 48
    batch_size: Count = 8
    steps: Count = 600
    seeds: Count = 1
    validation_windows: Count = 64
    evaluate_every: Count = 25
    learning_rate: Positive = 0.02  # Muon's
    embed_learning_rate: Positive = 0.3  # of SGD with momentum on the embedding
    head_learning_rate: Positive = 3e-3  # AdamW's
    morph_every: Count = 50
    spreads: tuple[float, ...] = (0.01, 0.1, 0.5)
    transforms: Count = 10_000
    stitches: tuple[Count, ...] = (1, 2, 10)  # transforms between the halves
    margin: Positive = 0.2  # nats above the trained model's loss at which the learning attack has succeeded
    attack_learning_rates: tuple[Positive, ...] = (0.3, 1.0)  # times those of training

    def __post_init__(self):
        super().__post_init__()
        gpt.transformable_gpt_stages(self.model())
        if self.steps % self.evaluate_every:
            raise ValueError(f"evaluate_every must divide steps, got {self.evaluate_every} and {self.steps}")


SMOKE = {
    "layers": 2, "width": 8, "block": 8, "steps": 12, "validation_windows": 8, "evaluate_every": 6, "morph_every": 6,
    "spreads": (0.5,), "transforms": 20, "stitches": (2,), "margin": 3.0, "attack_learning_rates": (1.0,),
}  # fmt: skip


class Variant(NamedTuple):
    """A way of training, or one of the parts that measure the model trained without transforms."""

    part: Literal["training", "drift", "stitching", "learning"]
    morph: bool = False
    spread: float | None = None  # of the transforms; None: orthogonal


class Shared(NamedTuple):
    config: Config
    decoder: Callable[[int], Decoder]  # of a seed


def variants(config: Config) -> dict[str, Variant]:
    spreads = {f"eps {spread:g}": Variant("training", True, spread) for spread in config.spreads}
    trained = {PLAIN: Variant("training"), "orthogonal": Variant("training", True)} | spreads
    return trained | {part: Variant(part) for part in ("drift", "stitching", "learning")}


def load(config: Config) -> Shared:
    return Shared(config, functools.cache(functools.partial(Decoder, language_modelling.load(config))))


def run(shared: Shared, variant: Variant, seed: int, workdir: pathlib.Path) -> Outcome:
    task, plain = shared.decoder(seed), cases_.folder(workdir.parent.parent, PLAIN, seed)
    if variant.part == "training":
        params, losses = task.fit(task.start(), morph=variant.morph, spread=variant.spread)
        workdir.mkdir(parents=True, exist_ok=True)
        task.save(workdir, params)
        return Outcome({"validation_loss": losses[-1]}, _curve(shared.config, losses))
    trained = task.load(plain)
    if variant.part == "learning":
        return _learning(task, trained, json.loads((plain / "metrics.json").read_text())["curve"])
    return {"drift": _drift, "stitching": _stitching}[variant.part](task, trained)


def _curve(config: Config, losses: list[float]) -> list[dict[str, float]]:
    return [{"step": i * config.evaluate_every, "validation_loss": loss} for i, loss in enumerate(losses)]


def _drift(task: Decoder, trained: PyTree) -> Outcome:
    """Change of the predictions after 1, 3, 10, 30, ... transforms."""
    config = task.options
    dtypes = {"float32": np.float32, "bfloat16": jnp.bfloat16}
    served = {name: jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), trained) for name, dtype in dtypes.items()}
    predict = lambda name, params: jax.nn.log_softmax(
        task.forward(name)(params, task.held_out[:, :-1]).astype(jnp.float32)
    )
    original = {name: predict(name, params) for name, params in served.items()}
    models_ = {(name, how): params for name, params in served.items() for how in ("in place", "each")}
    master = morphing.master_copy(trained)
    times = {
        min(round(10 ** (k / 2)), config.transforms) for k in range(2 * math.ceil(math.log10(config.transforms)) + 1)
    }
    drift: dict[str, list[list[float]]] = {}
    for time in range(1, config.transforms + 1):
        transforms = task.transforms(time)
        master = unextractable.morph(master, transforms, task.rules)
        for (name, how), params in models_.items():
            precision = "parameter" if how == "in place" else "float64"
            models_[name, how] = unextractable.morph(params, transforms, task.rules, precision=precision)
        if time in times:
            now = models_ | {(name, "master"): morphing.cast_like(master, params) for name, params in served.items()}
            for (name, how), params in now.items():
                change = _change(original[name], predict(name, params), task.held_out[:, 1:])
                drift.setdefault(f"{name} {how}", []).append([time, *map(float, change)])
    last = {name: {"perplexity change": values[-1][1], "JS drift": values[-1][2]} for name, values in drift.items()}
    return Outcome({}, details={"rows": last, "drift": drift})


@jax.jit
def _change(before: jax.Array, after: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(change of the perplexity, Jensen-Shannon divergence) of log-probabilities (B, T, V)."""
    loss = lambda p: -jnp.mean(jnp.take_along_axis(p, targets[..., None], axis=-1))
    middle = jnp.logaddexp(before, after) - math.log(2)
    divergence = lambda p: jnp.sum(jnp.exp(p) * (p - middle), axis=-1)
    js = jnp.maximum(jnp.mean(divergence(before) + divergence(after)) / 2, 0.0)
    change = jnp.exp(loss(after)) - jnp.exp(loss(before))
    return jnp.nan_to_num(change, nan=1e9, posinf=1e9), jnp.nan_to_num(js, nan=math.log(2))


def stitched(task: Decoder, trained: PyTree, k: int) -> tuple[PyTree, PyTree, unextractable.Transform]:
    """(front from time 0 with back from time k, all of time k, the product of the transforms between)."""
    later, half = trained, len(trained[1]) // 2
    product, inverse = np.eye(task.gpt.width), np.eye(task.gpt.width)
    for time in range(1, k + 1):
        transforms = task.transforms(time)
        later = unextractable.morph(later, transforms, task.rules)
        T = transforms["boundary", half]
        product, inverse = product @ T.matrix, T.inverse @ inverse
    front = (trained[0], [*trained[1][:half], *later[1][half:]], later[2])
    return front, later, unextractable.Transform(product, inverse)


def _stitching(task: Decoder, trained: PyTree) -> Outcome:
    """Perplexities of stitched models, bare and with bridges."""
    half = len(trained[1]) // 2
    bridge = [(regex, (None, right)) for regex, (_, right) in task.rules if right == ("boundary", half)]
    perplexity = lambda params: math.exp(min(task.validation_loss(params), 50.0))
    found = {"trained": perplexity(trained)}
    windows = np.asarray(task.rows[: 2 * len(task.held_out), : task.gpt.block_size]).astype(np.int32)
    same, others = np.split(windows[: len(windows) // 2 * 2], 2)
    for k in task.options.stitches:
        front, later, T = stitched(task, trained, k)
        join = lambda T, front=front: perplexity(unextractable.morph(front, {("boundary", half): T}, bridge))
        before = task.forward(blocks=half)(trained, same)
        found[f"stitched k={k}"] = perplexity(front)
        found[f"known bridge k={k}"] = join(T)
        for name, inputs in (("same", same), ("other", others)):
            T = unextractable.estimate_bridge(before, task.forward(blocks=half)(later, inputs))
            found[f"bridge from {name} inputs k={k}"] = join(unextractable.Transform(T, np.linalg.pinv(T)))
    return Outcome({}, details={"rows": {name: {"perplexity": value} for name, value in found.items()}})


def _learning(task: Decoder, trained: PyTree, scratch: list[dict[str, float]]) -> Outcome:
    """Fine-tuning of a stitched model against training from scratch, both until the loss is near the trained one's."""
    config = task.options
    front, _, _ = stitched(task, trained, max(config.stitches))
    target = scratch[-1]["validation_loss"] + config.margin
    # Its own data: the order of the text that the model was trained on is not repeated.
    curves = {
        factor: _curve(config, task.fit(front, factor=factor, first=10**6)[1])
        for factor in config.attack_learning_rates
    }
    reached = lambda curve: next((point["step"] for point in curve if point["validation_loss"] <= target), None)
    needed = [at for at in map(reached, curves.values()) if at is not None]
    from_scratch = reached(scratch)
    rows = {"learning attack": {"tokens": 100 * min(needed) / from_scratch}} if needed and from_scratch else {}
    return Outcome({}, details={"rows": rows, "curves": {f"{factor:g}": curve for factor, curve in curves.items()}})


def compare(shared: Shared, cases: list[Case]) -> list[tuple[str, int, dict[str, float]]]:
    """The rows of the measuring parts, several a case."""
    return [(row, case.seed, found) for case in cases for row, found in case.details.get("rows", {}).items()]


def targets(config: Config) -> Targets:
    """None: the paper's losses are of other models and texts; its claims are stated on the results page."""
    return {}


def figures(shared: Shared, cases: list[Case]) -> dict[str, plots.Figure]:
    last = {case.name: case for case in cases}  # of the last seed
    drift, panels = plots.axes(1, 2, sharex=True)
    for name, values in last["drift"].details["drift"].items():
        times, change, divergence = np.array(values).T
        style = {"in place": "-", "each": "--", "master": "-."}[name.split(" ", 1)[1]]
        colour = "tab:blue" if name.startswith("float32") else "tab:red"
        for panel, shown in zip(panels[0], (np.abs(change), divergence), strict=True):
            panel.plot(times, np.maximum(shown, 1e-9), style, color=colour, marker=".", label=name)
    for panel, label in zip(panels[0], ("change of the perplexity", "Jensen-Shannon divergence (nats)"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="transforms", ylabel=label)
    panels[0, 0].legend(fontsize="small")
    training = [case for case in cases if case.variant.part == "training"]
    attacked = [
        last["learning"]._replace(name=f"stitched, {factor} x learning rate", curve=curve)
        for factor, curve in last["learning"].details["curves"].items()
    ]
    loss = {"validation_loss": "validation loss (nats per token)"}
    return {
        "drift": drift,
        "training": plots.curves(training, "step", loss),
        "learning": plots.curves([last[PLAIN], *attacked], "step", loss, title="the learning attack"),
    }
