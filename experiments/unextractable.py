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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases
from experiments.data import text
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import models, trees
from jaxlib_methods.parallel import unextractable

PyTree = Any
PRECISIONS = ("in place", "each", "master")


@dataclasses.dataclass(frozen=True)
class Config(language_model.Options):
    """Every part of every seed is a case that is finished or run again."""

    layers: int | None = 3
    width: int | None = 48
    heads: int | None = 2
    block: int | None = 48
    batch_size: int = 8
    steps: int = 600
    seeds: int = 1
    validation_windows: int = 64
    evaluate_every: int = 25
    learning_rate: float = 0.02  # Muon's
    embed_learning_rate: float = 0.3  # of SGD with momentum on the embedding
    head_learning_rate: float = 3e-3  # AdamW's
    morph_every: int = 50
    spreads: tuple[float, ...] = (0.01, 0.1, 0.5)
    transforms: int = 10_000
    stitches: tuple[int, ...] = (1, 2, 10)  # transforms between the halves
    margin: float = 0.2  # nats above the trained model's loss at which the learning attack has succeeded
    attack_learning_rates: tuple[float, ...] = (0.3, 1.0)  # times those of training

    def __post_init__(self):
        super().__post_init__()
        unextractable.gpt.transformable_gpt_stages(self.model())
        for name in ("morph_every", "transforms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % self.evaluate_every:
            raise ValueError(f"evaluate_every must divide steps, got {self.evaluate_every} and {self.steps}")
        if self.model().layers < 2:
            raise ValueError(f"stitching needs two blocks or more, got {self.layers}")
        if not self.margin > 0:
            raise ValueError(f"margin must be positive, got {self.margin}")


SMOKE = {
    "layers": 2,
    "width": 8,
    "block": 8,
    "steps": 12,
    "validation_windows": 8,
    "evaluate_every": 6,
    "morph_every": 6,
    "spreads": (0.5,),
    "transforms": 20,
    "stitches": (2,),
    "margin": 3.0,
    "attack_learning_rates": (1.0,),
}
PAPER: dict[str, float] = {}  # its losses are of other models and texts; its claims are stated in the notes


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all parts, draws the figures and returns the numbers, one per seed."""
    metrics: dict[str, list[float]] = {}
    parts: dict[str, dict[str, Any]] = {}
    for seed in range(config.seeds):
        task = _Task(config, seed)
        folder = lambda name, seed=seed: workdir / "cases" / f"{name.replace(' ', '_')}-seed{seed}"
        for name, spread in (("no transforms", 0), ("orthogonal", None), *((f"eps {e:g}", e) for e in config.spreads)):
            run = functools.partial(_training, task, spread, name != "no transforms")
            parts[name] = cases.run_or_load(folder(name), run, keep_checkpoints=True)
            metrics.setdefault(f"validation_loss {name}", []).append(parts[name]["losses"][-1])
        trained = task.load(folder("no transforms"))
        for name, run in (("drift", _drift), ("stitching", _stitching), ("learning", _learning)):
            parts[name] = cases.run_or_load(folder(name), functools.partial(run, task, trained))
            for metric, value in parts[name]["metrics"].items():
                if value is not None:
                    metrics.setdefault(metric, []).append(value)
    _figures(config, parts, workdir)
    return metrics


class _Task:
    """The model with matrices for transforms, its text, optimizer and loss."""

    def __init__(self, config: Config, seed: int):
        self.config, self.key = config, jax.random.key(seed)
        loaded = text.load(config.text, validation=config.validation_text, data_dir=config.data_dir)
        self.gpt = config.model(loaded.vocab_size)
        self.rows = jnp.asarray(text.training_rows(loaded.train, self.gpt.block_size))
        held_out = text.validation_rows(loaded.validation, self.gpt.block_size, config.validation_windows)
        self.held_out = jnp.asarray(held_out.astype(np.int32))
        self.rules = unextractable.gpt.gpt_transform_rules(self.gpt.layers)
        blocks = range(self.gpt.layers)
        self.names = [("boundary", i) for i in (*blocks, self.gpt.layers)] + [("middle", i) for i in blocks]

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def start(self) -> PyTree:
        """Parameters before training."""
        init = lambda key: nnx.to_pure_dict(nnx.state(models.GPT(self.gpt, rngs=nnx.Rngs(key)), nnx.Param))
        params = models.split_gpt_params(self.gpt, jax.jit(init)(self.key))
        rotations = [
            unextractable.draw_transform(self.gpt.width, key=jax.random.fold_in(self.key, i)).matrix
            for i in range(2 * self.gpt.layers + 1)
        ]
        return unextractable.gpt.transformable_gpt_params(self.gpt, params, rotations)

    def transforms(self, time: int, spread: float | None = None) -> dict[Any, unextractable.Transform]:
        key = jax.random.fold_in(self.key, 10**6 + time)
        return unextractable.draw_transforms(self.names, self.gpt.width, key=key, spread=spread)

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def forward(self, dtype: str = "float32", blocks: int | None = None) -> Any:
        """Jitted (parameters, tokens) -> logits, or the activations behind so many blocks."""
        parts = unextractable.gpt.transformable_gpt_stages(dataclasses.replace(self.gpt, dtype=dtype))

        def function(params: PyTree, tokens: jax.Array) -> jax.Array:
            embed, layers, head = params
            x = parts.embed(embed, tokens)
            for layer in layers[:blocks]:
                x = parts.block(layer, x)
            return parts.head(head, x) if blocks is None else x

        return jax.jit(function)

    def loss(self, params: PyTree, windows: jax.Array) -> jax.Array:
        return language_model.cross_entropy(self.forward()(params, windows[:, :-1]), windows[:, 1:]).mean()

    def validation_loss(self, params: PyTree) -> float:
        loss = float(self._loss(params, self.held_out))
        return loss if math.isfinite(loss) else 1e3

    @functools.cached_property
    def _loss(self) -> Any:
        return jax.jit(self.loss)

    @functools.cache  # noqa: B019
    def optimizer(self, factor: float = 1.0) -> optax.GradientTransformation:
        config = self.config
        rate = lambda peak: language_model.warmup_cosine(factor * peak, config.steps)
        rules = [("transforms/", "fixed"), ("embedding", "embed"), ("logits/|scale", "adamw"), ("kernel", "muon")]
        return optax.partition(
            {
                "muon": optax.contrib.muon(rate(config.learning_rate)),
                "embed": optax.sgd(rate(config.embed_learning_rate), momentum=0.9),
                "adamw": optax.adamw(rate(config.head_learning_rate)),
                "fixed": optax.set_to_zero(),
            },
            lambda params: trees.label_tree(params, rules),
        )

    @functools.cache  # noqa: B019
    def steps(self, factor: float, count: int) -> Any:
        """Jitted (parameters, optimizer state, first step) -> the same after `count` steps."""
        optimizer, config = self.optimizer(factor), self.config

        def one(carry: PyTree, step: jax.Array) -> tuple[PyTree, None]:
            params, opt_state = carry
            row_key, window_key = jax.random.split(jax.random.fold_in(self.key, step))
            rows = self.rows[jax.random.randint(row_key, (config.batch_size,), 0, len(self.rows))]
            windows = text.random_window(rows, window_key, block=self.gpt.block_size).astype(jnp.int32)
            updates, opt_state = optimizer.update(jax.grad(self.loss)(params, windows), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.jit(lambda carry, first: jax.lax.scan(one, carry, first + jnp.arange(count))[0])

    def fit(
        self, params: PyTree, *, factor: float = 1.0, morph: bool = False, spread: float | None = None, first: int = 0
    ) -> tuple[PyTree, list[float]]:
        """Trained parameters, and the validation loss every `evaluate_every` steps, from the start on."""
        config, carry = self.config, (params, self.optimizer(factor).init(params))
        count = math.gcd(config.evaluate_every, config.morph_every) if morph else config.evaluate_every
        losses = [self.validation_loss(params)]
        for step in range(count, config.steps + 1, count):
            carry = self.steps(factor, count)(carry, jnp.int32(first + step - count))
            if step % config.evaluate_every == 0:
                losses.append(self.validation_loss(carry[0]))
            if morph and step % config.morph_every == 0:
                params, opt_state = carry
                transforms = self.transforms(step, spread)
                opt_state = unextractable.transform_momentum(opt_state, params, transforms, self.rules)
                carry = unextractable.morph(params, transforms, self.rules), opt_state
        return carry[0], losses

    def save(self, folder: pathlib.Path, params: PyTree) -> None:
        np.savez(folder / "params.npz", *jax.tree.leaves(params))

    def load(self, folder: pathlib.Path) -> PyTree:
        with np.load(folder / "params.npz") as saved:
            return jax.tree.unflatten(jax.tree.structure(self.start()), list(saved.values()))


def _training(task: _Task, spread: float | None, morph: bool, case_dir: pathlib.Path) -> dict[str, Any]:
    params, losses = task.fit(task.start(), morph=morph, spread=spread)
    case_dir.mkdir(parents=True, exist_ok=True)
    task.save(case_dir, params)
    return {"losses": losses}


def _drift(task: _Task, trained: PyTree, case_dir: pathlib.Path) -> dict[str, Any]:
    """Change of the predictions after 1, 3, 10, 30, ... transforms."""
    config = task.config
    dtypes = {"float32": np.float32, "bfloat16": jnp.bfloat16}
    served = {name: jax.tree.map(lambda leaf, d=dtype: leaf.astype(d), trained) for name, dtype in dtypes.items()}
    predict = lambda name, params: jax.nn.log_softmax(
        task.forward(name)(params, task.held_out[:, :-1]).astype(jnp.float32)
    )
    original = {name: predict(name, params) for name, params in served.items()}
    models_ = {(name, how): params for name, params in served.items() for how in ("in place", "each")}
    master = unextractable.morphing.master_copy(trained)
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
            now = models_ | {
                (name, "master"): unextractable.morphing.cast_like(master, params) for name, params in served.items()
            }
            for (name, how), params in now.items():
                change = _change(original[name], predict(name, params), task.held_out[:, 1:])
                drift.setdefault(f"{name} {how}", []).append([time, *map(float, change)])
    last = {
        f"{measure} {name}": values[-1][i]
        for name, values in drift.items()
        for i, measure in ((1, "perplexity change"), (2, "JS drift"))
    }
    return {"drift": drift, "metrics": last}


@jax.jit
def _change(before: jax.Array, after: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(change of the perplexity, Jensen-Shannon divergence) of log-probabilities (B, T, V)."""
    loss = lambda p: -jnp.mean(jnp.take_along_axis(p, targets[..., None], axis=-1))
    middle = jnp.logaddexp(before, after) - math.log(2)
    divergence = lambda p: jnp.sum(jnp.exp(p) * (p - middle), axis=-1)
    js = jnp.maximum(jnp.mean(divergence(before) + divergence(after)) / 2, 0.0)
    change = jnp.exp(loss(after)) - jnp.exp(loss(before))
    return jnp.nan_to_num(change, nan=1e9, posinf=1e9), jnp.nan_to_num(js, nan=math.log(2))


def stitched(task: _Task, trained: PyTree, k: int) -> tuple[PyTree, PyTree, unextractable.Transform]:
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


def _stitching(task: _Task, trained: PyTree, case_dir: pathlib.Path) -> dict[str, Any]:
    """Perplexities of stitched models, bare and with bridges."""
    half = len(trained[1]) // 2
    bridge = [(regex, (None, right)) for regex, (_, right) in task.rules if right == ("boundary", half)]
    perplexity = lambda params: math.exp(min(task.validation_loss(params), 50.0))
    metrics = {"perplexity trained": perplexity(trained)}
    windows = np.asarray(task.rows[: 2 * len(task.held_out), : task.gpt.block_size]).astype(np.int32)
    same, others = np.split(windows[: len(windows) // 2 * 2], 2)
    for k in task.config.stitches:
        front, later, T = stitched(task, trained, k)
        join = lambda T, front=front: perplexity(unextractable.morph(front, {("boundary", half): T}, bridge))
        before = task.forward(blocks=half)(trained, same)
        metrics[f"perplexity stitched k={k}"] = perplexity(front)
        metrics[f"perplexity known bridge k={k}"] = join(T)
        for name, inputs in (("same", same), ("other", others)):
            found = unextractable.estimate_bridge(before, task.forward(blocks=half)(later, inputs))
            metrics[f"perplexity bridge from {name} inputs k={k}"] = join(
                unextractable.Transform(found, np.linalg.pinv(found))
            )
    return {"metrics": metrics}


def _learning(task: _Task, trained: PyTree, case_dir: pathlib.Path) -> dict[str, Any]:
    """Fine-tuning of a stitched model against training from scratch, both until the loss is near the trained one's."""
    config = task.config
    front, _, _ = stitched(task, trained, max(config.stitches))
    scratch = json.loads(
        (case_dir.parent / f"no_transforms-{case_dir.name.split('-')[-1]}" / "metrics.json").read_text()
    )
    target = scratch["losses"][-1] + config.margin
    # Its own data: the order of the text that the model was trained on is not repeated.
    curves = {factor: task.fit(front, factor=factor, first=10**6)[1] for factor in config.attack_learning_rates}
    reached = lambda losses: next((i for i, loss in enumerate(losses) if loss <= target), None)
    needed = [at for at in map(reached, curves.values()) if at is not None]
    from_scratch = reached(scratch["losses"])
    share = 100 * min(needed) / from_scratch if needed and from_scratch else None
    return {"metrics": {"tokens of the learning attack": share}, "curves": {str(f): c for f, c in curves.items()}}


def _figures(config: Config, parts: dict[str, dict[str, Any]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharex=True)
    for name, values in parts["drift"]["drift"].items():
        times, change, divergence = np.array(values).T
        style = {"in place": "-", "each": "--", "master": "-."}[name.split(" ", 1)[1]]
        colour = "tab:blue" if name.startswith("float32") else "tab:red"
        for axis, shown in zip(axes, (np.abs(change), divergence), strict=True):
            axis.plot(times, np.maximum(shown, 1e-9), style, color=colour, marker=".", label=name)
    for axis, label in zip(axes, ("change of the perplexity", "Jensen-Shannon divergence (nats)"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="transforms", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(workdir / "drift.png", dpi=130)
    plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
    steps = lambda losses: config.evaluate_every * np.arange(len(losses))
    for name, part in parts.items():
        if "losses" in part:
            axes[0].plot(steps(part["losses"]), part["losses"], label=name)
    scratch = parts["no transforms"]["losses"]
    axes[1].plot(steps(scratch), scratch, color="black", label="from scratch")
    for factor, losses in parts["learning"]["curves"].items():
        axes[1].plot(steps(losses), losses, label=f"stitched, {float(factor):g} x learning rate")
    axes[1].axhline(scratch[-1] + config.margin, color="grey", linewidth=1)
    axes[0].set(
        title=f"training, a transform every {config.morph_every} steps", ylabel="validation loss (nats per token)"
    )
    axes[1].set(title="the learning attack")
    for axis in axes:
        axis.set(xlabel="step", ylim=(scratch[-1] - 0.2, scratch[0] + 1))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(workdir / "training.png", dpi=130)
    plt.close(figure)
