"""Prune at initialisation and repair the isometry that pruning destroys: singular values, trainability, no labels.

Paper: Lee, Ajanthan, Gould, Torr, "A Signal Propagation Perspective for Pruning Neural Networks at Initialization",
ICLR 2020

    python -m experiments run signal_propagation                                       # embedded digits: minutes
    python -m experiments run signal_propagation --data-dir DIR --dataset mnist --width 100 --repair-steps 10000

Dense networks of up to a hundred layers: initialised, pruned once by connection sensitivity that is summed over the
whole training set, with labels ("snip") or with uniform targets ("unsupervised"), or at random; then repaired or not,
and trained under the mask. The singular values of the input-output Jacobian are measured after each stage.

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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments._machinery import cases, device_data, loop as training
from experiments._machinery.errors import NonFiniteLossError
from experiments.data import images as data
from experiments.tasks import deep_mlp
from jaxlib_methods import pruning
from jaxlib_methods.pruning import signal_propagation as propagation

PyTree = Any
Score = Literal["snip", "unsupervised", "random"]
SCORING_BATCH = 100  # examples of one gradient of the accumulated score


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of activation, depth, initialiser, score, repair and seed is one case; each is resumable."""

    dataset: str = "digits"  # digits, mnist, another TFDS set, or a path to an .npz
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    activations: tuple[Literal["linear", "tanh", "relu"], ...] = ("linear", "tanh", "relu")
    depths: tuple[int, ...] = (7, 30, 100)  # layers with weights
    width: int = 64  # the paper's: 100; at most the number of inputs, so that no layer widens
    initializers: tuple[str, ...] = (
        "orthogonal",
        "lecun_normal",
    )  # kinds of pruning.reinitialize; the first is repaired
    scores: tuple[Score, ...] = ("snip", "unsupervised", "random")
    sparsity: float = 0.9  # share of connections removed
    relu_gain: float = 2**0.5  # factor on the weights of ReLU networks; 1 in the authors' code
    repair_steps: int = 1000  # the paper's: 10,000
    learning_rates: tuple[float, ...] = (0.1, 0.01, 0.001)  # the first seed tries all of them
    momentum: float = 0.9
    steps: int = 300
    batch_size: int = 100
    evaluate_every: int = 50
    spectrum_examples: int = 100  # inputs whose Jacobians are measured; the paper takes the training set
    validation_fraction: float = 0.1
    seeds: int = 1

    def __post_init__(self):
        for name in ("activations", "depths", "initializers", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must lie in (0, 1), got {self.sparsity}; 0.9 removes 90 of 100 connections")
        if min(self.depths) < 3:
            raise ValueError(f"depths must be at least 3, got {self.depths}")
        for name in ("width", "relu_gain", "steps", "batch_size", "evaluate_every", "spectrum_examples", "seeds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not min(self.learning_rates) > 0:
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}")
        if self.repair_steps < 0:
            raise ValueError(f"repair_steps must not be negative, got {self.repair_steps}")


SMOKE = {
    "activations": ("tanh",),
    "depths": (5,),
    "width": 16,
    "initializers": ("orthogonal",),
    "scores": ("snip",),
    "repair_steps": 100,
    "learning_rates": (0.01,),
    "steps": 50,
    "spectrum_examples": 10,
}
PAPER: dict[str, float] = {}  # no number of its figures is known to the project


class Network(NamedTuple):
    """What names a case, but for its seed."""

    activation: str
    depth: int
    initializer: str
    score: str  # "dense", or one of Score
    repaired: bool

    @property
    def method(self) -> str:
        return f"{self.initializer} {self.score}" + (" repaired" if self.repaired else "")

    def __str__(self) -> str:
        return f"{self.activation} L={self.depth} {self.method}"


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figures and returns test errors and mean singular values, one per seed."""
    dataset = data.load(config.dataset, config.data_dir, config.validation_fraction)
    found: dict[Network, list[dict[str, Any]]] = {}
    for activation in config.activations:
        for depth in config.depths:
            task = _Task.of(config, dataset, activation)
            for network in _networks(config, activation, depth):
                rates, results = config.learning_rates, []
                for seed in range(config.seeds):
                    folder = workdir / "cases" / f"{network}-seed{seed}".replace(" ", "-")
                    results.append(cases.run_or_load(folder, functools.partial(_run_case, task, network, seed, rates)))
                    rates = (results[0]["learning_rate"],)
                found[network] = results
    metrics: dict[str, list[float]] = {}
    for network, results in found.items():
        metrics[f"test_error {network}"] = [result["test_error"] for result in results]
        metrics[f"singular_values {network}"] = [result["spectrum"]["mean"] for result in results]
    if jax.process_index() == 0:
        _figures(config, found, workdir)
    return metrics


def _networks(config: Config, activation: str, depth: int) -> list[Network]:
    """Dense and pruned networks of every initialiser; those of the first one also repaired."""
    networks = []
    for i, initializer in enumerate(config.initializers):
        networks.append(Network(activation, depth, initializer, "dense", False))
        for score in config.scores:
            repairs = (False, True) if i == 0 else (False,)
            networks += [Network(activation, depth, initializer, score, repaired) for repaired in repairs]
    return networks


class _Task(NamedTuple):
    """What the cases of one activation and depth share; compiled functions are kept as these objects stay the same."""

    config: Config
    dataset: data.Dataset
    train_split: device_data.OnDevice
    gain: float
    standardise: Callable[[jax.Array], jax.Array]
    logits: Callable[[PyTree, jax.Array], jax.Array]  # (params, standardised images) -> [batch, classes]
    loss_fn: training.LossFn
    optimizer: optax.GradientTransformation
    evaluators: tuple[Callable[[training.TrainState], dict[str, float]], ...]

    @classmethod
    def of(cls, config: Config, dataset: data.Dataset, activation: str) -> "_Task":
        mean, std = data.global_statistics(dataset.train.images)

        standardise = lambda images: data.standardise(images, mean, std)
        logits = functools.partial(deep_mlp.apply, activation=deep_mlp.ACTIVATIONS[activation])

        def loss_fn(params: PyTree, model_state: PyTree, batch: data.Split, key: jax.Array):
            del key
            return _cross_entropy(logits(params, standardise(batch.images)), batch.labels), (model_state, {})

        sgd = optax.inject_hyperparams(optax.sgd, static_args=("momentum",))(1.0, momentum=config.momentum)
        # Replaced by each case's masks and learning rate, so that all cases share one compiled program.
        optimizer = pruning.pruned(sgd, lambda params: jax.tree.map(lambda p: jnp.ones(p.shape, bool), params))
        mesh = device_data.data_mesh(config.batch_size)
        per_example = training.classification(lambda params, model_state, images: logits(params, standardise(images)))
        return cls(
            config,
            dataset,
            device_data.put(dataset.train, mesh),
            config.relu_gain if activation == "relu" else 1.0,
            standardise,
            logits,
            loss_fn,
            optimizer,
            (
                training.evaluator(per_example, dataset.test),
                training.evaluator(per_example, dataset.validation, prefix="validation_"),
            ),
        )

    def evaluate(self, state: training.TrainState) -> dict[str, float]:
        return {name: value for evaluate in self.evaluators for name, value in evaluate(state).items()}


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _run_case(
    task: _Task, network: Network, seed: int, rates: tuple[float, ...], case_dir: pathlib.Path
) -> dict[str, Any]:
    """Initialises, prunes, repairs and trains one network; training is repeated for every learning rate."""
    config = task.config
    init_key, score_key, train_key = jax.random.split(jax.random.key(seed), 3)
    params = deep_mlp.init(
        init_key,
        depth=network.depth,
        width=config.width,
        inputs=math.prod(task.dataset.train.images.shape[1:]),
        outputs=task.dataset.num_classes,
        kind=network.initializer,
        gain=task.gain if network.initializer == "orthogonal" else 1.0,
    )
    scores = _scores(task, network.score, params, score_key)
    masks = pruning.prune_masks(scores, 0.0 if network.score == "dense" else config.sparsity)
    params = pruning.apply_masks(params, masks)
    if network.repaired:
        layers = deep_mlp.unstack(deep_mlp.rescale(params, 1 / task.gain))
        repaired, _ = pruning.repair_isometry(layers, deep_mlp.unstack(masks), num_steps=config.repair_steps)
        params = deep_mlp.rescale(deep_mlp.stack(repaired), task.gain)
    inputs = jnp.asarray(task.standardise(task.dataset.test.images[: config.spectrum_examples]))
    spectrum = propagation.summarize_spectrum(_singular_values(task.logits, params, inputs))
    runs = {rate: _train(task, params, masks, rate, train_key, f"{network} lr={rate:g} seed {seed}") for rate in rates}
    rate = min(runs, key=lambda rate: runs[rate][-1].get("validation_loss", math.inf))
    weights = lambda tree: [layer["kernel"] for layer in deep_mlp.unstack(tree)]
    return {
        "learning_rate": rate,
        "test_error": runs[rate][-1]["test_error"],
        "curve": runs[rate],
        "spectrum": {name: float(value) for name, value in spectrum._asdict().items()},
        "isometry": float(pruning.isometry.isometry_loss(weights(deep_mlp.rescale(params, 1 / task.gain)))),
        "kept": [row.kept / row.total for row in pruning.sparsity.summarize_sparsity(weights(masks))[:-1]],
        "sensitivity": [row.mean for row in propagation.layer_sensitivity(weights(scores))],
    }


@functools.partial(jax.jit, static_argnums=0)
def _singular_values(logits: Callable[..., jax.Array], params: PyTree, inputs: jax.Array) -> jax.Array:
    """Of the Jacobian by the standardised pixels, [examples, classes]."""
    return propagation.jacobian_singular_values(logits, params, inputs)


def _scores(task: _Task, score: str, params: PyTree, key: jax.Array) -> PyTree:
    if score == "random":
        return pruning.scores.random(params, key=key)
    if score == "dense":
        return pruning.scores.magnitude(params)
    split = task.dataset.train
    count = len(split.labels) // SCORING_BATCH
    batch = data.Split(*(jnp.asarray(array[: count * SCORING_BATCH]) for array in split))
    return _sensitivity(task.logits, task.standardise, score, params, batch, count)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))
def _sensitivity(
    logits: Callable[..., jax.Array],
    standardise: Callable[[jax.Array], jax.Array],
    score: str,
    params: PyTree,
    batch: data.Split,
    count: int,
) -> PyTree:
    def loss(params: PyTree, batch: data.Split) -> jax.Array:
        out = logits(params, standardise(batch.images))
        return propagation.uniform_cross_entropy(out) if score == "unsupervised" else _cross_entropy(out, batch.labels)

    return pruning.connection_sensitivity(loss, params, batch, num_microbatches=count)


def _train(
    task: _Task, params: PyTree, masks: PyTree, rate: float, key: jax.Array, label: str
) -> list[dict[str, float]]:
    """The evaluated records; a run that diverges ends with the errors of guessing and no loss."""
    config = task.config
    state = training.init_state(params, task.optimizer, key=key)
    opt_state = optax.tree_utils.tree_set(state.opt_state._replace(masks=masks), learning_rate=jnp.float32(rate))
    try:
        _, history = training.fit(
            task.loss_fn,
            task.optimizer,
            state._replace(opt_state=opt_state),
            task.train_split,
            batch_size=config.batch_size,
            steps=config.steps,
            steps_per_call=min(50, config.evaluate_every),
            evaluate=task.evaluate,
            evaluate_every=config.evaluate_every,
            mesh=task.train_split.mesh,
            label=label,
        )
    except NonFiniteLossError:
        return [{"step": config.steps, "test_error": 100.0 - 100.0 / task.dataset.num_classes}]
    names = ("step", "loss", "test_error", "validation_loss")
    return [{name: record[name] for name in names} for record in history if "test_error" in record]


def _figures(config: Config, found: dict[Network, list[dict[str, Any]]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(network.method for network in found))
    colours = dict(zip(methods, plt.get_cmap("tab20").colors, strict=False))
    title = f"width {config.width}, {100 * config.sparsity:g}% removed, {pathlib.Path(config.dataset).stem}"
    panels = {"squeeze": False, "layout": "constrained"}
    width = 4.2 * len(config.activations)

    figure, axes = plt.subplots(1, len(config.activations), figsize=(width, 3.8), **panels)
    for axis, activation in zip(axes[0], config.activations, strict=True):
        for method in methods:
            spectra = [r[0]["spectrum"] for n, r in found.items() if (n.activation, n.method) == (activation, method)]
            middle = [max(s["mean"], 1e-30) for s in spectra]
            axis.plot(config.depths, middle, "o-", color=colours[method], label=method)
            low, high = ([max(s[name], 1e-30) for s in spectra] for name in ("min", "max"))
            axis.fill_between(config.depths, low, high, color=colours[method], alpha=0.1)
        axis.set(xscale="log", yscale="log", xlabel="layers", title=activation)
    axes[0, 0].set_ylabel("singular values of the Jacobian")
    axes[0, -1].legend(fontsize="xx-small")
    figure.suptitle(title)
    figure.savefig(workdir / "singular_values.png", dpi=150)
    plt.close(figure)

    deepest = max(config.depths)
    figure, axes = plt.subplots(2, len(config.activations), figsize=(width, 6), sharex=True, **panels)
    for column, activation in zip(axes.T, config.activations, strict=True):
        for network, results in found.items():
            pruned = network.score != "dense" and not network.repaired
            if pruned and (network.activation, network.depth) == (activation, deepest):
                for axis, name in zip(column, ("kept", "sensitivity"), strict=True):
                    axis.plot(results[0][name], color=colours[network.method], label=network.method)
        column[0].set(title=f"{activation}, {deepest} layers", ylabel="share of weights kept")
        column[1].set(xlabel="layer", ylabel="mean score", yscale="log")
    axes[0, -1].legend(fontsize="xx-small")
    figure.savefig(workdir / "layers.png", dpi=150)
    plt.close(figure)

    shape = (len(config.depths), len(config.activations))
    figure, axes = plt.subplots(*shape, figsize=(width, 3 * shape[0]), sharey=True, **panels)
    for row, depth in zip(axes, config.depths, strict=True):
        for axis, activation in zip(row, config.activations, strict=True):
            for network, results in found.items():
                if (network.activation, network.depth) == (activation, depth):
                    curve = results[0]["curve"]
                    steps, errors = [r["step"] for r in curve], [r["test_error"] for r in curve]
                    axis.plot(steps, errors, color=colours[network.method], label=network.method)
            axis.set(title=f"{activation}, {depth} layers", yscale="log", xlabel="step", ylabel="test error (%)")
    axes[0, -1].legend(fontsize="xx-small")
    figure.savefig(workdir / "training.png", dpi=150)
    plt.close(figure)
