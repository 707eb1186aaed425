"""RANP: neurons of a 3D-UNet removed before training by gate gradients, balanced and weighted by what layers cost.

Paper: Xu, Ajanthan, Vineet, Hartley, "RANP: Resource Aware Neuron Pruning at Initialization for 3D CNNs", 3DV 2020

    python -m experiments run ranp                                          # generated volumes, minutes on one core
    python -m experiments run ranp --dataset shapenet.npz --width 64 --sparsity 0.7824 --steps 100000   # for a GPU

A small labelled set of objects made of parts is segmented by the full network and by what each variant leaves of it:
RANP-f (FLOPs), RANP-m (memory), weighted (balanced layers alone), vanilla, random neurons, and the same share of every
layer. The smaller network is dense and trained from a new draw, so that what is removed is not paid for. A variant
that cannot reach the sparsity without emptying a layer is pruned to the largest one that it can, by bisection.
Figure: kept neurons by layer.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases, device_data, loop as training
from experiments.data import volumes
from jaxlib_methods import models, pruning

PyTree = Any
Variant = Literal["full", "ranp_f", "ranp_m", "weighted", "vanilla", "random", "layer_wise"]
PAPER: dict[str, float] = {}  # the paper's tables are of other data; its costs of the full networks are tests


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of variant and seed is one case; each is resumable."""

    dataset: str = "parts"  # "parts" (generated), or an .npz of voxels, see volumes.py
    size: int = 16  # voxels of a side of the generated volumes
    volumes: int = 192  # generated volumes to train on; a third as many to test on
    width: int = 16  # channels of the 3D-UNet at full resolution; the paper's is 64
    stages: int = 4  # resolutions of the 3D-UNet
    variants: tuple[Variant, ...] = ("full", "ranp_f", "ranp_m", "weighted", "vanilla", "random", "layer_wise")
    sparsity: float = 0.5  # share of neurons removed
    strength: float = 11.0  # lambda of the resource weights
    samples: int = 24  # volumes that score the neurons, one gradient for each
    multiple: int = 1  # round widths up to a multiple of this
    seeds: int = 1
    steps: int = 150
    batch_size: int = 4
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must lie in [0, 1), got {self.sparsity}; 0.78 removes 78 of 100 neurons")
        for name in (
            "volumes",
            "width",
            "stages",
            "samples",
            "multiple",
            "seeds",
            "steps",
            "batch_size",
            "learning_rate",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.variants:
            raise ValueError("variants is empty; name at least one")


SMOKE = {
    "volumes": 12,
    "width": 8,
    "stages": 1,
    "variants": ("ranp_f",),
    "sparsity": 0.3,
    "samples": 2,
    "steps": 4,
}


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figure and returns scores and costs, one per seed."""
    task = Task.of(config)
    found: dict[str, list[dict[str, Any]]] = {}
    for variant in config.variants:
        for seed in range(config.seeds):
            run_case = functools.partial(_run_case, task, variant, seed)
            result = cases.run_or_load(workdir / "cases" / f"{variant}-seed{seed}", run_case)
            found.setdefault(variant, []).append(result)
    if jax.process_index() == 0:
        _figure(task, found, workdir)
    metrics: dict[str, list[float]] = {}
    for variant, of_seeds in found.items():
        for seed, result in enumerate(of_seeds):
            values = {"test_miou": result["miou"]}
            if variant != "full":
                reduction = lambda name: 100 * (1 - result[name] / task.full[name])
                values |= {f"{name}_reduction": reduction(name) for name in ("flops", "memory", "parameters")}
                values["flops_ratio"] = task.full["flops"] / result["flops"]
                values |= {"sparsity": 100 * result["sparsity"], "max_sparsity": 100 * result["max_sparsity"]}
                if "full" in found:
                    values["step_time_ratio"] = found["full"][seed]["step_s"] / result["step_s"]
            for name, value in values.items():
                metrics.setdefault(f"{name} {variant}", []).append(value)
    return metrics


class Task(NamedTuple):
    """What all cases of a run share."""

    config: Config
    dataset: volumes.Dataset
    train_split: device_data.OnDevice
    example: jax.ShapeDtypeStruct
    network: nnx.Module  # abstract: shapes alone
    wiring: pruning.wiring.Wiring
    full: dict[str, int]  # costs of the full network
    init: Any  # key -> (params, model_state) of the full network
    importance: Any  # (params, model_state, samples) -> name of the layer -> [width]

    @classmethod
    def of(cls, config: Config) -> "Task":
        dataset = volumes.load(
            config.dataset, size=config.size, train=config.volumes, test=math.ceil(config.volumes / 3)
        )
        if config.samples > len(dataset.train.labels):
            raise ValueError(f"samples must be at most {len(dataset.train.labels)} volumes, got {config.samples}")
        shape = dataset.train.volumes.shape[1:]
        example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        sizes = {"channels": shape[-1], "width": config.width, "stages": config.stages}
        network = nnx.eval_shape(lambda: models.UNet3D(dataset.num_classes, **sizes, rngs=nnx.Rngs(0)))
        wiring = pruning.trace_wiring(network, example)
        graph = nnx.split(network, nnx.Param, ...)[0]

        @jax.jit
        def importance(params: PyTree, model_state: PyTree, samples: volumes.Split) -> dict[str, jax.Array]:
            loss = lambda params, batch: loss_of(graph, params, model_state, batch)[0]
            return pruning.neuron_importance(loss, params, samples, wiring)

        mesh = device_data.data_mesh(config.batch_size)
        costs = _costs(wiring.costs)
        split = device_data.put(dataset.train, mesh)
        return cls(config, dataset, split, example, network, wiring, costs, initialiser(network), importance)


def initialiser(network: nnx.Module) -> Any:
    """The paper's draw of all weights, compiled: key -> (params, model_state)."""
    return jax.jit(lambda key: nnx.split(pruning.removal.redraw_weights(network, key=key), nnx.Param, ...)[1:])


def _costs(rows: tuple[pruning.wiring.Cost, ...]) -> dict[str, int]:
    return {name: getattr(rows[-1], name) for name in ("flops", "memory", "parameters")}


def logits_of(graph: Any, params: PyTree, model_state: PyTree, x: jax.Array, mode: str) -> tuple[jax.Array, PyTree]:
    model = nnx.merge(graph, params, model_state, copy=True)
    getattr(model, mode)()
    logits = model(x.astype(jnp.float32))
    return logits, nnx.split(model, nnx.Param, ...)[2]


def loss_of(graph: Any, params: PyTree, model_state: PyTree, batch: volumes.Split) -> tuple[jax.Array, PyTree]:
    """Mean cross-entropy of the voxels whose label is not ignored."""
    logits, model_state = logits_of(graph, params, model_state, batch.volumes, "train")
    counted = batch.labels != volumes.IGNORED
    labels = jnp.where(counted, batch.labels, jnp.uint8(0)).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    total = jnp.maximum(jnp.sum(counted.astype(jnp.float32)), 1.0)
    return jnp.sum(jnp.where(counted, losses, jnp.zeros_like(losses))) / total, model_state


def _run_case(task: Task, variant: str, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
    """Prunes and trains one network; returns its test mIoU in percent, its costs and its widths."""
    config = task.config
    scored_key, drawn_key, random_key, train_key = jax.random.split(jax.random.key(seed), 4)
    kept, sparsity, best = choose(task, variant, *task.init(scored_key), random_key)
    net = pruning.remove_neurons(task.network, kept, task.wiring)
    graph = nnx.split(net, nnx.Param, ...)[0]
    params, model_state = initialiser(net)(drawn_key)

    def loss_fn(params: PyTree, model_state: PyTree, batch: volumes.Split, key: jax.Array):
        del key
        loss, model_state = loss_of(graph, params, model_state, batch)
        return loss, (model_state, {})

    # lr exp(0.04 (1 - epoch)) over 200 epochs, compressed to the length of this run
    schedule = optax.exponential_decay(config.learning_rate, config.steps, math.exp(-8))
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, config.momentum, nesterov=True)
    )
    evaluate = training.evaluator(functools.partial(overlaps, graph, task.dataset.num_classes), task.dataset.test)
    state, history = training.fit(
        loss_fn,
        optimizer,
        training.init_state(params, optimizer, key=train_key, model_state=model_state),
        task.train_split,
        batch_size=config.batch_size,
        steps=config.steps,
        steps_per_call=max(1, config.steps // 8),
        workdir=case_dir,
        mesh=task.train_split.mesh,
        label=f"3D-UNet {variant} seed {seed}",
    )
    return {
        "miou": mean_iou(evaluate(state), task.dataset.num_classes),
        "step_s": _step_seconds(history),
        "sparsity": sparsity,
        "max_sparsity": best,
        "widths": {name: int(mask.sum()) for name, mask in kept.items()},
        **_costs(pruning.wiring.network_costs(net, task.example)),
    }


def choose(
    task: Task, variant: str, params: PyTree, model_state: PyTree, key: jax.Array
) -> tuple[dict[str, np.ndarray], float, float]:
    """Which neurons to keep, the sparsity that was asked of the threshold, and the largest feasible one."""
    config, wiring = task.config, task.wiring
    if variant == "full":
        return {layer.name: np.ones(layer.width, bool) for layer in wiring.layers}, 0.0, 0.0
    if variant in ("random", "layer_wise"):
        widths = {layer.name: jax.ShapeDtypeStruct((layer.width,), jnp.float32) for layer in wiring.layers}
        scores = jax.device_get(pruning.scores.random(widths, key=key))
    if variant != "random":
        samples = jax.tree.map(lambda x: x[: config.samples], task.dataset.train)
        scores = jax.device_get(task.importance(params, model_state, samples))
    if variant in ("weighted", "ranp_f", "ranp_m"):
        scores = pruning.neuron_scores.balance_layers(scores)
    if variant in ("ranp_f", "ranp_m"):
        resource = "flops" if variant == "ranp_f" else "memory"
        resources = {layer.name: getattr(layer, resource) for layer in wiring.layers}
        scores = pruning.neuron_scores.reweight_layers(scores, resources, config.strength)
    scope = "per_layer" if variant == "layer_wise" else "global"

    def kept(sparsity: float) -> dict[str, np.ndarray]:
        masks = pruning.keep_neurons(scores, sparsity, scope=scope)
        return pruning.clean_up_neurons(masks, wiring, scores, multiple=config.multiple)

    best = pruning.neurons.max_sparsity(lambda sparsity: not pruning.neurons.empty_layers(kept(sparsity)))
    sparsity = min(config.sparsity, best)
    return kept(sparsity), sparsity, best


def overlaps(
    graph: Any, num_classes: int, params: PyTree, model_state: PyTree, batch: volumes.Split
) -> dict[str, jax.Array]:
    """Voxels in the intersection and in the union of prediction and label, by class, for each volume."""
    logits, _ = logits_of(graph, params, model_state, batch.volumes, "eval")
    predicted, counted = jnp.argmax(logits, axis=-1), batch.labels != volumes.IGNORED
    found = {}
    for c in range(num_classes):
        ours, theirs = (predicted == c) & counted, batch.labels == c
        count = lambda inside: jnp.sum(inside.astype(jnp.float32), axis=(1, 2, 3))
        found |= {f"and{c}": count(ours & theirs), f"or{c}": count(ours | theirs)}
    return found


def mean_iou(means: dict[str, float], num_classes: int) -> float:
    """Mean over the classes that occur, in percent; intersections and unions are of the whole test set."""
    pairs = [(means[f"test_and{c}"], means[f"test_or{c}"]) for c in range(num_classes)]
    return 100 * statistics.fmean(both / either for both, either in pairs if either)


def _step_seconds(history: list[dict[str, float]]) -> float:
    """Median seconds of a step, without the first dispatch, which compiles."""
    pairs = list(itertools.pairwise(history)) or [({"step": 0, "wall_s": 0.0}, history[-1])]
    return statistics.median((b["wall_s"] - a["wall_s"]) / (b["step"] - a["step"]) for a, b in pairs)


def _figure(task: Task, found: dict[str, list[dict[str, Any]]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [layer.name for layer in task.wiring.layers]
    figure, axes = plt.subplots(2, 1, figsize=(10, 6), sharex=True, layout="constrained")
    total = sum(layer.flops for layer in task.wiring.layers)
    axes[0].bar(range(len(names)), [100 * layer.flops / total for layer in task.wiring.layers], color="0.7")
    axes[0].set(ylabel="share of FLOPs (%)", title="the full network")
    for variant, of_seeds in found.items():
        if variant != "full":
            share = [[100 * r["widths"][layer.name] / layer.width for layer in task.wiring.layers] for r in of_seeds]
            axes[1].plot(range(len(names)), np.mean(share, axis=0), "o-", label=variant.replace("_", " "), alpha=0.8)
    axes[1].set(ylabel="neurons kept (%)", ylim=(0, 102), title=f"after removal, {task.config.seeds} seed(s)")
    axes[1].set_xticks(range(len(names)), [name.removesuffix("/conv") for name in names], rotation=60, ha="right")
    axes[1].grid(alpha=0.3)
    if axes[1].lines:
        axes[1].legend(ncols=6, fontsize="small")
    figure.savefig(workdir / "kept_neurons.png", dpi=120)
    plt.close(figure)
