"""Networks whose every weight is one of a few labels, trained for classification by any method of quantization.

    networks = load(config, Settings(steps=1000))
    trained = networks.train("pmf", seed=0, workdir=workdir)     # resumes from workdir
    logits = networks.task.logits(*trained.variables, images)    # of the quantized network

Every method trains the same network from the same draw. The LeNets are batch-normalised without scale and shift, as in
the authors' code; VGG and ResNet keep both as ordinary weights, where the authors' have none. `--recipe paper` has the
authors' number of steps and tuned hyperparameters; `short` anneals to the same kind of end in a fraction of the steps,
and needs learning rates three to a hundred times larger for it.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases, loop
from experiments._machinery.errors import DataError
from experiments._machinery.log import Record
from experiments._machinery.options import OneOf, Range
from experiments.data import images
from experiments.tasks import classification
from jaxlib_methods import models, quantization, trees
from jaxlib_methods.typing import PyTree

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
    growth: float  # of the inverse temperature
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


@dataclasses.dataclass(frozen=True)
class Options(classification.Options):
    """Options of every experiment with quantized networks; its `Config` adds its own."""

    model: Annotated[str, OneOf(models.NAMES)] = "lenet300"  # the LeNets are batch-normalised
    methods: tuple[Name, ...] = ("float", "pmf")
    recipe: Literal["short", "paper"] = "short"  # of the training
    validation_fraction: Annotated[float, Range(0, 1, closed="left")] = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.recipe == "paper" and self.model not in PAPER_RECIPES:
            raise ValueError(f"recipe 'paper' is for the models {', '.join(PAPER_RECIPES)}, got {self.model!r}")


class Settings(NamedTuple):
    """How networks are trained; None is the recipe's."""

    labels: tuple[float, ...] = quantization.labels.BINARY
    keep_float: tuple[str, ...] = ()  # regular expressions on paths of leaves to leave out, beside the batch norm
    jacobian: str = "double"  # of PMF
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    final_beta: float | None = None
    evaluate_every: int | None = None


class Trained(NamedTuple):
    """A network after its last step."""

    variables: tuple[PyTree, PyTree]  # weights, quantized where the method does that, and the batch-norm state
    history: list[Record]
    lattice: quantization.Lattice | None


class _ModelState(NamedTuple):
    count: jax.Array  # int32 []: forward passes done, on which the inverse temperature depends
    batch_norm: PyTree


class Program(NamedTuple):
    """The training by one method; the same objects for every seed compile nothing twice."""

    lattice: quantization.Lattice | None
    init: Callable[[jax.Array], tuple[PyTree, _ModelState]]
    loss_fn: loop.LossFn
    optimizer: optax.GradientTransformation
    evaluate: Callable[[loop.TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
    """What a run's cases share: the task, and a program a method."""

    options: Options
    settings: Settings
    task: classification.Task
    _programs: dict[str, Program] = dataclasses.field(default_factory=dict)

    def recipe(self, name: str) -> tuple[Recipe, int]:
        """The hyperparameters of a method, and the number of its steps."""
        settings = self.settings
        if self.options.recipe == "paper":
            recipe, steps = PAPER_RECIPES[self.options.model][name], settings.steps or PAPER_STEPS
        else:
            steps, short = settings.steps or 1500, SHORT_RECIPES[name]
            growth = (settings.final_beta or short.final_beta) ** (1 / 50)
            recipe = Recipe(short.learning_rate, short.decay, growth, max(1, steps // 50))
        return recipe._replace(learning_rate=settings.learning_rate or recipe.learning_rate), steps

    def program(self, name: str) -> Program:
        """The training by one method."""
        if name not in self._programs:
            recipe, steps = self.recipe(name)
            decay_every = max(1, 3 * steps // 10)
            rate = optax.exponential_decay(recipe.learning_rate, decay_every, recipe.decay, staircase=True)
            make = _float_program if name == "float" else _quantizing_program
            self._programs[name] = make(self, name, rate)
        return self._programs[name]

    def train(self, name: str, seed: int, workdir: pathlib.Path) -> Trained:
        """Trains one network, or goes on where an interrupted training stopped."""
        program, (_, steps) = self.program(name), self.recipe(name)
        init_key, train_key = jax.random.split(jax.random.key(seed))
        variables, model_state = program.init(init_key)
        state, history = self.task.fit(
            program.optimizer,
            loop.init_state(variables, program.optimizer, key=train_key, model_state=model_state),
            workdir,
            steps=steps,
            label=f"{self.options.model} {name} seed {seed}",
            evaluate=program.evaluate,
            loss_fn=program.loss_fn,
            steps_per_call=max(1, min(100, steps // 50)),
            evaluate_every=self.settings.evaluate_every or max(1, steps // 10),
        )
        weights = state.params  # quantize asserts that every weight is in its label set
        weights = weights if program.lattice is None else quantization.quantize(weights, program.lattice)
        return Trained((weights, state.model_state.batch_norm), history, program.lattice)

    def read(self, folder: pathlib.Path, name: str, seed: int) -> tuple[PyTree, PyTree]:
        """The weights and the batch-norm state of a finished case of the run in `folder`, see `save`."""
        path = cases.folder(folder, name, seed) / "network.npz"
        if not path.is_file():
            raise DataError(f"there is no network {path}; run the experiment quantize with this method first")
        like = jax.eval_shape(self.task.init, jax.random.key(0))
        with np.load(path) as arrays:
            names, shapes = jax.tree.leaves(trees.path_names(like)), jax.tree.leaves(like)
            found = {name: arrays[name].shape for name in arrays.files}
            if found != {name: leaf.shape for name, leaf in zip(names, shapes, strict=True)}:
                raise DataError(f"{path} holds another network: {found}; give the run's own model and data set")
            return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name in names])


def save(workdir: pathlib.Path, trained: Trained) -> None:
    """Leaves the network of a case in its folder, for the experiments that take networks of another run."""
    names, leaves = (jax.tree.leaves(tree) for tree in (trees.path_names(trained.variables), trained.variables))
    workdir.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
    np.savez_compressed(workdir / "network.npz", **arrays)


def load(options: Options, settings: Settings) -> Networks:
    """Loads the data and the network that all methods share."""
    batch_size = settings.batch_size or (128 if options.recipe == "paper" else 100)

    def build(key: jax.Array, dataset: images.Dataset) -> nnx.Module:
        if options.model not in ("lenet300", "lenet5"):
            return classification.network(options.model)(key, dataset)
        make = models.LeNet300 if options.model == "lenet300" else models.LeNet5
        shape = dataset.train.images.shape[1:]
        return make(dataset.num_classes, batch_norm=True, input_shape=shape, rngs=nnx.Rngs(params=key))

    task = classification.load(dataclasses.replace(options, batch_size=batch_size), build)
    return Networks(options, settings, task)


def _float_program(networks: Networks, name: str, rate: optax.Schedule) -> Program:
    del name
    if networks.options.recipe == "short":
        optimizer = optax.adam(rate)
    else:
        optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
    return _program(networks, None, optimizer, None, lambda variables, beta: variables)


def _quantizing_program(networks: Networks, name: str, rate: optax.Schedule) -> Program:
    method, settings, recipe = METHODS[name], networks.settings, networks.recipe(name)[0]
    shapes = jax.eval_shape(networks.task.init, jax.random.key(0))[0]
    normalised = any(jax.tree.leaves(trees.mask_tree(shapes, "bn/", allow_unmatched=True)))
    excluded = (*(("bn/",) if normalised else ()), *settings.keep_float)
    lattice = quantization.Lattice(settings.labels, tuple((regex, None) for regex in excluded), method.projection)
    annealed = quantization.inverse_temperature_schedule(recipe.growth, recipe.every, maximum=method.maximum)
    options = {"inverse_temperature": annealed} if method.annealed else {}
    if name == "pmf":
        options["jacobian"] = settings.jacobian

    def weights_of(variables: PyTree, beta: jax.Array) -> PyTree:
        if method.literal:
            return quantization.auxiliary.primal_to_weights(variables, lattice)
        return quantization.project(variables, lattice, beta)

    return _program(
        networks,
        lattice,
        method.optimizer(rate, lattice, **options),
        annealed if method.annealed else None,
        weights_of,
        literal=method.literal,
    )


def _program(
    networks: Networks,
    lattice: quantization.Lattice | None,
    optimizer: optax.GradientTransformation,
    annealed: Callable[[jax.Array], jax.Array] | None,
    weights_of: Callable[[PyTree, jax.Array], PyTree],  # (what is trained, inverse temperature) -> weights
    *,
    literal: bool = False,
) -> Program:
    task = networks.task
    beta_of = lambda state: jnp.float32(1) if annealed is None else annealed(state.count)

    @jax.jit
    def variables_of(key: jax.Array, params: PyTree) -> PyTree:
        aux = quantization.init_auxiliary(params, lattice, key=jax.random.fold_in(key, 1))
        return quantization.auxiliary.auxiliary_to_primal(aux, lattice) if literal else aux

    def init(key: jax.Array) -> tuple[PyTree, _ModelState]:
        params, batch_norm = task.init(key)
        state = _ModelState(jnp.zeros((), jnp.int32), batch_norm)
        return params if lattice is None else variables_of(key, params), state

    def loss_fn(variables: PyTree, state: _ModelState, batch: images.Split, key: jax.Array):
        del key
        beta = beta_of(state)
        logits, batch_norm = task.apply(weights_of(variables, beta), state.batch_norm, batch.images, True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return loss, (_ModelState(optax.safe_increment(state.count), batch_norm), {"beta": beta})

    def logits_fn(variables: PyTree, state: _ModelState, pixels: jax.Array) -> jax.Array:
        weights = variables if lattice is None else quantization.quantize(variables, lattice)
        return task.logits(weights, state.batch_norm, pixels)

    @jax.jit
    def share(variables: PyTree, state: _ModelState) -> jax.Array:
        return quantization.lattice.label_share(weights_of(variables, beta_of(state)), lattice, tolerance=1e-3)

    errors = task.evaluator(logits_fn)

    def evaluate(state: loop.TrainState) -> dict[str, float]:
        found = errors(state)
        return found if lattice is None else found | {"label_share": float(share(state.params, state.model_state))}

    return Program(lattice, init, loss_fn, optimizer, evaluate)
