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
import itertools
import math
import pathlib
import statistics
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import plots
from experiments._machinery.options import Count, Positive, Range
from experiments._machinery.records import Case, Outcome, Targets
from experiments.data import volumes
from experiments.tasks import volume_segmentation
from jaxlib_methods import models, pruning
from jaxlib_methods.pruning import neuron_scores, neurons, wiring
from jaxlib_methods.typing import PyTree

Variant = Literal["full", "ranp_f", "ranp_m", "weighted", "vanilla", "random", "layer_wise"]
COSTS = ("flops", "memory", "parameters")


@dataclasses.dataclass(frozen=True)
class Config(volume_segmentation.Options):
    """Every combination of variant and seed is one case; each is resumable."""

    width: Count = 16  # channels of the 3D-UNet at full resolution; the paper's is 64
    stages: Count = 4  # resolutions of the 3D-UNet
    variants: tuple[Variant, ...] = ("full", "ranp_f", "ranp_m", "weighted", "vanilla", "random", "layer_wise")
    sparsity: Annotated[float, Range(0, 1, "left", "0.78 removes 78 of 100 neurons")] = 0.5  # share of neurons removed
    strength: float = 11.0  # lambda of the resource weights
    samples: Count = 24  # volumes that score the neurons, one gradient for each
    multiple: Count = 1  # round widths up to a multiple of this
    learning_rate: Positive = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4


SMOKE = {
    "volumes": 12, "width": 8, "stages": 1, "variants": ("ranp_f",), "sparsity": 0.3, "samples": 2, "steps": 4,
}  # fmt: skip
SHOWN = ("test_miou", "flops_reduction", "memory_reduction", "max_sparsity", "step_time_ratio")


def targets(config: Config) -> Targets:
    """None: the paper's tables are of other data; its costs of the full networks are tests."""
    del config
    return {}


def variants(config: Config) -> dict[str, str]:
    return {name: name for name in config.variants}


class Shared(NamedTuple):
    """What all cases of a run share."""

    config: Config
    task: volume_segmentation.Task
    network: nnx.Module  # abstract: shapes alone
    wiring: wiring.Wiring
    full: dict[str, int]  # costs of the full network
    init: Any  # key -> (params, model_state) of the full network
    importance: Any  # (params, model_state, samples) -> name of the layer -> [width]


def load(config: Config) -> Shared:
    task = volume_segmentation.load(config)
    dataset = task.dataset
    if config.samples > len(dataset.train.labels):
        raise ValueError(f"samples must be at most {len(dataset.train.labels)} volumes, got {config.samples}")
    sizes = {"channels": dataset.train.volumes.shape[-1], "width": config.width, "stages": config.stages}
    network = nnx.eval_shape(lambda: models.UNet3D(dataset.num_classes, **sizes, rngs=nnx.Rngs(0)))
    wired = pruning.trace_wiring(network, task.example)
    graph = nnx.split(network, nnx.Param, ...)[0]

    @jax.jit
    def importance(params: PyTree, model_state: PyTree, samples: volumes.Split) -> dict[str, jax.Array]:
        loss = lambda params, batch: volume_segmentation.loss_of(graph, params, model_state, batch)[0]
        return pruning.neuron_importance(loss, params, samples, wired)

    return Shared(config, task, network, wired, _costs(wired.costs), _initialiser(network), importance)


def _initialiser(network: nnx.Module) -> Any:
    """The paper's draw of all weights, compiled: key -> (params, model_state)."""
    return jax.jit(lambda key: nnx.split(pruning.removal.redraw_weights(network, key=key), nnx.Param, ...)[1:])


def _costs(rows: tuple[wiring.Cost, ...]) -> dict[str, int]:
    return {name: getattr(rows[-1], name) for name in COSTS}


def run(shared: Shared, variant: str, seed: int, workdir: pathlib.Path) -> Outcome:
    """Prunes and trains one network; its test mIoU in percent, what it costs less, and its widths."""
    config, task = shared.config, shared.task
    scored_key, drawn_key, random_key, train_key = jax.random.split(jax.random.key(seed), 4)
    kept, sparsity, best = choose(shared, variant, *shared.init(scored_key), random_key)
    net = pruning.remove_neurons(shared.network, kept, shared.wiring)
    graph = nnx.split(net, nnx.Param, ...)[0]
    # lr exp(0.04 (1 - epoch)) over 200 epochs, compressed to the length of this run
    schedule = optax.exponential_decay(config.learning_rate, config.steps, math.exp(-8))
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, config.momentum, nesterov=True)
    )
    label = f"3D-UNet {variant} seed {seed}"
    state, history = task.fit(graph, *_initialiser(net)(drawn_key), optimizer, train_key, workdir, label=label)
    metrics = {"test_miou": task.miou(graph, state)}
    if variant != "full":
        costs = _costs(wiring.network_costs(net, task.example))
        metrics |= {f"{name}_reduction": 100 * (1 - costs[name] / shared.full[name]) for name in COSTS}
        metrics["flops_ratio"] = shared.full["flops"] / costs["flops"]
        metrics |= {"sparsity": 100 * sparsity, "max_sparsity": 100 * best}
    widths = {name: int(mask.sum()) for name, mask in kept.items()}
    return Outcome(metrics, details={"widths": widths, "step_s": _step_seconds(history)})


def choose(
    shared: Shared, variant: str, params: PyTree, model_state: PyTree, key: jax.Array
) -> tuple[dict[str, np.ndarray], float, float]:
    """Which neurons to keep, the sparsity that was asked of the threshold, and the largest feasible one."""
    config, layers = shared.config, shared.wiring.layers
    if variant == "full":
        return {layer.name: np.ones(layer.width, bool) for layer in layers}, 0.0, 0.0
    if variant == "random":
        widths = {layer.name: jax.ShapeDtypeStruct((layer.width,), jnp.float32) for layer in layers}
        scores = jax.device_get(pruning.scores.random(widths, key=key))
    else:
        samples = jax.tree.map(lambda x: x[: config.samples], shared.task.dataset.train)
        scores = jax.device_get(shared.importance(params, model_state, samples))
    if variant in ("weighted", "ranp_f", "ranp_m"):
        scores = neuron_scores.balance_layers(scores)
    if variant in ("ranp_f", "ranp_m"):
        resource = "flops" if variant == "ranp_f" else "memory"
        resources = {layer.name: getattr(layer, resource) for layer in layers}
        scores = neuron_scores.reweight_layers(scores, resources, config.strength)
    scope = "per_layer" if variant == "layer_wise" else "global"

    def kept(sparsity: float) -> dict[str, np.ndarray]:
        masks = pruning.keep_neurons(scores, sparsity, scope=scope)
        return pruning.clean_up_neurons(masks, shared.wiring, scores, multiple=config.multiple)

    best = neurons.max_sparsity(lambda sparsity: not neurons.empty_layers(kept(sparsity)))
    sparsity = min(config.sparsity, best)
    return kept(sparsity), sparsity, best


def _step_seconds(history: list[dict[str, float]]) -> float:
    """Median seconds of a step, without the first dispatch, which compiles."""
    pairs = list(itertools.pairwise(history)) or [({"step": 0, "wall_s": 0.0}, history[-1])]
    return statistics.median((b["wall_s"] - a["wall_s"]) / (b["step"] - a["step"]) for a, b in pairs)


def compare(shared: Shared, cases: list[Case]) -> list[tuple[str, int, dict[str, float]]]:
    """How much faster than the full network's a step is."""
    del shared
    full = {case.seed: case.details["step_s"] for case in cases if case.name == "full"}
    return [
        (case.name, case.seed, {"step_time_ratio": full[case.seed] / case.details["step_s"]})
        for case in cases
        if case.name != "full" and case.seed in full
    ]


def figures(shared: Shared, cases: list[Case]) -> dict[str, Any]:
    layers = shared.wiring.layers
    figure, axes = plots.axes(2, 1, size=(10, 3), sharex=True)
    above, below = axes[:, 0]
    total = sum(layer.flops for layer in layers)
    above.bar(range(len(layers)), [100 * layer.flops / total for layer in layers], color="0.7")
    above.set(ylabel="share of FLOPs (%)", title="the full network")
    for name, of_seeds in plots.by_name([case for case in cases if case.name != "full"]).items():
        share = [[100 * case.details["widths"][layer.name] / layer.width for layer in layers] for case in of_seeds]
        below.plot(range(len(layers)), np.mean(share, axis=0), "o-", label=name.replace("_", " "), alpha=0.8)
    below.set(ylabel="neurons kept (%)", ylim=(0, 102), title=f"after removal, {shared.config.seeds} seed(s)")
    names = [layer.name.removesuffix("/conv") for layer in layers]
    below.set_xticks(range(len(layers)), names, rotation=60, ha="right")
    below.grid(alpha=0.3)
    if below.lines:
        below.legend(ncols=6, fontsize="small")
    return {"kept_neurons": figure}
