"""Many trainings as one: trials that differ in their metaparameters and seeds, vmapped and spread over the devices.

    program = Program(loss_fn, logits_fn, optimizer, train, validation, batch_size=32, interval=100, mesh=mesh)
    state, status = program.run(start(...), goal_error=0.02, max_steps=40_000, folder=folder)

Every `interval` steps each trial's error on the whole validation set is compared with the goal. The first step at which
it is reached is the trial's steps-to-result; a loss or logit that is not finite makes it infeasible. A trial that is
done changes no more. Trial i sees its own endless stream of shuffled epochs.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments._machinery import device_data
from experiments._machinery.checkpoint import Checkpoints
from experiments.data import images as data
from jaxlib_methods import pruning

PyTree = Any
INCOMPLETE, INFEASIBLE = -1, -2  # instead of the steps to the result
_EVALUATED_AT_ONCE = 1000  # validation examples
_SPREAD = PartitionSpec(device_data.AXIS)


class Trials(NamedTuple):
    step: jax.Array  # int32 []: steps done
    params: PyTree  # leading axis: trials, as in all below; pruned entries are 0
    masks: PyTree  # bool, like params
    opt_state: PyTree
    key: jax.Array  # typed key [trials]: of the order of the examples
    status: jax.Array  # int32 [trials]: steps to the result, INCOMPLETE or INFEASIBLE


def trials_mesh(trials: int) -> Mesh:
    """The devices that share the trials evenly, as many as there can be."""
    return device_data.data_mesh(trials)


def per_trial(fn: Callable[..., PyTree], mesh: Mesh) -> Callable[..., PyTree]:
    """`fn(trial, shared) -> result` for all trials: their leading axis is spread, `shared` is on every device."""
    spread = jax.shard_map(
        jax.vmap(fn, in_axes=(0, None)), mesh=mesh, in_specs=(_SPREAD, PartitionSpec()), out_specs=_SPREAD
    )
    return jax.jit(spread)


def start(
    params: PyTree,
    masks: PyTree,
    metaparameters: dict[str, np.ndarray],
    key: jax.Array,
    optimizer_of: Callable[..., optax.GradientTransformation],
) -> Trials:
    """The state before the first step, spread over the devices.

    Args:
      params: initial weights; leading axis: trials, as in all others.
      masks: booleans like them.
      metaparameters: by name, for `optimizer_of(**metaparameters)`.
      key: of the order of the examples.
      optimizer_of: makes the optimizer of one trial; only its `init` is used.
    """
    mesh = trials_mesh(len(key))
    params = pruning.apply_masks(params, masks)
    values = {name: jnp.asarray(value, jnp.float32) for name, value in metaparameters.items()}
    opt_state = jax.vmap(lambda values, params: optimizer_of(**values).init(params))(values, params)
    status = jnp.full(len(key), INCOMPLETE, jnp.int32)
    trials = jax.device_put((params, masks, opt_state, key, status), NamedSharding(mesh, _SPREAD))
    return Trials(jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec())), *trials)


class Program:
    """The compiled training of some trials at one batch size, the same for every sparsity.

    Args:
      loss_fn: `(params, batch) -> loss []`, of one trial.
      logits_fn: `(params, images) -> [batch, classes]`.
      optimizer: one whose metaparameters are in its state (`optax.inject_hyperparams`).
      train: on every device of `mesh`, see `device_data.replicate`.
      validation: likewise.
      batch_size: examples per step and trial.
      interval: steps between checks.
      mesh: from `trials_mesh`.
    """

    def __init__(
        self,
        loss_fn: Callable[[PyTree, data.Split], jax.Array],
        logits_fn: Callable[[PyTree, jax.Array], jax.Array],
        optimizer: optax.GradientTransformation,
        train: data.Split,
        validation: data.Split,
        *,
        batch_size: int,
        interval: int,
        mesh: Mesh,
    ):
        self.interval, self.mesh, self.data = interval, mesh, (train, validation)

        def one_trial(trial: tuple, data: tuple) -> tuple:
            """Steps of one trial on its rows of examples, and a check."""
            params, masks, opt_state, rows, status = trial
            train, validation = data
            masked_loss = lambda params, batch: loss_fn(pruning.apply_masks(params, masks), batch)

            def one_step(carry: tuple[PyTree, PyTree], rows: jax.Array) -> tuple[tuple[PyTree, PyTree], jax.Array]:
                params, opt_state = carry
                batch = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), train)
                loss, grads = jax.value_and_grad(masked_loss)(params, batch)
                updates, opt_state = optimizer.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), loss

            (moved, opt_moved), losses = jax.lax.scan(one_step, (params, opt_state), rows)
            wrong, finite = _check(logits_fn, pruning.apply_masks(moved, masks), validation)
            finite = finite & jnp.isfinite(losses).all()
            alive = status == INCOMPLETE
            keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, old)
            return keep(moved, params), keep(opt_moved, opt_state), wrong, finite

        @functools.partial(jax.jit, static_argnames="length")
        def advance(state: Trials, data: tuple, goal_wrong: jax.Array, length: int) -> Trials:
            steps = state.step + jnp.arange(length, dtype=jnp.int32)
            order = lambda key: device_data.stream_indices(key, steps, len(train.labels), batch_size)
            trials = (state.params, state.masks, state.opt_state, jax.vmap(order)(state.key), state.status)
            params, opt_state, wrong, finite = per_trial(one_trial, mesh)(trials, data)
            step = state.step + jnp.int32(length)
            news = jnp.where(finite, jnp.where(wrong <= goal_wrong, step, INCOMPLETE), INFEASIBLE)
            status = jnp.where(state.status == INCOMPLETE, news, state.status)
            return state._replace(step=step, params=params, opt_state=opt_state, status=status)

        self._advance = advance

    def advance(self, state: Trials, *, goal_error: float, length: int | None = None) -> Trials:
        """Some steps of every trial, `interval` by default, and a check after the last of them."""
        # The error is a ratio of integers: the goal is rounded once, here, and not in every trial.
        goal_wrong = np.int32(np.floor(goal_error * len(self.data[1].labels) + 1e-9))
        return self._advance(state, self.data, goal_wrong, length or self.interval)

    def run(
        self,
        state: Trials,
        *,
        goal_error: float,
        max_steps: int,
        early_stop: bool = True,
        best: int | None = None,
        folder: str | os.PathLike | None = None,
        checkpoint_every: int = 1000,
    ) -> tuple[Trials, np.ndarray]:
        """Trains until `max_steps` or until no trial can change the least number of steps; resumes from `folder`.

        Args:
          state: as from `start`.
          goal_error: share of wrong validation examples, in [0, 1].
          max_steps: budget of a trial.
          early_stop: stop at the first trial that reaches the goal: no other can be faster. Exact for the minimum;
            the trials that are not done then count as incomplete.
          best: fewest steps of earlier trials; these stop where they can no longer fall below it.
          folder: of the checkpoints; None keeps none.
          checkpoint_every: steps between checkpoints.

        Returns:
          The state, and each trial's status on the host.
        """
        checkpoints = None if folder is None else Checkpoints(folder)
        try:
            if checkpoints and (found := checkpoints.restore(state)):
                state, _ = found
            limit = max_steps if best is None or not early_stop else min(max_steps, best - self.interval)
            while int(state.step) < limit:
                status = np.asarray(jax.device_get(state.status))
                if (status != INCOMPLETE).all() or (early_stop and (status > 0).any()):
                    break
                length = min(self.interval, max_steps - int(state.step))
                state = self.advance(state, goal_error=goal_error, length=length)
                if checkpoints and int(state.step) % checkpoint_every < length:
                    checkpoints.save(int(state.step), state, [])
        finally:
            if checkpoints:
                checkpoints.close()
        return state, np.asarray(jax.device_get(state.status))


def _check(
    logits_fn: Callable[[PyTree, jax.Array], jax.Array], params: PyTree, split: data.Split
) -> tuple[jax.Array, jax.Array]:
    """How many examples are classified wrongly, int32 [], and whether all logits are finite."""
    size = len(split.labels)
    width = min(size, _EVALUATED_AT_ONCE)
    starts = np.minimum(np.arange(0, size, width), size - width)  # the last batch overlaps the one before
    fresh = np.arange(width) >= (np.arange(0, size, width) - starts)[:, None]

    def one_batch(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, fresh = at
        batch = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, width), split)
        logits = logits_fn(params, batch.images)
        wrong = (jnp.argmax(logits, axis=-1) != batch.labels) & fresh
        return jnp.sum(wrong, dtype=jnp.int32), jnp.isfinite(logits).all()

    wrong, finite = jax.lax.map(one_batch, (jnp.asarray(starts, jnp.int32), jnp.asarray(fresh)))
    return jnp.sum(wrong), jnp.all(finite)
