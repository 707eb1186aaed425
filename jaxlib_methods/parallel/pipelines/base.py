"""What synchronous and asynchronous pipelines share: their object, and the local view of a device."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxlib_methods.parallel.pipelines import stages as stages_
from jaxlib_methods.parallel.pipelines._engine import Program, vary
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, DataHook, transformed
from jaxlib_methods.parallel.pipelines.layout import SPEC, Layout, Snapshot, to_host
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.parallel.pipelines.stages import StageModel, StageTree

__all__ = [
    "Losses",
    "Pipeline",
]

PyTree = Any


class Losses(NamedTuple):
    """Losses of the micro-batches that the last stage has finished, averaged over the replicas."""

    loss: jax.Array  # [n] in the order of the slots; 0 where none was finished
    microbatch: jax.Array  # int32 [n]: its number since the pipe was filled; -1 where none was finished


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A pipeline over a mesh, from `synchronous_pipeline` or `asynchronous_pipeline`.

    Args:
      layout: where the state lies.
      batch: shapes of one micro-batch.
      start: (parameters, optimizer state), packed -> state.
      current: state -> newest (parameters, optimizer state), packed, and the micro-batches in flight.
      step: jitted (state, inputs (n, B, ...), targets (n, B, ...)) -> (state, `Losses`); the state is donated.
      replaced: (state, fresh state, matrices) -> the fresh one with the states of the hooks of the other.
      drain: jitted state -> (state, `Losses`): finishes what is in flight; None for synchronous pipelines.
      value_and_grad: jitted (state, inputs, targets) -> (`Losses`, packed gradients); None for asynchronous ones.

    Example: see `asynchronous_pipeline` and `synchronous_pipeline`.
    """

    layout: Layout
    batch: tuple[PyTree, PyTree]
    start: Callable[..., PyTree]
    current: Callable[..., Any]
    step: Callable[..., Any]
    replaced: Callable[..., PyTree]
    drain: Callable[..., Any] | None = None
    value_and_grad: Callable[..., Any] | None = None

    def init(self, stages: Sequence[StageTree]) -> PyTree:
        """State at the start of training.

        Args:
          stages: the trees of the stages, from `split_stages`, the same on every process.

        Returns:
          The state, sharded over the mesh.
        """
        layout = self.layout
        if len(stages) != layout.num_stages:
            raise ValueError(f"the pipeline has {layout.num_stages} stages, got the trees of {len(stages)}")
        opt_states = [layout.optimizer(j).init(tree) for j, tree in enumerate(stages)]
        return self.start(layout.put(layout.params, stages), layout.put(layout.opt_state, opt_states))

    def stages(self, state: PyTree, replica: int = 0) -> list[StageTree]:
        """The newest parameters of a replica as the trees of the stages, NumPy arrays."""
        return self.layout.rows(self.layout.params, self.current(state)[0], replica)

    def unpack(self, grads: Packed) -> list[StageTree]:
        """Packed gradients as the trees of the stages."""
        return self.layout.rows(self.layout.params, grads)

    def snapshot(self, state: PyTree, replica: int = 0) -> Snapshot:
        """The state without stages and replicas, which a pipeline with other numbers of them can `restore`.

        It is that of one replica, and without the states of hooks.

        Raises:
          ValueError: while micro-batches are in flight: `drain` first. To continue on the same mesh with the pipe full,
            save the state itself.
        """
        params, opt_state, flight = self.current(state)
        self._check_drained(flight)
        return self.layout.snapshot(params, opt_state, int(to_host(state.updates).max()), replica)

    def restore(self, snapshot: Snapshot) -> PyTree:
        """The state that continues from a snapshot, of a pipeline of any number of stages with this optimizer.

        Raises:
          ValueError: for a snapshot of another model or optimizer.
        """
        trees, opt_states = self.layout.restored(snapshot)
        layout = self.layout
        state = self.start(layout.put(layout.params, trees), layout.put(layout.opt_state, opt_states))
        return state._replace(updates=state.updates + jax.numpy.asarray(snapshot.updates))

    def replace(
        self,
        state: PyTree,
        snapshots: Sequence[Snapshot],
        crossing: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None = None,
    ) -> PyTree:
        """The state with other parameters and moments of the same model, say transformed ones; hooks keep their states.

        The hook on the data axis restarts: averages of the old parameters that are still to come are dropped. What it
        keeps in the shape of the parameters stays as it is; `unextractable.morph_pipeline` transforms it.

        Args:
          state: without micro-batches in flight.
          snapshots: one for each replica.
          crossing: what has become of messages at the P - 1 boundaries, (P - 1, d, d) for activations, x <- x @ matrix,
            and the same for their cotangents; None: nothing.

        Returns:
          The state to go on with.

        Raises:
          ValueError: for another number of snapshots, those of another model or optimizer, micro-batches in flight, and
            a hook on the data axis that cannot restart.
        """
        layout, count = self.layout, self.layout.num_replicas
        if len(snapshots) != count:
            raise ValueError(f"snapshots must be one for each of the {count} replicas, got {len(snapshots)}")
        self._check_drained(self.current(state)[2])
        trees, opt_states = zip(*map(layout.restored, snapshots), strict=True)
        fresh = self.start(layout.put(layout.params, *trees), layout.put(layout.opt_state, *opt_states))
        return self.replaced(state, fresh, None if crossing is None else _at_ends(*crossing))

    def _check_drained(self, flight: jax.Array) -> None:
        if np.any(to_host(flight)):
            raise ValueError("micro-batches are in flight; drain the pipeline first, or save its state as it is")


def _at_ends(forward: jax.typing.ArrayLike, backward: jax.typing.ArrayLike) -> tuple[tuple[np.ndarray, ...], ...]:
    """Matrices of boundaries as those of stages, [P, d, d]: of its (sending, receiving) end forward and backward."""
    before = lambda M: np.concatenate([np.eye(M.shape[-1], dtype=M.dtype)[None], M])
    behind = lambda M: np.concatenate([M, np.eye(M.shape[-1], dtype=M.dtype)[None]])
    forward, backward = np.asarray(forward), np.asarray(backward)
    return (behind(forward), before(forward)), (before(backward), behind(backward))


def replacing(
    layout: Layout,
    hooks: tuple[BoundaryHook | None, BoundaryHook | None],
    data_hook: DataHook | None,
    carry_over: Callable[[PyTree, PyTree, PyTree], PyTree],
    hooks_of: Callable[[PyTree], PyTree],
) -> Callable[..., PyTree]:
    """`Pipeline.replaced` from (fresh, old, states of the boundaries' hooks) -> state."""

    def run(old: PyTree, fresh: PyTree, matrices: PyTree) -> PyTree:
        ends = hooks_of(squeeze(old))
        if matrices is not None:
            of_stage = jax.tree.map(lambda leaf: leaf[0], matrices)
            ends = tuple(
                state and tuple(transformed(hook, end, M) for end, M in zip(state, of_ends, strict=True))
                for hook, state, of_ends in zip(hooks, ends, of_stage, strict=True)
            )
        state = carry_over(squeeze(fresh), squeeze(old), ends)
        if data_hook is not None:
            state = state._replace(data_hook=data_hook.restart(state.data_hook))
        return expand(vary(state))

    specs = (SPEC, SPEC, PartitionSpec("stage"))
    jitted = jax.jit(jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=SPEC))

    def replaced(old: PyTree, fresh: PyTree, matrices: PyTree) -> PyTree:
        if data_hook is not None and data_hook.restart is None:
            raise ValueError(
                "the hook on the data axis keeps what depends on the old parameters and cannot restart; "
                "use sparse_averaging or fed_avg, or no transforms"
            )
        return jitted(old, fresh, matrices)

    return replaced


def local_program(
    layout: Layout,
    model: StageModel,
    batch: tuple[PyTree, PyTree],
    hooks: tuple[BoundaryHook | None, BoundaryHook | None],
) -> tuple[Program, tuple[PyTree, PyTree]]:
    """The program of a device and the shapes of its part of a micro-batch; what does not fit is found here."""

    def local(leaf: Any) -> jax.ShapeDtypeStruct:
        if not leaf.shape or leaf.shape[0] % layout.num_replicas:
            raise ValueError(
                f"{layout.num_replicas} replicas must divide the examples of a micro-batch, got the shape {leaf.shape}"
            )
        return jax.ShapeDtypeStruct((leaf.shape[0] // layout.num_replicas, *leaf.shape[1:]), leaf.dtype)

    inputs, targets = shapes = jax.tree.map(local, batch)
    whole = {"embed": layout.shapes[0]["embed"], "blocks": ()}
    x = jax.eval_shape(lambda params, inputs: stages_.run_stage(model, params, inputs), whole, inputs)
    for j, stage in enumerate(layout.shapes):
        one = lambda params, x: stages_.run_stage(model, {"blocks": params["blocks"]}, x)
        out = jax.eval_shape(one, stage, x)
        if jax.tree.structure(out) != jax.tree.structure(x) or any(
            (a.shape, a.dtype) != (b.shape, b.dtype)
            for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(x), strict=True)
        ):
            raise ValueError(f"blocks must keep the shapes of their input, those of stage {j} turn {x} into {out}")
    loss = jax.eval_shape(model.head, layout.shapes[-1]["head"], x, targets)
    if getattr(loss, "shape", None) != ():
        raise ValueError(f"head must return a scalar loss, got {loss}")
    return Program(model, layout.kind_of, layout.params, x, hooks), shapes


def squeeze(tree: PyTree) -> PyTree:
    """A device's part of arrays [P, D, ...]."""
    return jax.tree.map(lambda leaf: leaf[0, 0], tree)


def expand(tree: PyTree) -> PyTree:
    """The inverse of `squeeze`."""
    return jax.tree.map(lambda leaf: leaf[None, None], tree)
