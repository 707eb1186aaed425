"""What synchronous and asynchronous pipelines share: their object, and the local view of a device."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_methods.parallel import _stages as stages_
from jaxlib_methods.parallel._engine import Program
from jaxlib_methods.parallel._hooks import BoundaryHook
from jaxlib_methods.parallel._layout import Layout, Snapshot, to_host
from jaxlib_methods.parallel._packing import Packed
from jaxlib_methods.parallel._stages import StageModel, StageTree

PyTree = Any


class Losses(NamedTuple):
    """Losses of the micro-batches that the last stage has finished, averaged over the replicas.

    Source: this library.
    """

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
      drain: jitted state -> (state, `Losses`): finishes what is in flight; None for synchronous pipelines.
      value_and_grad: jitted (state, inputs, targets) -> (`Losses`, packed gradients); None for asynchronous ones.

    Example: see `asynchronous_pipeline` and `synchronous_pipeline`.

    Source: this library.
    """

    layout: Layout
    batch: tuple[PyTree, PyTree]
    start: Callable[..., PyTree]
    current: Callable[..., Any]
    step: Callable[..., Any]
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

    def stages(self, state: PyTree) -> list[StageTree]:
        """The newest parameters as the trees of the stages, NumPy arrays, of the first replica."""
        return self.layout.rows(self.layout.params, self.current(state)[0])

    def unpack(self, grads: Packed) -> list[StageTree]:
        """Packed gradients as the trees of the stages."""
        return self.layout.rows(self.layout.params, grads)

    def snapshot(self, state: PyTree) -> Snapshot:
        """The state without stages and replicas, which a pipeline with other numbers of them can `restore`.

        It is that of the first replica, and without the states of hooks.

        Raises:
          ValueError: while micro-batches are in flight: `drain` first. To continue on the same mesh with the pipe full,
            save the state itself.
        """
        params, opt_state, flight = self.current(state)
        if np.any(to_host(flight)):
            raise ValueError("micro-batches are in flight; drain the pipeline before a snapshot, or save its state")
        return self.layout.snapshot(params, opt_state, int(to_host(state.updates).max()))

    def restore(self, snapshot: Snapshot) -> PyTree:
        """The state that continues from a snapshot, of a pipeline of any number of stages with this optimizer.

        Raises:
          ValueError: for a snapshot of another model or optimizer.
        """
        trees, opt_states = self.layout.restored(snapshot)
        layout = self.layout
        state = self.start(layout.put(layout.params, trees), layout.put(layout.opt_state, opt_states))
        return state._replace(updates=state.updates + jax.numpy.asarray(snapshot.updates))


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
