r"""Synchronous pipelines: the gradients of M micro-batches make one update, and all weights are of one version.

The loss is the mean over the micro-batches, so loss and gradients are those of the model without a pipeline.

  gpipe      all F, then all B; a stage keeps M inputs and recomputes its activations
  1f1b       the same bubble; a stage keeps P inputs and recomputes
  circular   R rounds of 1/R of the blocks: a bubble R times shorter for R times the messages. The forward pass is one
             scan, and JAX differentiates it, scan, branches, permutations and all
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlib_methods.parallel.pipelines import _engine as engine
from jaxlib_methods.parallel.pipelines._circular import circular_loss
from jaxlib_methods.parallel.pipelines._device import expand, squeeze
from jaxlib_methods.parallel.pipelines._engine import read
from jaxlib_methods.parallel.pipelines._transfer import vary
from jaxlib_methods.parallel.pipelines.base import FEED, REPLICATED, Losses, Parts, Pipeline
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, DataHook, HookInfo, HookStates, zeros
from jaxlib_methods.parallel.pipelines.layout import SPEC, Layout, Optimizer
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.parallel.pipelines.schedules import Slot, check_schedule, phases_of
from jaxlib_methods.parallel.pipelines.stages import StageModel, StageTree
from jaxlib_methods.typing import PyTree, SynchronousSchedule

__all__ = [
    "SynchronousPipeline",
    "SynchronousState",
    "synchronous_pipeline",
]


class SynchronousState(NamedTuple):
    """State of a synchronous pipeline; every leaf starts with the axes [P, D]."""

    params: Packed  # [P, D, ...]
    opt_state: Packed  # [P, D, ...]
    hooks: HookStates  # at the boundaries
    data_hook: PyTree  # state of the hook on the data axis
    updates: jax.Array  # int32 [P, D]: optimizer steps


class SynchronousPipeline(Pipeline):
    """A pipeline whose `step` makes one update from M micro-batches; `synchronous_pipeline` makes it.

    Args:
      parts: what it is made of.
      schedule: "gpipe", "1f1b" or "circular".
      num_microbatches: M.
      remat: whether activations are computed again in the backward pass.
    """

    def __init__(self, parts: Parts, *, schedule: SynchronousSchedule, num_microbatches: int, remat: bool):
        self.schedule, self.num_microbatches, self.remat = schedule, num_microbatches, remat
        super().__init__(parts)
        inputs = (SPEC, FEED, FEED)
        self._value_and_grad_jit = self._on_mesh(self._value_and_grad, inputs, (REPLICATED, SPEC))

    def value_and_grad(self, state: SynchronousState, inputs: PyTree, targets: PyTree) -> tuple[Losses, Packed]:
        """Losses of M micro-batches and the packed gradients of their mean, which `unpack` turns into trees."""
        return self._value_and_grad_jit(state, inputs, targets)

    def hook_states(self, state: SynchronousState) -> HookStates:
        return state.hooks

    def replace_hook_states(self, state: SynchronousState, hooks: HookStates) -> SynchronousState:
        return state._replace(hooks=hooks)

    def _with_trained(self, state: SynchronousState, fresh: SynchronousState) -> SynchronousState:
        return state._replace(params=fresh.params, opt_state=fresh.opt_state)

    def _start(self, params: Packed, opt_state: Packed) -> SynchronousState:
        params, opt_state = squeeze((params, opt_state))
        hooks, data_hook = self._program.start(1).hooks, self._start_data_hook(params)
        return expand(vary(SynchronousState(params, opt_state, hooks, data_hook, jnp.zeros((), jnp.int32))))

    def _current(self, state: SynchronousState) -> tuple[Packed, Packed, jax.Array]:
        return state.params, state.opt_state, jnp.zeros_like(state.updates)

    def _step(self, state: SynchronousState, inputs: PyTree, targets: PyTree) -> tuple[SynchronousState, Losses]:
        state = squeeze(state)
        losses, grads, hooks = self._gradients(state, (inputs, targets))
        stage, layout = jax.lax.axis_index("stage"), self.layout

        def update(kind: int) -> tuple[Packed, Packed]:
            params, opt_state = engine.update_stage(
                layout.optimizer(stage),
                layout.params.unpack(kind, state.params),
                layout.opt_state.unpack(kind, state.opt_state),
                layout.params.unpack(kind, grads),
            )
            return vary((layout.params.pack(kind, params), layout.opt_state.pack(kind, opt_state)))

        branches = [functools.partial(update, kind) for kind in sorted(set(layout.kind_of))]
        params, opt_state = jax.lax.switch(jnp.array(layout.kind_of, jnp.int32)[stage], branches)
        data_hook = state.data_hook
        if self.data_hook is not None:
            info = HookInfo(stage, state.updates, jnp.bool_(True))
            params, data_hook = self.data_hook.apply(params, data_hook, info)
        return expand(vary(SynchronousState(params, opt_state, hooks, data_hook, state.updates + 1))), losses

    def _value_and_grad(self, state: SynchronousState, inputs: PyTree, targets: PyTree) -> tuple[Losses, Packed]:
        losses, grads, _ = self._gradients(squeeze(state), (inputs, targets))
        return losses, expand(vary(grads))

    def _gradients(self, state: SynchronousState, batches: tuple[PyTree, PyTree]) -> tuple[Losses, Packed, HookStates]:
        """Losses, gradients of their mean and the states of the hooks."""
        found, M = len(jax.tree.leaves(batches)[0]), self.num_microbatches
        if found != M:
            raise ValueError(f"this pipeline takes {M} micro-batches per update, got {found}")
        if self.schedule == "circular" or not self.remat:
            forward = lambda params: circular_loss(
                self._program, self.layout, params, batches, num_microbatches=M, remat=self.remat
            )
            grads, losses = jax.grad(forward, has_aux=True)(state.params)
            hooks = state.hooks
        else:
            losses, grads, hooks = self._by_slots(state, batches)
        grads = self._averaged(grads)
        losses = jax.lax.pmean(jax.lax.psum(losses, "stage"), "data")
        return Losses(losses, jnp.arange(M, dtype=jnp.int32)), grads, hooks

    def _by_slots(
        self, state: SynchronousState, batches: tuple[PyTree, PyTree]
    ) -> tuple[jax.Array, Packed, HookStates]:
        """The same of "gpipe" and "1f1b", before anything is averaged over the replicas; losses [M]."""
        P, M, program = self.layout.num_stages, self.num_microbatches, self._program
        tree_of = lambda kind, m: self.layout.params.unpack(kind, state.params)
        feed = lambda m: jax.tree.map(lambda leaf: read(leaf, m), batches)

        def body(slot: Slot, k: jax.Array, carry: Any) -> tuple[Any, jax.Array]:
            traffic, grads = carry
            limit = jnp.int32(M)
            traffic, done = engine.run_slot(
                program, slot, k, limit, traffic, grads, tree_of, tree_of, feed, accumulate=True
            )
            return (traffic, grads if done.grads is None else done.grads), done.loss

        depth = M if self.schedule == "gpipe" else min(P, M)
        carry = (program.start(depth)._replace(hooks=state.hooks), zeros(self.layout.params.shapes))
        (traffic, grads), losses = engine.run_phases(phases_of(self.schedule, P, M), body, carry)
        of_microbatch = losses[0][P // 2 : P // 2 + M] if self.schedule == "1f1b" else losses[1][M - 1 :: -1]
        return of_microbatch, jax.tree.map(lambda g: g / M, grads), traffic.hooks


def synchronous_pipeline(
    model: StageModel,
    stages: Sequence[StageTree],
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    batch: tuple[PyTree, PyTree],
    num_microbatches: int,
    schedule: SynchronousSchedule = "1f1b",
    num_rounds: int = 1,
    remat: bool = True,
    average_gradients: bool = True,
    forward_hook: BoundaryHook | None = None,
    backward_hook: BoundaryHook | None = None,
    data_hook: DataHook | None = None,
) -> SynchronousPipeline:
    """GPipe, 1F1B or a circular pipeline: `step` makes one update from M micro-batches.

    Args:
      model: what the stages compute.
      stages: the trees of the stages from `split_stages`, or their shapes.
      optimizer: of each stage, on its own tree, as for `asynchronous_pipeline`: clipping in its chain acts per stage.
      mesh: from `make_mesh`.
      batch: one micro-batch (inputs, targets) of all replicas, or its shapes: arrays (B, ...).
      num_microbatches: M.
      schedule: "gpipe", "1f1b" or "circular".
      num_rounds: R, the rounds of "circular"; the stages must have been split with it.
      remat: whether stages recompute their activations from their inputs in the backward pass. False, for "gpipe" and
        "circular" without hooks, keeps the results of matrix products and recomputes what is elementwise.
      average_gradients: whether the gradients of the replicas are averaged; False leaves them to `data_hook`.
      forward_hook: at the boundaries, on activations; for "gpipe" and "1f1b".
      backward_hook: at the boundaries, on cotangents; for "gpipe" and "1f1b".
      data_hook: on the data axis, after the optimizer step.

    Returns:
      The pipeline; its state is a `SynchronousState`.

    Raises:
      ValueError: for stages, a mesh or a batch that do not fit, and for combinations that do not exist.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> from jaxlib_methods.parallel import make_mesh, sequential_loss, shard_batch
      >>> model = StageModel(
      ...     embed=lambda E, ids: E[ids],
      ...     block=lambda w, x: jnp.tanh(x @ w),
      ...     head=lambda w, x, y: jnp.mean((x @ w - y) ** 2),
      ... )
      >>> stages = ({"embed": jnp.ones((5, 2)), "blocks": (jnp.eye(2),), "head": jnp.ones(2)},)  # one, for any machine
      >>> mesh, ids, y = make_mesh(1), np.zeros((3, 4), np.int32), np.zeros((3, 4), np.float32)
      >>> pipe = synchronous_pipeline(model, stages, optax.sgd(0.1), mesh, batch=(ids[0], y[0]), num_microbatches=3)
      >>> losses, grads = pipe.value_and_grad(pipe.init(stages), *shard_batch(mesh, (ids, y)))
      >>> bool(losses.loss.mean() == sequential_loss(model, stages, ids[0], y[0]))
      True

    Source: Huang et al. (NeurIPS 2019), arXiv:1811.06965 [huang2019gpipe]; Narayanan et al. (SOSP 2019),
      arXiv:1806.03377 (1F1B) [narayanan2019pipedream]; Narayanan et al. (SC 2021), arXiv:2104.04473 (rounds)
      [narayanan2021efficient].
    """
    layout = Layout(mesh, stages, optimizer, num_rounds)
    check_schedule(schedule, layout.num_stages, num_microbatches, num_rounds)
    hooks = forward_hook, backward_hook
    if schedule == "1f1b" and not remat:
        raise ValueError("1f1b recomputes: remat=False is there for 'gpipe' and 'circular'")
    if (schedule == "circular" or not remat) and hooks != (None, None):
        raise ValueError("hooks at boundaries run in the schedules 'gpipe' and '1f1b' with remat=True")
    parts = Parts(layout, model, batch, hooks, data_hook, average_gradients)
    return SynchronousPipeline(parts, schedule=schedule, num_microbatches=num_microbatches, remat=remat)
