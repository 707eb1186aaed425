"""Steps to a validation error: many trials of a network at each batch size, pruned by connection sensitivity or dense.

    study = Study(options)
    found = study.search("momentum", sparsity=0.9, batch_size=64, folder=folder)     # {"steps": K*, "trial": ..., ...}
    curve = study.lipschitz("momentum", 0.9, found["trial"])

Trial i has its own draw of the weights, its own order of the examples and the same metaparameters everywhere.
"""

import dataclasses
import functools
import pathlib
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments._machinery import device_data, options
from experiments._machinery.options import Count, OneOf, Range, Share
from experiments.data import images
from experiments.tasks import classification, metaparameters, pruned_networks, trials as vmapped
from jaxlib_methods import models, pruning, training_dynamics as dynamics
from jaxlib_methods.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
    """Options of a study of steps to a result; its `Config` adds the rows."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, a path to an .npz or to a folder of images
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    # Without batch norm; the paper's are simple_cnn and resnet8.
    model: Annotated[str, OneOf(models.NAMES)] = "lenet300"
    decay: Literal["constant", "linear"] = "constant"  # linear: to a searched factor over a searched number of steps
    goal_error: Annotated[float, Range(0, 1, remedy="0.05 is five percent")] = 0.05  # share of wrong examples
    trials: Count = 16  # of each search; the paper's: 100
    trials_at_once: Count | None = None  # vmapped; None: all of them
    max_steps: Count = 4000
    interval: Count = 20  # steps between checks, the resolution of K*; the paper's: 100
    early_stop: bool = True
    lipschitz_batch_size: int | None = 64  # of the trainings along which the Lipschitz constant is measured; None: none
    lipschitz_every: Annotated[int, Range(2)] = 50  # steps between measurements; the paper's: 1000
    lipschitz_steps: Count = 400
    lipschitz_examples: int | None = None  # of the full gradient; None: the training set
    validation_fraction: Share = 0.1


class Study:
    """The workload, and what all searches share."""

    def __init__(self, options: Options):
        self.options = options
        names = ("dataset", "data_dir", "validation_fraction")
        data = classification.Options(**{name: getattr(options, name) for name in names})
        task = classification.load(data, classification.network(options.model))
        rest = jax.eval_shape(task.init, jax.random.key(0))[1]
        if jax.tree.leaves(rest):
            raise ValueError(f"model {options.model!r} has state beside its parameters; take one without batch norm")
        self.init = lambda key: task.init(key)[0]
        self.logits = lambda params, pixels: task.logits(params, rest, pixels)
        self.dataset = task.dataset
        self._programs: dict[tuple[str, int, int], vmapped.Program] = {}

    def loss(self, params: PyTree, batch: images.Split) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(self.logits(params, batch.images), batch.labels).mean()

    def program(self, optimizer: str, batch_size: int, trials: int) -> vmapped.Program:
        """The compiled training of so many trials; the same for every sparsity."""
        if (optimizer, batch_size, trials) not in self._programs:
            mesh = vmapped.trials_mesh(trials)
            self._programs[optimizer, batch_size, trials] = vmapped.Program(
                self.loss,
                self.logits,
                metaparameters.make_optimizer(optimizer, self.options.decay)(learning_rate=1.0),
                *(device_data.replicate(split, mesh) for split in (self.dataset.train, self.dataset.validation)),
                batch_size=batch_size,
                interval=self.options.interval,
                mesh=mesh,
            )
        return self._programs[optimizer, batch_size, trials]

    @functools.cached_property
    def _params(self) -> PyTree:
        """Weights of all trials: trial i is drawn from key i, whatever is searched."""
        numbers = jnp.arange(self.options.trials, dtype=jnp.int32)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(numbers)
        return jax.jit(jax.vmap(self.init))(keys)

    @functools.cached_property
    def _scores(self) -> PyTree:
        """Their connection sensitivities."""
        mesh = vmapped.trials_mesh(self.options.trials)
        batch, count = pruned_networks.whole_batches(self.dataset.train)

        def score(params: PyTree, batch: images.Split) -> PyTree:
            return pruning.connection_sensitivity(self.loss, params, batch, num_microbatches=count)

        return vmapped.per_trial(score, mesh)(self._params, device_data.replicate(batch, mesh))

    def start(self, optimizer: str, sparsity: float, chosen: slice) -> vmapped.Trials:
        """Initial weights, masks, metaparameters and keys of some of the trials."""
        options = self.options
        # At sparsity 0 any scores keep everything: a study of dense networks alone computes none.
        found = self._params, self._scores if sparsity else self._params
        params, scores = jax.tree.map(lambda x: x[chosen], found)
        cut = lambda scores: pruning.prune_masks(scores, sparsity)
        masks = jax.jit(lambda scores: jax.lax.map(cut, scores))(scores)
        values = metaparameters.search(metaparameters.searched(optimizer, options.decay), options.trials)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1), i))(jnp.arange(options.trials, dtype=jnp.int32))
        values = {name: value[chosen] for name, value in values.items()}
        return vmapped.start(
            params, masks, values, keys[chosen], metaparameters.make_optimizer(optimizer, options.decay)
        )

    def search(self, optimizer: str, sparsity: float, batch_size: int, folder: pathlib.Path | None) -> dict[str, Any]:
        """K* (None where no trial reached the goal), its trial, and the status of every trial."""
        options = self.options
        size = min(options.trials_at_once or options.trials, options.trials)
        statuses: list[int] = []
        for first in range(0, options.trials, size):
            chosen = slice(first, min(first + size, options.trials))
            program = self.program(optimizer, batch_size, chosen.stop - chosen.start)
            _, status = program.run(
                self.start(optimizer, sparsity, chosen),
                goal_error=options.goal_error,
                max_steps=options.max_steps,
                early_stop=options.early_stop,
                best=min((s for s in statuses if s > 0), default=None),
                folder=None if folder is None else folder / f"trials-{first}",
            )
            statuses += status.tolist()
        steps = min((s for s in statuses if s > 0), default=None)
        if folder is not None:
            print(f"{optimizer} s={sparsity:g} B={batch_size}: K* = {steps}", flush=True)
        return {"steps": steps, "trial": None if steps is None else statuses.index(steps), "statuses": statuses}

    def lipschitz(self, optimizer: str, sparsity: float, trial: int) -> list[tuple[int, float]]:
        """Trains one trial again: (step, local Lipschitz constant on the way to it from the step before)."""
        options = self.options
        program = self.program(optimizer, options.lipschitz_batch_size, 1)
        state = self.start(optimizer, sparsity, slice(trial, trial + 1))
        masks = jax.tree.map(lambda x: x[0], state.masks)
        split = images.Split(*(jnp.asarray(x[: options.lipschitz_examples]) for x in self.dataset.train))

        @jax.jit
        def measure(params: PyTree, after: PyTree, masks: PyTree, split: images.Split) -> jax.Array:
            loss = lambda params, batch: self.loss(pruning.apply_masks(params, masks), batch)
            gradient = lambda params: dynamics.mean_gradient(loss, params, split)
            first = lambda tree: jax.tree.map(lambda x: x[0], tree)
            return dynamics.local_lipschitz(gradient, first(params), first(after))

        curve = []
        for step in range(options.lipschitz_every, options.lipschitz_steps + 1, options.lipschitz_every):
            before = program.advance(state, goal_error=-1.0, length=options.lipschitz_every - 1)  # no error is below it
            state = program.advance(before, goal_error=-1.0, length=1)
            curve.append((step, float(measure(before.params, state.params, masks, split))))
        return curve
