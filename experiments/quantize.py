"""Networks whose every weight is one of a few labels: proximal mean-field, mirror descent and their rivals.

Paper: Ajanthan, Dokania, Hartley, Torr, "Proximal Mean-field for Neural Network Quantization", ICCV 2019; Ajanthan,
Gupta, Torr, Hartley, Dokania, "Mirror Descent View for Neural Network Quantization", AISTATS 2021

    python -m experiments run quantize                        # LeNet-300-100 on the embedded digits: minutes, 2 cores
    python -m experiments run quantize --data-dir DIR --dataset mnist --steps 3000                        # minutes
    python -m experiments run quantize --data-dir DIR --dataset cifar10 --model resnet8_strided --final-beta 1e4
    python -m experiments run quantize --data-dir DIR --dataset cifar10 --model resnet18 --recipe paper   # for a GPU
    python -m experiments run quantize --data-dir DIR --dataset cifar10 --model vgg_d --recipe paper

Every method trains the same network from the same draw; the test error is that of the quantized network, in which
weights and biases of all layers, the first and the last too, are labels. `float` is the same network with ordinary
weights. The LeNets are batch-normalised without scale and shift, as in the authors' code; VGG and ResNet keep both as
ordinary weights, where the authors' have none. `--recipe paper` has the authors' number of steps and tuned
hyperparameters; the default, `short`, anneals to the same kind of end in a fraction of the steps, and needs learning
rates three to a hundred times larger for it. The paper keeps the checkpoint that is best on validation data; here the
last one counts. A case leaves its network in `network.npz`, for the experiment attack_quantized.
Figures: inverse temperature and share of weights within 1e-3 of a label by step; test error by step.
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
from flax import nnx

from experiments._machinery import cases, device_data, loop as training
from experiments._machinery.errors import DataError
from experiments.data import images as data
from jaxlib_methods import models, quantization, trees

PyTree = Any
Name = Literal["float", "bc", "picm", "pgd", "pmf", "gd_tanh", "md_softmax", "md_tanh", "md_softmax_s", "md_tanh_s"]


class Method(NamedTuple):
    projection: str
    optimizer: Callable[..., optax.GradientTransformation]  # (learning rate, lattice, **options)
    annealed: bool = True
    literal: bool = False  # whether it updates the primal variables themselves
    maximum: float = 1e4  # of the inverse temperature


METHODS = {
    "bc": Method("round", quantization.binary_connect, annealed=False),
    "picm": Method("argmax", quantization.icm, annealed=False),
    "pgd": Method("sparsemax", quantization.projected_gradient),
    "pmf": Method("softmax", quantization.proximal_mean_field),
    "gd_tanh": Method("tanh", quantization.proximal_mean_field),
    "md_softmax": Method("softmax", quantization.mirror_descent, literal=True),
    "md_tanh": Method("tanh", quantization.mirror_descent, literal=True),
    "md_softmax_s": Method("softmax", quantization.stable_mirror_descent, maximum=1e35),
    "md_tanh_s": Method("tanh", quantization.stable_mirror_descent, maximum=1e35),
}


class Recipe(NamedTuple):
    learning_rate: float
    decay: float  # of the learning rate, after 30, 60 and 90 % of the steps
    rho: float  # growth of the inverse temperature
    every: int  # steps between growths


class Short(NamedTuple):
    learning_rate: float
    decay: float = 0.3
    final_beta: float = 1000.0  # reached from 1 by 50 equal factors


# Learning rate, decay and final beta with the smallest validation error of LeNet-300-100 on MNIST after 2,000 steps.
SHORT_RECIPES = {
    "float": Short(3e-3),
    "bc": Short(1e-2),
    "picm": Short(3e-3),
    "pgd": Short(1e-1),
    "pmf": Short(3e-3),
    "gd_tanh": Short(3e-3),
    "md_softmax": Short(3e-1, 0.1, 100.0),
    "md_tanh": Short(1e-1, 0.1, 100.0),
    "md_softmax_s": Short(1e-2),
    "md_tanh_s": Short(1e-2),
}
PAPER_STEPS = 100_000
# The authors' scripts and tuned hyperparameters (both repositories). Where one gives none, its example script's.
PAPER_RECIPES = {
    "resnet18": {
        "float": Recipe(1e-1, 0.2, 1.0, 1),
        "bc": Recipe(1e-4, 0.2, 1.0, 1),
        "picm": Recipe(1e-4, 0.2, 1.0, 1),
        "pgd": Recipe(1e-1, 0.2, 1.02, 100),
        "pmf": Recipe(1e-3, 0.3, 1.1, 1000),
        "gd_tanh": Recipe(1e-3, 0.3, 1.1, 1000),
        "md_softmax": Recipe(1e-3, 0.2, 1.02, 200),
        "md_tanh": Recipe(1e-3, 0.3, 1.01, 100),
        "md_softmax_s": Recipe(1e-3, 0.3, 1.02, 200),
        "md_tanh_s": Recipe(1e-3, 0.3, 1.02, 200),
    },
    "vgg_d": {
        "float": Recipe(1e-1, 0.2, 1.0, 1),
        "bc": Recipe(1e-4, 0.2, 1.0, 1),
        "picm": Recipe(1e-4, 0.2, 1.0, 1),
        "pgd": Recipe(1e-1, 0.2, 1.02, 100),
        "pmf": Recipe(1e-3, 0.5, 1.05, 500),
        "gd_tanh": Recipe(1e-3, 0.5, 1.05, 500),
        "md_softmax": Recipe(1e-2, 0.2, 1.05, 500),
        "md_tanh": Recipe(1e-3, 0.3, 1.1, 1000),
        "md_softmax_s": Recipe(1e-3, 0.3, 1.2, 2000),
        "md_tanh_s": Recipe(1e-3, 0.2, 1.2, 2000),
    },
}
# Test error in percent, 100 minus the accuracies of the specification's tables: the second paper's as remembered there,
# not checked against its text, but for PMF, which is the re-tuned number of its repository's README.
PUBLISHED = {
    "cifar10/vgg_d": {
        "float": 6.67, "bc": 10.96, "pmf": 8.60, "gd_tanh": 8.53, "md_softmax": 9.53, "md_tanh": 8.36,
        "md_softmax_s": 8.70, "md_tanh_s": 8.47,
    },
    "cifar10/resnet18": {
        "float": 5.16, "bc": 8.36, "pmf": 6.76, "gd_tanh": 7.73, "md_softmax": 8.72, "md_tanh": 7.03,
        "md_softmax_s": 6.72, "md_tanh_s": 6.82,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of method and seed is one case; each is resumable."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, or a path to an .npz
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    model: str = "lenet300"  # lenet300, lenet5 (both batch-normalised), resnet8_strided, vgg_d, or another of models
    methods: tuple[Name, ...] = (
        "float", "bc", "picm", "pgd", "pmf", "md_softmax", "md_tanh", "md_softmax_s", "md_tanh_s",
    )  # fmt: skip
    labels: tuple[float, ...] = (-1.0, 1.0)  # md_tanh and picm are defined for two
    keep_float: tuple[str, ...] = ()  # regular expressions on paths of leaves to leave out, beside the batch norm
    jacobian: Literal["double", "single", "exact"] = "double"  # of PMF
    seeds: int = 1
    recipe: Literal["short", "paper"] = "short"
    steps: int | None = None  # None: the recipe's, 1,500 or 100,000
    batch_size: int | None = None  # None: 100, or 128 with the paper's recipe
    learning_rate: float | None = None  # of all methods; None: each method's own
    final_beta: float | None = None  # of the short recipe; None: each method's own
    validation_fraction: float = 0.1
    evaluate_every: int | None = None  # None: ten times in a run

    def __post_init__(self):
        if not self.methods:
            raise ValueError("methods is empty; name at least one")
        for name in ("seeds", "steps", "batch_size", "learning_rate", "evaluate_every"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.final_beta is not None and self.final_beta < 1:
            raise ValueError(f"final_beta must be at least 1, got {self.final_beta}: beta grows from 1")
        if self.model not in models.NAMES:
            raise ValueError(f"unknown model {self.model!r}; known are {', '.join(models.NAMES)}")
        if self.recipe == "paper" and self.model not in PAPER_RECIPES:
            raise ValueError(f"recipe 'paper' is for the models {', '.join(PAPER_RECIPES)}, got {self.model!r}")
        for method in set(self.methods) & {"md_tanh", "picm"}:
            if len(self.labels) != 2:
                raise ValueError(f"{method} is defined for two labels, got {self.labels}; leave it out of methods")


SMOKE = {"methods": ("float", "pmf", "md_tanh", "md_tanh_s"), "steps": 100}


def PAPER(config: Config) -> dict[str, float]:
    """The published numbers that this configuration can be compared with."""
    published = PUBLISHED.get(f"{config.dataset}/{config.model}", {}) if len(config.labels) == 2 else {}
    return {f"test_error {name}": error for name, error in published.items()}


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figures and returns the test errors, one per seed."""
    dataset = data.load(config.dataset, config.data_dir, config.validation_fraction)
    network = build_network(config, dataset)
    metrics: dict[str, list[float]] = {}
    histories: dict[str, list[dict[str, float]]] = {}
    for method in config.methods:
        task = _task(config, dataset, network, method)
        for seed in range(config.seeds):
            run_case = functools.partial(_run_case, task, seed)
            result = cases.run_or_load(workdir / "cases" / f"{method}-seed{seed}", run_case)
            for name, value in result["metrics"].items():
                metrics.setdefault(f"{name} {method}", []).append(value)
            histories.setdefault(method, result["history"])
    if jax.process_index() == 0:
        _figures(config, histories, workdir)
    return metrics


class Network(NamedTuple):
    """The network as functions of its weights; what all methods share."""

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]  # key -> (params, model_state)
    apply: Callable[..., tuple[jax.Array, PyTree]]  # (params, model_state, images, train) -> (logits, model_state)
    split: device_data.OnDevice


class _ModelState(NamedTuple):
    count: jax.Array  # int32 []: forward passes done, on which the inverse temperature depends
    batch_norm: PyTree


class _Task(NamedTuple):
    config: Config
    method: str
    steps: int
    batch_size: int
    lattice: quantization.Lattice | None
    init: Callable[[jax.Array], tuple[PyTree, _ModelState]]
    loss_fn: training.LossFn
    optimizer: optax.GradientTransformation
    evaluate: Callable[[training.TrainState], dict[str, float]]
    split: device_data.OnDevice


def _batch_size(config: Config) -> int:
    return config.batch_size or (128 if config.recipe == "paper" else 100)


def statistics(dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation that normalise the images: of all pixels where they are grey, else by channel."""
    grey = dataset.train.images.shape[-1] == 1
    return (data.global_statistics if grey else data.channel_statistics)(dataset.train.images)


def build_network(config: Config, dataset: data.Dataset) -> Network:
    mean, std = statistics(dataset)

    def build(key: jax.Array) -> nnx.Module:
        arguments = {"input_shape": dataset.train.images.shape[1:], "rngs": nnx.Rngs(params=key)}
        if config.model in ("lenet300", "lenet5"):
            make = models.LeNet300 if config.model == "lenet300" else models.LeNet5
            return make(dataset.num_classes, batch_norm=True, **arguments)
        return models.create(config.model, num_classes=dataset.num_classes, **arguments)

    graph = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))), nnx.Param, ...)[0]

    def apply(params: PyTree, model_state: PyTree, images: jax.Array, train: bool) -> tuple[jax.Array, PyTree]:
        model = nnx.merge(graph, params, model_state)
        model.train() if train else model.eval()
        logits = model(data.standardise(images, mean, std))
        return logits, nnx.split(model, nnx.Param, ...)[2]

    init = jax.jit(lambda key: nnx.split(build(key), nnx.Param, ...)[1:])
    return Network(init, apply, device_data.put(dataset.train, device_data.data_mesh(_batch_size(config))))


def _task(config: Config, dataset: data.Dataset, network: Network, name: str) -> _Task:
    method = METHODS.get(name)
    recipe, steps = _recipe(config, name)
    decay_every = max(1, 3 * steps // 10)
    rate = optax.exponential_decay(recipe.learning_rate, decay_every, recipe.decay, staircase=True)
    if method is None:
        lattice, beta_of = None, None
        optimizer = _float_optimizer(config, rate)
    else:
        excluded = (*(("bn/",) if _matches(network, "bn/") else ()), *config.keep_float)
        rules = tuple((regex, None) for regex in excluded)
        lattice = quantization.Lattice(config.labels, rules, method.projection)
        beta_of = quantization.inverse_temperature_schedule(recipe.rho, recipe.every, maximum=method.maximum)
        options = {"inverse_temperature": beta_of} if method.annealed else {}
        if name == "pmf":
            options["jacobian"] = config.jacobian
        optimizer = method.optimizer(rate, lattice, **options)

    def weights_of(variables: PyTree, beta: jax.Array) -> PyTree:
        if method is None:
            return variables
        if method.literal:
            return quantization.auxiliary.primal_to_weights(variables, lattice)
        return quantization.project(variables, lattice, beta)

    @jax.jit
    def variables_of(key: jax.Array, params: PyTree) -> PyTree:
        aux = quantization.init_auxiliary(params, lattice, key=jax.random.fold_in(key, 1))
        return quantization.auxiliary.auxiliary_to_primal(aux, lattice) if method.literal else aux

    def init(key: jax.Array) -> tuple[PyTree, _ModelState]:
        params, state = network.init(key)
        state = _ModelState(jnp.zeros((), jnp.int32), state)
        return params if method is None else variables_of(key, params), state

    def loss_fn(variables: PyTree, state: _ModelState, batch: data.Split, key: jax.Array):
        del key
        beta = beta_of(state.count) if method is not None and method.annealed else jnp.float32(1)
        weights = weights_of(variables, beta)
        logits, batch_norm = network.apply(weights, state.batch_norm, batch.images, True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        state = _ModelState(optax.safe_increment(state.count), batch_norm)
        return loss, (state, {"beta": beta})

    def logits_fn(variables: PyTree, state: _ModelState, images: jax.Array) -> jax.Array:
        weights = variables if method is None else quantization.quantize(variables, lattice)
        return network.apply(weights, state.batch_norm, images, False)[0]

    per_example = training.classification(logits_fn)
    evaluators = [
        training.evaluator(per_example, split, mesh=network.split.mesh, prefix=prefix)
        for split, prefix in ((dataset.test, "test_"), (dataset.validation, "validation_"))
        if split is not None
    ]

    @jax.jit
    def share(variables: PyTree, state: _ModelState) -> jax.Array:
        beta = beta_of(state.count) if method.annealed else jnp.float32(1)
        return quantization.lattice.label_share(weights_of(variables, beta), lattice, tolerance=1e-3)

    def evaluate(state: training.TrainState) -> dict[str, float]:
        found = {key: value for evaluator in evaluators for key, value in evaluator(state).items()}
        if method is not None:
            found["label_share"] = float(share(state.params, state.model_state))
        return found

    return _Task(config, name, steps, _batch_size(config), lattice, init, loss_fn, optimizer, evaluate, network.split)


def _recipe(config: Config, name: str) -> tuple[Recipe, int]:
    if config.recipe == "paper":
        recipe, steps = PAPER_RECIPES[config.model][name], config.steps or PAPER_STEPS
    else:
        steps, short = config.steps or 1500, SHORT_RECIPES[name]
        rho = (config.final_beta or short.final_beta) ** (1 / 50)
        recipe = Recipe(short.learning_rate, short.decay, rho, max(1, steps // 50))
    return recipe._replace(learning_rate=config.learning_rate or recipe.learning_rate), steps


def _float_optimizer(config: Config, rate: optax.Schedule) -> optax.GradientTransformation:
    if config.recipe == "short":
        return optax.adam(rate)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))


def _matches(network: Network, regex: str) -> bool:
    shapes = jax.eval_shape(network.init, jax.random.key(0))[0]
    return any(jax.tree.leaves(trees.mask_tree(shapes, regex, allow_unmatched=True)))


def _run_case(task: _Task, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
    """Trains one network; returns its errors in percent, its learning curve and what it takes in bits."""
    config = task.config
    init_key, train_key = jax.random.split(jax.random.key(seed))
    variables, model_state = task.init(init_key)
    every = config.evaluate_every or max(1, task.steps // 10)
    state, history = training.fit(
        task.loss_fn,
        task.optimizer,
        training.init_state(variables, task.optimizer, key=train_key, model_state=model_state),
        task.split,
        batch_size=task.batch_size,
        steps=task.steps,
        steps_per_call=max(1, min(100, task.steps // 50)),
        augment=_augment if config.dataset == "cifar10" else None,
        evaluate=task.evaluate,
        evaluate_every=every,
        workdir=case_dir,
        mesh=task.split.mesh,
        label=f"{config.model} {task.method} seed {seed}",
    )
    kept = ("step", "loss", "beta", "test_error", "validation_error", "label_share")
    last = history[-1]
    result = {
        "metrics": {name: last[name] for name in ("test_error", "label_share") if name in last},
        "history": [{name: record[name] for name in kept if name in record} for record in history],
    }
    network = state.params
    if task.lattice is not None:
        network = quantization.quantize(state.params, task.lattice)  # asserts that every weight is in its label set
        packed = quantization.packing.packed_bytes(quantization.pack(network, task.lattice))
        result |= {"packed_bytes": packed, "times_smaller": quantization.packing.packed_bytes(network) / packed}
    if jax.process_index() == 0:
        _save(case_dir / "network.npz", (network, state.model_state.batch_norm))
    return result


def _save(path: pathlib.Path, trained: tuple[PyTree, PyTree]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names, leaves = jax.tree.leaves(trees.path_names(trained)), jax.tree.leaves(trained)
    np.savez_compressed(path, **{name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)})


def load_trained(case_dir: pathlib.Path, network: Network) -> tuple[PyTree, PyTree]:
    """The weights, quantized where the method does that, and the batch-norm state of a finished case."""
    like = jax.eval_shape(network.init, jax.random.key(0))
    path = case_dir / "network.npz"
    if not path.is_file():
        raise DataError(f"there is no network {path}; run the experiment quantize with this method first")
    with np.load(path) as arrays:
        names, shapes = jax.tree.leaves(trees.path_names(like)), jax.tree.leaves(like)
        found = {name: arrays[name].shape for name in arrays.files}
        if found != {name: leaf.shape for name, leaf in zip(names, shapes, strict=True)}:
            raise DataError(f"{path} holds another network: {found}; give the run's own model and data set")
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in names])


def _augment(batch: data.Split, key: jax.Array) -> data.Split:
    crop_key, flip_key = jax.random.split(key)
    return batch._replace(images=device_data.random_flip(device_data.random_crop(batch.images, crop_key), flip_key))


def _figures(config: Config, histories: dict[str, list[dict[str, float]]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    title = f"{config.model} on {pathlib.Path(config.dataset).stem}"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharex=True)
    for name, history in histories.items():
        if name in METHODS and METHODS[name].annealed:
            axes[0].plot([r["step"] for r in history], [r["beta"] for r in history], label=name)
        shares = [(r["step"], 100 * r["label_share"]) for r in history if "label_share" in r]
        if shares:
            axes[1].plot(*np.transpose(shares), marker=".", label=name)
    axes[0].set(yscale="log", xlabel="step", ylabel="inverse temperature")
    axes[1].set(xlabel="step", ylabel="weights within 1e-3 of a label (%)", ylim=(-2, 102))
    for axis in axes:
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(workdir / "annealing.png", dpi=130)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, history in histories.items():
        evaluated = [r for r in history if "test_error" in r]
        axis.plot([r["step"] for r in evaluated], [r["test_error"] for r in evaluated], marker=".", label=name)
    axis.set(yscale="log", xlabel="step", ylabel="test error of the quantized network (%)", title=title)
    axis.legend(fontsize="small")
    figure.savefig(workdir / "training.png", dpi=130)
    plt.close(figure)
