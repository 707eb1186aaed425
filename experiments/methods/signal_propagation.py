"""Prune at initialisation and repair the isometry that pruning destroys: singular values, trainability, no labels.

Paper: Lee, Ajanthan, Gould, Torr, "A Signal Propagation Perspective for Pruning Neural Networks at Initialization",
ICLR 2020

    python -m experiments run signal_propagation                                       # embedded digits: minutes
    python -m experiments run signal_propagation --data-dir DIR --dataset mnist --width 100 --repair-steps 10000

Dense networks of up to a hundred layers: initialised, pruned once by connection sensitivity that is summed over the
whole training set, with labels ("snip") or with uniform targets ("unsupervised"), or at random; then repaired or not,
and trained under the mask. The singular values of the input-output Jacobian are measured before training.

A ReLU halves the variance of what it passes, so a network of orthogonal layers with ReLU has the gain sqrt(2) here; the
authors take 1 for every activation (`--relu-gain 1`), with which a hundred layers transmit 2^-50. The repair works on
the weights without their gain. Each network picks its learning rate by the validation loss of the first seed.
Figures: singular values against depth; connections kept and mean score by layer of the deepest networks; training.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments._machinery import loop, plots
from experiments._machinery.errors import NonFiniteLossError
from experiments._machinery.options import Count, Positive, Range, Share
from experiments._machinery.records import Case, Outcome, Targets
from experiments.data import images
from experiments.tasks import classification, deep_mlp, pruned_networks
from jaxlib_methods import pruning
from jaxlib_methods.pruning import signal_propagation as propagation
from jaxlib_methods.typing import InitializerKind, PyTree

Score = Literal["snip", "unsupervised", "random"]


@dataclasses.dataclass(frozen=True)
class Config(classification.Options):
    """Every combination of activation, depth, initialiser, score, repair and seed is one case; each is resumable."""

    activations: tuple[Literal["linear", "tanh", "relu"], ...] = ("linear", "tanh", "relu")
    depths: tuple[Annotated[int, Range(3)], ...] = (7, 30, 100)  # layers with weights
    width: Count = 64  # the paper's: 100; at most the number of inputs, so that no layer widens
    initializers: tuple[InitializerKind, ...] = ("orthogonal", "lecun_normal")  # the first is repaired
    scores: tuple[Score, ...] | None = ("snip", "unsupervised", "random")
    sparsity: Annotated[float, Range(0, 1, "neither", "0.9 removes 90 of 100 connections")] = 0.9
    relu_gain: Positive = 2**0.5  # factor on the weights of ReLU networks; 1 in the authors' code
    repair_steps: Annotated[int, Range(0)] = 1000  # the paper's: 10,000
    learning_rates: tuple[Positive, ...] = (0.1, 0.01, 0.001)  # the first seed tries all of them
    momentum: float = 0.9
    steps: Count = 300
    evaluate_every: Count = 50
    spectrum_examples: Count = 100  # inputs whose Jacobians are measured; the paper takes the training set
    validation_fraction: Share = 0.1


SMOKE = {
    "activations": ("tanh",), "depths": (5,), "width": 16, "initializers": ("orthogonal",), "scores": ("snip",),
    "repair_steps": 100, "learning_rates": (0.01,), "steps": 50, "spectrum_examples": 10,
}  # fmt: skip
SHOWN = ("test_error", "singular_values")
TUNED_BY = "validation_loss"


class Network(NamedTuple):
    """What names a case, but for its seed."""

    activation: str
    depth: int
    initializer: str
    score: str  # "dense", or a Score
    repaired: bool

    @property
    def method(self) -> str:
        return f"{self.initializer} {self.score}" + (" repaired" if self.repaired else "")

    def __str__(self) -> str:
        return f"{self.activation} L={self.depth} {self.method}"


def targets(config: Config) -> Targets:
    """None: no number of the paper's figures is known to the project."""
    del config
    return {}


def variants(config: Config) -> dict[str, Network]:
    """Dense and pruned networks of every initialiser; those of the first one also repaired."""
    pruned = [("dense", False), *((score, repaired) for score in config.scores or () for repaired in (False, True))]
    rows = [
        Network(activation, depth, initializer, *how)
        for activation in config.activations
        for depth in config.depths
        for initializer in config.initializers
        for how in pruned
        if initializer == config.initializers[0] or not how[1]
    ]
    return {str(row): row for row in rows}


def candidates(config: Config, name: str, chosen: dict[str, float]) -> tuple[float, ...]:
    """Learning rates, the same ones for every network."""
    del name, chosen
    return config.learning_rates


def load(config: Config) -> classification.Data:
    return classification.load_data(config, per_channel=False)


class Program(NamedTuple):
    """What the networks of one activation share."""

    gain: float
    logits: Callable[[PyTree, jax.Array], jax.Array]  # (params, standardised images) -> [batch, classes]
    loss_fn: loop.LossFn
    optimizer: optax.GradientTransformation
    evaluate: Callable[[loop.TrainState], dict[str, float]]


@functools.lru_cache(maxsize=1)  # an activation's networks follow one another
def make_program(data: classification.Data, activation: str) -> Program:
    """Compiles what trains networks of any depth."""
    config = data.options
    logits = functools.partial(deep_mlp.apply, activation=deep_mlp.ACTIVATIONS[activation])

    def loss_fn(params: PyTree, model_state: PyTree, batch: images.Split, key: jax.Array):
        del key
        return pruned_networks.cross_entropy(logits(params, data.standardise(batch.images)), batch.labels), (
            model_state,
            {},
        )

    sgd = optax.inject_hyperparams(optax.sgd, static_args=("momentum",))(1.0, momentum=config.momentum)
    # Replaced by each case's masks and learning rate, so that all cases share one compiled program.
    optimizer = pruning.pruned(sgd, lambda params: jax.tree.map(lambda p: jnp.ones(p.shape, bool), params))
    evaluate = data.evaluator(lambda params, model_state, pixels: logits(params, data.standardise(pixels)))
    return Program(config.relu_gain if activation == "relu" else 1.0, logits, loss_fn, optimizer, evaluate)


class Initial(NamedTuple):
    params: PyTree  # masked, and repaired where the network is
    masks: PyTree
    key: jax.Array  # of the training
    metrics: dict[str, float]
    details: dict[str, Any]


@functools.lru_cache(maxsize=1)  # the learning rates of a network follow one another
def make_initial(data: classification.Data, network: Network, seed: int) -> Initial:
    """Initialises, prunes, repairs and measures one network."""
    config, program = data.options, make_program(data, network.activation)
    init_key, score_key, train_key = jax.random.split(jax.random.key(seed), 3)
    params = deep_mlp.init(
        init_key,
        depth=network.depth,
        width=config.width,
        inputs=math.prod(data.dataset.train.images.shape[1:]),
        outputs=data.dataset.num_classes,
        kind=network.initializer,
        gain=program.gain if network.initializer == "orthogonal" else 1.0,
    )
    scores = _scores(data, program, network.score, params, score_key)
    masks = pruning.prune_masks(scores, 0.0 if network.score == "dense" else config.sparsity)
    params = pruning.apply_masks(params, masks)
    if network.repaired:
        layers = deep_mlp.unstack(deep_mlp.rescale(params, 1 / program.gain))
        repaired, _ = pruning.repair_isometry(layers, deep_mlp.unstack(masks), num_steps=config.repair_steps)
        params = deep_mlp.rescale(deep_mlp.stack(repaired), program.gain)
    inputs = jnp.asarray(data.standardise(data.dataset.test.images[: config.spectrum_examples]))
    spectrum = propagation.summarize_spectrum(_singular_values(program.logits, params, inputs))
    weights = lambda tree: [layer["kernel"] for layer in deep_mlp.unstack(tree)]
    details = {
        "spectrum": {name: float(value) for name, value in spectrum._asdict().items()},
        "isometry": float(pruning.isometry.isometry_loss(weights(deep_mlp.rescale(params, 1 / program.gain)))),
        "kept": [row.kept / row.total for row in pruning.sparsity.summarize_sparsity(weights(masks))[:-1]],
        "sensitivity": [row.mean for row in propagation.layer_sensitivity(weights(scores))],
    }
    return Initial(params, masks, train_key, {"singular_values": details["spectrum"]["mean"]}, details)


@functools.partial(jax.jit, static_argnums=0)
def _singular_values(logits: Callable[..., jax.Array], params: PyTree, inputs: jax.Array) -> jax.Array:
    """Of the Jacobian by the standardised pixels, [examples, classes]."""
    return propagation.jacobian_singular_values(logits, params, inputs)


def _scores(data: classification.Data, program: Program, score: str, params: PyTree, key: jax.Array) -> PyTree:
    if score == "random":
        return pruning.scores.random(params, key=key)
    if score == "dense":
        return pruning.scores.magnitude(params)
    batch, count = pruned_networks.whole_batches(data.dataset.train)
    batch = jax.tree.map(jnp.asarray, batch)
    return pruned_networks.sensitivity(program.logits, data.standardise, score, params, batch, count)


def run(data: classification.Data, variant: Network, seed: int, workdir: pathlib.Path, rate: float) -> Outcome:
    """Trains one network; a run that diverges ends with the error of guessing and no loss."""
    del workdir  # a training is as short as a checkpoint's worth
    config, program, initial = data.options, make_program(data, variant.activation), make_initial(data, variant, seed)
    state = loop.init_state(initial.params, program.optimizer, key=initial.key)
    opt_state = state.opt_state._replace(masks=initial.masks)
    opt_state = optax.tree_utils.tree_set(opt_state, learning_rate=jnp.float32(rate))
    try:
        _, history = data.fit(
            program.optimizer,
            state._replace(opt_state=opt_state),
            None,
            steps=config.steps,
            label=f"{variant} lr={rate:g} seed {seed}",
            evaluate=program.evaluate,
            loss_fn=program.loss_fn,
            steps_per_call=min(50, config.evaluate_every),
            evaluate_every=config.evaluate_every,
            augment=None,
        )
    except NonFiniteLossError:
        guessing = 100.0 - 100.0 / data.dataset.num_classes
        history = [{"step": config.steps, "test_error": guessing}]
    names = ("step", "loss", "test_error", "validation_loss")
    curve = [{name: r[name] for name in names if name in r} for r in history if "test_error" in r]
    last = {name: curve[-1][name] for name in ("test_error", "validation_loss") if name in curve[-1]}
    return Outcome(last | initial.metrics, curve, initial.details | {"learning_rate": rate})


def figures(data: classification.Data, cases: list[Case]) -> dict[str, Any]:
    config = data.options
    title = f"width {config.width}, {100 * config.sparsity:g}% removed, {pathlib.Path(config.dataset).stem}"
    first = {case.variant: case for case in cases if case.seed == cases[0].seed}
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(network.method for network in first))}
    style = lambda network: {"color": colours[network.method], "label": network.method}
    columns = len(config.activations)

    spectra, axes = plots.axes(1, columns, size=(4.2, 3.8))
    for axis, activation in zip(axes[0], config.activations, strict=True):
        for method in colours:
            of = [n for n in first if (n.activation, n.method) == (activation, method)]
            found = [first[network].details["spectrum"] for network in of]
            depths = [network.depth for network in of]
            mean, low, high = ([max(s[name], 1e-30) for s in found] for name in ("mean", "min", "max"))
            axis.plot(depths, mean, "o-", **style(of[0]))
            axis.fill_between(depths, low, high, color=colours[method], alpha=0.1)
        axis.set(xscale="log", yscale="log", xlabel="layers", title=activation)
    axes[0, 0].set_ylabel("singular values of the Jacobian")
    axes[0, -1].legend(fontsize="xx-small")
    spectra.suptitle(title)

    deepest = max(config.depths)
    layers, axes = plots.axes(2, columns, size=(4.2, 3.0), sharex=True)
    for column, activation in zip(axes.T, config.activations, strict=True):
        for network, case in first.items():
            pruned = network.score != "dense" and not network.repaired
            if pruned and (network.activation, network.depth) == (activation, deepest):
                column[0].plot(case.details["kept"], **style(network))
                column[1].plot(case.details["sensitivity"], **style(network))
        column[0].set(title=f"{activation}, {deepest} layers", ylabel="share of weights kept")
        column[1].set(xlabel="layer", ylabel="mean score", yscale="log")
    axes[0, -1].legend(fontsize="xx-small")

    training, axes = plots.axes(len(config.depths), columns, size=(4.2, 3.0), sharey=True)
    for row, depth in zip(axes, config.depths, strict=True):
        for axis, activation in zip(row, config.activations, strict=True):
            for network, case in first.items():
                if (network.activation, network.depth) == (activation, depth):
                    errors = [(point["step"], point["test_error"]) for point in case.curve]
                    axis.plot(*zip(*errors, strict=True), **style(network))
            axis.set(title=f"{activation}, {depth} layers", yscale="log", xlabel="step", ylabel="test error (%)")
    axes[0, -1].legend(fontsize="xx-small")
    return {"singular_values": spectra, "layers": layers, "training": training}
