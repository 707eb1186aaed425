"""The training loop of all experiments: chunks of steps as one dispatch, data parallel, resumable to the bit.

    state = init_state(params, optimizer, key=key)
    state, history = fit(loss_fn, optimizer, state, dataset.train, batch_size=100, steps=25_000,
                         evaluate=evaluator(classification(logits_fn), dataset.test), workdir=workdir)

The state is replicated and the batch is spread over the mesh axis "data" of all devices of all processes; the loss is
the mean over the whole batch, and XLA inserts the reductions. What step t does depends on the state and t alone.
"""

import contextlib
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments._machinery import device_data
from experiments._machinery.checkpoint import Checkpoints
from experiments._machinery.errors import DataError, NonFiniteLossError
from experiments._machinery.log import JsonLines, Record
from experiments._machinery.progress import Progress

PyTree = Any


class TrainState(NamedTuple):
    step: jax.Array  # int32 []: steps done
    params: PyTree  # what the optimizer changes
    opt_state: PyTree
    model_state: PyTree  # what the forward pass changes: batch-norm statistics, or ()
    key: jax.Array  # typed key []: the run's randomness; never changes, step t uses fold_in(key, t)


# (params, model_state, batch, key) -> (loss [], (new model_state, {name: scalar}))
LossFn = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]]


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, *, key: jax.Array, model_state: PyTree = ()
) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), model_state, key)


def fit(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    split: PyTree,
    *,
    batch_size: int,
    steps: int,
    steps_per_call: int = 100,
    augment: Callable[[PyTree, jax.Array], PyTree] | None = None,
    gradient_at: Callable[[PyTree, PyTree], PyTree] | None = None,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int = 0,
    workdir: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
    mesh: Mesh | None = None,
    progress: bool | None = None,
    label: str = "train",
    log: Iterable[Callable[[Record], None]] = (),
) -> tuple[TrainState, list[Record]]:
    """Trains until `steps` and returns the final state and the history.

    The compiled chunk is kept per (loss_fn, optimizer, augment, batch_size, mesh, gradient_at): pass the same objects
    again, for another seed or another mask in the state, and nothing is compiled twice.

    Args:
      loss_fn: `(params, model_state, batch, key) -> (loss, (model_state, metrics))`, the mean over the batch.
      optimizer: gets `value=loss` as extra argument, for the transformations that want it.
      state: as from `init_state`; it stays valid, training works on a copy.
      split: pytree of arrays with a common first axis, e.g. `data.Split`, or `device_data.put` of one.
      batch_size: examples per step over all devices.
      steps: the step to train to.
      steps_per_call: steps of one dispatch; progress, log and the check of the loss happen once per call.
      augment: `(batch, key) -> batch` inside jit, e.g. `device_data.random_crop`.
      gradient_at: `(opt_state, params) -> params` at which the gradient is taken, e.g.
        `optimizers.delays.stale_params`; None: at the parameters themselves.
      evaluate: `state -> {name: number}`, run after the last step and every `evaluate_every` steps (0: only then).
      workdir: where checkpoints and `log.jsonl` go, and where an earlier call is resumed from; None keeps nothing.
      checkpoint_every: steps between checkpoints, beside the one after the last step; 0 for that one alone.
      mesh: one axis "data"; None takes as many devices as divide the batch.
      progress: True or False forces or silences the bar; None shows it on a terminal.
      label: name of the run in the bar and in the lines.
      log: further listeners for the records, e.g. `log.TensorBoard`.

    Returns:
      The state, replicated over the mesh, and one record per dispatch: step, wall_s, means of the loss and the
      metrics over its steps and, where evaluated, what `evaluate` returned.

    Raises:
      NonFiniteLossError: names the step and the loss; no checkpoint of it is kept.
      DataError: the batch is empty or larger than the data.
    """
    for name, value in (("steps", steps), ("steps_per_call", steps_per_call), ("batch_size", batch_size)):
        if value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
    mesh = device_data.data_mesh(batch_size) if mesh is None else mesh
    if batch_size % mesh.size:
        raise DataError(f"batch_size {batch_size} is not a multiple of the {mesh.size} devices of the mesh")
    data = device_data.put(split, mesh)
    state = device_data.replicate(state, mesh)
    run_chunk = _compiled_chunk(loss_fn, optimizer, augment, batch_size, mesh, gradient_at)
    longest = min(every for every in (steps_per_call, evaluate_every, checkpoint_every, steps) if every)
    count = functools.lru_cache(lambda length: device_data.replicate(np.int32(length), mesh))

    history: list[Record] = []
    listeners, checkpoints = list(log), None
    at_end = contextlib.ExitStack()  # a checkpoint that is being written gets finished, whatever happens
    if workdir is not None:
        checkpoints = at_end.enter_context(contextlib.closing(Checkpoints(workdir)))
        if found := checkpoints.restore(state):
            state, history = found
        lines = JsonLines(pathlib.Path(workdir) / "log.jsonl", history)
        listeners.append(at_end.enter_context(contextlib.closing(lines)))
    step = start = int(state.step)
    earlier_s = history[-1]["wall_s"] if history else 0.0
    began = time.perf_counter()

    def finish(chunk: tuple[int, dict[str, jax.Array]]) -> Record:
        """Waits for a dispatched chunk, checks its loss and makes its record."""
        last, summary = chunk
        host = jax.device_get(summary)
        if host.pop("bad") >= 0:
            raise NonFiniteLossError(
                f"{label}: the loss of step {int(host['bad_step'])} is {float(host['bad_loss'])}; "
                "lower the learning rate or look at the data"
            )
        means = {name: float(value) for name, value in host.items() if name not in ("bad_step", "bad_loss")}
        elapsed = time.perf_counter() - began
        bar.update(last, means["loss"], (last - start) / elapsed)
        return {"step": last, "wall_s": round(earlier_s + elapsed, 3), **means}

    def keep(record: Record) -> None:
        history.append(record)
        for listener in listeners:
            listener(record)

    with at_end, Progress(label, steps, step, batch_size, progress) as bar:
        pending = None
        while step < steps:
            # Chunks end at the same steps whether or not a run was interrupted, so that it runs the same programs.
            ends = (_next(step, steps_per_call), _next(step, evaluate_every), _next(step, checkpoint_every), steps)
            length = min(ends) - step
            steps_of_chunk = count(length)  # with several processes the guard takes it for an implicit transfer
            with jax.transfer_guard("disallow"):
                state, summary = run_chunk(state, data, steps_of_chunk, longest)
            step += length
            if pending:  # read the chunk before this one while the device works on this one
                keep(finish(pending))
            pending = (step, summary)
            evaluating = evaluate is not None and (step == steps or step == ends[1])
            saving = checkpoints is not None and (step == steps or step == ends[2])
            if evaluating or saving:
                record, pending = finish(pending), None
                if evaluating:
                    metrics = evaluate(state)
                    bar.evaluated(step, {"loss": record["loss"], **metrics})
                    record |= metrics
                keep(record)
            if saving:
                checkpoints.save(step, state, history)
        if pending:
            keep(finish(pending))
    return state, history


def _next(step: int, every: int) -> float:
    """The first multiple of `every` after `step`; infinity for 0."""
    return (step // every + 1) * every if every else math.inf


@functools.lru_cache(maxsize=16)
def _compiled_chunk(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    augment: Callable[..., PyTree] | None,
    batch_size: int,
    mesh: Mesh,
    gradient_at: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    update = optax.with_extra_args_support(optimizer).update

    def fresh(params: PyTree, model_state: PyTree, batch: PyTree, key: jax.Array) -> Any:
        # nnx Variables remember the trace they were made in; rebuilt inside the gradient's, they can be written to.
        return loss_fn(params, jax.tree.map(lambda leaf: leaf, model_state), batch, key)

    gradient = jax.value_and_grad(fresh, has_aux=True)

    def one_step(
        data: device_data.OnDevice, state: TrainState, indices: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        augment_key, loss_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        batch = device_data.gather(data, indices)
        if augment is not None:
            batch = augment(batch, augment_key)
        at = state.params if gradient_at is None else gradient_at(state.opt_state, state.params)
        (loss, (model_state, metrics)), grads = gradient(at, state.model_state, batch, loss_key)
        updates, opt_state = update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + jnp.int32(1), params, opt_state, model_state, state.key)
        return state, {**metrics, "loss": loss}

    replicated = NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, static_argnames="longest", donate_argnames="state", out_shardings=replicated)
    def chunk(
        state: TrainState, data: device_data.OnDevice, length: jax.Array, longest: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """`length` steps, at most `longest`; one program for all lengths, because compiling takes longer than most."""
        first, offset = state.step, jnp.arange(longest, dtype=jnp.int32)
        order_key = jax.random.fold_in(state.key, 0x7FFFFFFF)  # no step's key
        rows = device_data.batch_indices(order_key, first + offset, data.size, batch_size)
        shapes = jax.eval_shape(one_step, data, state, rows[0])[1]
        metrics = jax.tree.map(lambda metric: jnp.zeros((longest, *metric.shape), metric.dtype), shapes)

        def body(i: jax.Array, carry: tuple[TrainState, dict[str, jax.Array]]) -> Any:
            state, metrics = carry
            state, new = one_step(data, state, rows[i])
            return state, jax.tree.map(lambda all, one: all.at[i].set(one), metrics, new)

        state, metrics = jax.lax.fori_loop(0, length, body, (state, metrics))
        done = length.astype(jnp.float32)
        summary = {name: jnp.sum(value.astype(jnp.float32), axis=0) / done for name, value in metrics.items()}
        finite = jnp.isfinite(metrics["loss"])
        at = jnp.argmin(finite)
        bad = jnp.where(jnp.all(finite), -1, at)
        return state, summary | {"bad": bad, "bad_step": first + at.astype(jnp.int32), "bad_loss": metrics["loss"][at]}

    return chunk


def classification(logits_fn: Callable[[PyTree, PyTree, jax.Array], jax.Array]) -> Callable[..., dict[str, jax.Array]]:
    """Per-example `error` (percent) and `loss` of `logits_fn(params, model_state, images)`, for `evaluator`."""

    def per_example(params: PyTree, model_state: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        logits = logits_fn(params, model_state, batch.images)
        wrong = jnp.argmax(logits, axis=-1) != batch.labels
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return {"error": 100.0 * wrong.astype(jnp.float32), "loss": loss}

    return per_example


def evaluator(
    per_example: Callable[[PyTree, PyTree, PyTree], dict[str, jax.Array]],
    split: PyTree,
    *,
    batch_size: int = 1000,
    mesh: Mesh | None = None,
    prefix: str = "test_",
) -> Callable[[TrainState], dict[str, float]]:
    """Makes `state -> {prefix + name: exact mean over the split}` for `fit`.

    Args:
      per_example: `(params, model_state, batch) -> {name: [batch]}`, e.g. `classification(logits_fn)`.
      split: as for `fit`.
      batch_size: examples per batch; the last one is filled up and the filling does not count.
    """
    mesh = device_data.data_mesh() if mesh is None else mesh
    data = device_data.put(split, mesh)
    width = math.ceil(min(batch_size, data.size) / mesh.size) * mesh.size
    batches = math.ceil(data.size / width)

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def sums(params: PyTree, model_state: PyTree, data: device_data.OnDevice) -> dict[str, jax.Array]:
        def one_batch(_: None, rows: jax.Array) -> tuple[None, dict[str, jax.Array]]:
            batch = device_data.gather(data, jnp.minimum(rows, data.size - 1))
            values = per_example(params, model_state, batch)
            return None, {name: jnp.sum(jnp.where(rows < data.size, value, 0)) for name, value in values.items()}

        rows = jnp.arange(batches * width, dtype=jnp.int32).reshape(batches, width)
        return jax.lax.scan(one_batch, None, rows)[1]

    def evaluate(state: TrainState) -> dict[str, float]:
        params, model_state = state.params, state.model_state
        if any(leaf.sharding.device_set != set(mesh.devices.flat) for leaf in jax.tree.leaves(params)):
            params, model_state = device_data.replicate((params, model_state), mesh)
        totals = jax.device_get(sums(params, model_state, data))
        return {prefix + name: float(np.sum(value, dtype=np.float64) / data.size) for name, value in totals.items()}

    return evaluate
