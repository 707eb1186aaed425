"""What synchronous and asynchronous pipelines share: the host's view of their state."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxlib_methods.parallel.pipelines._device import expand, local_program, squeeze
from jaxlib_methods.parallel.pipelines._transfer import vary
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, DataHook, EndStates, HookStates, transformed
from jaxlib_methods.parallel.pipelines.layout import SPEC, Layout, Snapshot, to_host
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.parallel.pipelines.stages import StageModel, StageTree
from jaxlib_methods.typing import PyTree

__all__ = [
    "Losses",
    "Pipeline",
]

FEED = PartitionSpec(None, "data")  # of micro-batches (n, B, ...)
REPLICATED = PartitionSpec()


class Losses(NamedTuple):
    """Losses of the micro-batches that the last stage has finished, averaged over the replicas."""

    loss: jax.Array  # [n] in the order of the slots; 0 where none was finished
    microbatch: jax.Array  # int32 [n]: its number since the pipe was filled; -1 where none was finished


class Parts(NamedTuple):
    """What a pipeline of either kind is made of."""

    layout: Layout
    model: StageModel
    batch: tuple[PyTree, PyTree]  # shapes of one micro-batch of all replicas
    hooks: tuple[BoundaryHook | None, BoundaryHook | None]  # at the boundaries, forward and backward
    data_hook: DataHook | None
    average_gradients: bool


class Pipeline(abc.ABC):
    """A pipeline over a mesh: a `SynchronousPipeline` or an `AsynchronousPipeline`.

    It holds no arrays: its methods take the state of training and return the next one. Methods with an underscore run
    on each device, on its part of the state.

    Args:
      parts: what it is made of.
    """

    def __init__(self, parts: Parts):
        self.layout, self.data_hook = parts.layout, parts.data_hook
        self.average_gradients = parts.average_gradients
        self._program, self._local_batch = local_program(parts.layout, parts.model, parts.batch, parts.hooks)
        self._start_jit = self._on_mesh(self._start, (SPEC, SPEC), SPEC)
        self._current_jit = self._on_mesh(self._current, (SPEC,), SPEC)
        self._step_jit = self._on_mesh(self._step, (SPEC, FEED, FEED), (SPEC, REPLICATED), donate_argnums=0)
        self._replace_jit = self._on_mesh(self._replace, (SPEC, SPEC, PartitionSpec("stage")), SPEC)

    def _on_mesh(self, function: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> Any:
        mapped = jax.shard_map(function, mesh=self.layout.mesh, in_specs=inputs, out_specs=outputs)
        return jax.jit(mapped, **options)

    # ------------------------------------------------------------------------------------------------- on the host

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
        return self._put([stages], [opt_states])

    def step(self, state: PyTree, inputs: PyTree, targets: PyTree) -> tuple[PyTree, Losses]:
        """Trains on micro-batches (n, B, ...) from `shard_batch`.

        Returns:
          (state, losses). The old state is donated: it can no longer be used.
        """
        return self._step_jit(state, inputs, targets)

    def lower(self, state: PyTree, inputs: PyTree, targets: PyTree) -> jax.stages.Lowered:
        """The program of `step`, to be compiled and read by `communication.link_bytes`."""
        return self._step_jit.lower(state, inputs, targets)

    def current(self, state: PyTree) -> tuple[Packed, Packed, jax.Array]:
        """Newest parameters and optimizer state, packed [P, D, ...], and the micro-batches in flight."""
        return self._current_jit(state)

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
        _check_drained(flight)
        return self.layout.snapshot(params, opt_state, int(to_host(state.updates).max()), replica)

    def restore(self, snapshot: Snapshot) -> PyTree:
        """The state that continues from a snapshot, of a pipeline of any number of stages with this optimizer.

        Raises:
          ValueError: for a snapshot of another model or optimizer.
        """
        trees, opt_states = self.layout.restored(snapshot)
        state = self._put([trees], [opt_states])
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
        count = self.layout.num_replicas
        if len(snapshots) != count:
            raise ValueError(f"snapshots must be one for each of the {count} replicas, got {len(snapshots)}")
        _check_drained(self.current(state)[2])
        if self.data_hook is not None and self.data_hook.restart is None:
            raise ValueError(
                "the hook on the data axis keeps what depends on the old parameters and cannot restart; "
                "use sparse_averaging or fed_avg, or no transforms"
            )
        fresh = self._put(*zip(*map(self.layout.restored, snapshots), strict=True))
        return self._replace_jit(state, fresh, None if crossing is None else _at_ends(*crossing))

    def _put(self, trees: Sequence[Sequence[StageTree]], opt_states: Sequence[Sequence[PyTree]]) -> PyTree:
        """The state that starts from the trees of each replica, or from one for all."""
        layout = self.layout
        return self._start_jit(layout.put(layout.params, *trees), layout.put(layout.opt_state, *opt_states))

    # ------------------------------------------------------------------------------------------------ of each kind

    @abc.abstractmethod
    def hook_states(self, state: PyTree) -> HookStates:
        """The states of the hooks at the boundaries, on the host or on a device."""

    @abc.abstractmethod
    def replace_hook_states(self, state: PyTree, hooks: HookStates) -> PyTree:
        """The state with those of the hooks at the boundaries replaced."""

    @abc.abstractmethod
    def _start(self, params: Packed, opt_state: Packed) -> PyTree: ...

    @abc.abstractmethod
    def _current(self, state: PyTree) -> tuple[Packed, Packed, jax.Array]: ...

    @abc.abstractmethod
    def _step(self, state: PyTree, inputs: PyTree, targets: PyTree) -> tuple[PyTree, Losses]: ...

    @abc.abstractmethod
    def _with_trained(self, state: PyTree, fresh: PyTree) -> PyTree:
        """The state with the parameters and the optimizer state of another."""

    # ------------------------------------------------------------------------------------------------- on a device

    def _start_data_hook(self, params: Packed) -> PyTree:
        return () if self.data_hook is None else self.data_hook.init(params)

    def _averaged(self, grads: Packed) -> Packed:
        if not self.average_gradients or self.layout.num_replicas == 1:
            return grads
        return vary(jax.tree.map(lambda g: jax.lax.pmean(g, "data"), grads))

    def _replace(self, old: PyTree, fresh: PyTree, matrices: PyTree) -> PyTree:
        old, hooks = squeeze(old), self._program.hooks
        states = self.hook_states(old)
        if matrices is not None:
            of_stage = jax.tree.map(lambda leaf: leaf[0], matrices)
            states = HookStates(
                *(
                    ends and EndStates(*(transformed(hook, end, M) for end, M in zip(ends, of_ends, strict=True)))
                    for hook, ends, of_ends in zip(hooks, states, of_stage, strict=True)
                )
            )
        state = self.replace_hook_states(self._with_trained(old, squeeze(fresh)), states)
        if self.data_hook is not None:
            state = state._replace(data_hook=self.data_hook.restart(state.data_hook))
        return expand(vary(state))


def _check_drained(flight: jax.Array) -> None:
    if np.any(to_host(flight)):
        raise ValueError("micro-batches are in flight; drain the pipeline first, or save its state as it is")


def _at_ends(forward: jax.typing.ArrayLike, backward: jax.typing.ArrayLike) -> tuple[tuple[np.ndarray, ...], ...]:
    """Matrices of boundaries as those of stages, [P, d, d]: of its (sending, receiving) end forward and backward."""
    before = lambda M: np.concatenate([np.eye(M.shape[-1], dtype=M.dtype)[None], M])
    behind = lambda M: np.concatenate([M, np.eye(M.shape[-1], dtype=M.dtype)[None]])
    forward, backward = np.asarray(forward), np.asarray(backward)
    return (behind(forward), before(forward)), (before(backward), behind(backward))
