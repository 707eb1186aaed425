r"""Synchronous pipelines: the gradients of M micro-batches make one update, and all weights are of one version.

The loss is the mean over the micro-batches, so loss and gradients are those of the model without a pipeline.

  gpipe      all F, then all B; a stage keeps M inputs and recomputes its activations
  1f1b       the same bubble; a stage keeps P inputs and recomputes
  circular   R rounds of 1/R of the blocks: a bubble R times shorter for R times the messages. The forward pass is one
             scan, and JAX differentiates it, scan, branches, permutations and all
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxlib_methods.parallel.pipelines import _engine as engine, stages as stages_
from jaxlib_methods.parallel.pipelines._engine import Program, read
from jaxlib_methods.parallel.pipelines.base import Losses, Pipeline, expand, local_program, replacing, squeeze
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, DataHook, HookInfo, zeros
from jaxlib_methods.parallel.pipelines.layout import SPEC, Layout, Optimizer
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.parallel.pipelines.schedules import Slot, check_schedule, phases_of
from jaxlib_methods.parallel.pipelines.stages import StageModel, StageTree

__all__ = [
    "SynchronousState",
    "synchronous_pipeline",
]

PyTree = Any


class SynchronousState(NamedTuple):
    """State of a synchronous pipeline; every leaf starts with the axes [P, D]."""

    params: Packed  # [P, D, ...]
    opt_state: Packed  # [P, D, ...]
    hooks: PyTree  # states of the hooks at the boundaries
    data_hook: PyTree  # state of the hook on the data axis
    updates: jax.Array  # int32 [P, D]: optimizer steps


def synchronous_pipeline(
    model: StageModel,
    stages: Sequence[StageTree],
    optimizer: Optimizer,
    mesh: Mesh,
    batch: tuple[PyTree, PyTree],
    num_microbatches: int,
    *,
    schedule: str = "1f1b",
    repeats: int = 1,
    remat: bool = True,
    average_gradients: bool = True,
    forward_hook: BoundaryHook | None = None,
    backward_hook: BoundaryHook | None = None,
    data_hook: DataHook | None = None,
) -> Pipeline:
    """GPipe, 1F1B or a circular pipeline: `step` makes one update from M micro-batches.

    Args:
      model: what the stages compute.
      stages: the trees of the stages from `split_stages`, or their shapes.
      optimizer: of each stage, on its own tree, as for `asynchronous_pipeline`: clipping in its chain acts per stage.
      mesh: from `make_mesh`.
      batch: one micro-batch (inputs, targets) of all replicas, or its shapes: arrays (B, ...).
      num_microbatches: M.
      schedule: "gpipe", "1f1b" or "circular".
      repeats: R, the rounds of "circular"; the stages must have been split with it.
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
      >>> pipe = synchronous_pipeline(model, stages, optax.sgd(0.1), mesh, (ids[0], y[0]), 3)
      >>> losses, grads = pipe.value_and_grad(pipe.init(stages), *shard_batch(mesh, (ids, y)))
      >>> bool(losses.loss.mean() == sequential_loss(model, stages, ids[0], y[0]))
      True

    Source: Huang et al. (NeurIPS 2019), arXiv:1811.06965 [huang2019gpipe]; Narayanan et al. (SOSP 2019),
      arXiv:1806.03377 (1F1B) [narayanan2019pipedream]; Narayanan et al. (SC 2021), arXiv:2104.04473 (rounds)
      [narayanan2021efficient].
    """
    layout = Layout(mesh, stages, optimizer, repeats)
    P, D, M = layout.num_stages, layout.num_replicas, num_microbatches
    check_schedule(schedule, P, M, repeats)
    by_autodiff = schedule == "circular" or not remat
    if schedule == "1f1b" and not remat:
        raise ValueError("1f1b recomputes: remat=False is there for 'gpipe' and 'circular'")
    if by_autodiff and (forward_hook is not None or backward_hook is not None):
        raise ValueError("hooks at boundaries run in the schedules 'gpipe' and '1f1b' with remat=True")
    program, _ = local_program(layout, model, batch, (forward_hook, backward_hook))
    depth = M if schedule == "gpipe" else min(P, M)

    def start(params: Packed, opt_state: Packed) -> SynchronousState:
        params, opt_state = squeeze((params, opt_state))
        of_hook = () if data_hook is None else data_hook.init(params)
        state = SynchronousState(params, opt_state, program.start(1).hooks, of_hook, jnp.zeros((), jnp.int32))
        return expand(engine.vary(state))

    def by_slots(params: Packed, hooks: PyTree, batches: tuple[PyTree, PyTree]) -> tuple[jax.Array, Packed, PyTree]:
        """(losses [M], gradients of their mean on this replica, states of the hooks)."""
        tree_of = lambda kind, m: layout.params.unpack(kind, params)
        feed = lambda m: jax.tree.map(lambda leaf: read(leaf, m), batches)

        def body(slot: Slot, k: jax.Array, carry: Any) -> tuple[Any, jax.Array]:
            traffic, grads = carry
            limit = jnp.int32(M)
            traffic, done = engine.run_slot(
                program, slot, k, limit, traffic, grads, tree_of, tree_of, feed, accumulate=True
            )
            return (traffic, grads if done.grads is None else done.grads), done.loss

        carry = (program.start(depth)._replace(hooks=hooks), zeros(layout.params.shapes))
        (traffic, grads), losses = engine.run_phases(phases_of(schedule, P, M), body, carry)
        of_microbatch = losses[0][P // 2 : P // 2 + M] if schedule == "1f1b" else losses[1][M - 1 :: -1]
        return of_microbatch, jax.tree.map(lambda g: g / M, grads), traffic.hooks

    def differentiated(
        params: Packed, hooks: PyTree, batches: tuple[PyTree, PyTree]
    ) -> tuple[jax.Array, Packed, PyTree]:
        function = lambda params: _circular(program, layout, params, batches, M, repeats, remat)
        grads, losses = jax.grad(function, has_aux=True)(params)
        return losses, grads, hooks

    def gradients(state: SynchronousState, batches: tuple[PyTree, PyTree]) -> tuple[Losses, Packed, PyTree]:
        found = len(jax.tree.leaves(batches)[0])
        if found != M:
            raise ValueError(f"this pipeline takes {M} micro-batches per update, got {found}")
        losses, grads, hooks = (differentiated if by_autodiff else by_slots)(state.params, state.hooks, batches)
        if average_gradients and D > 1:
            grads = engine.vary(jax.tree.map(lambda g: jax.lax.pmean(g, "data"), grads))
        losses = jax.lax.pmean(jax.lax.psum(losses, "stage"), "data")
        return Losses(losses, jnp.arange(M, dtype=jnp.int32)), grads, hooks

    def step(state: SynchronousState, inputs: PyTree, targets: PyTree) -> tuple[SynchronousState, Losses]:
        state = squeeze(state)
        losses, grads, hooks = gradients(state, (inputs, targets))
        stage = jax.lax.axis_index("stage")

        def update(kind: int) -> tuple[Packed, Packed]:
            params, opt_state = engine.update_stage(
                layout.optimizer(stage),
                layout.params.unpack(kind, state.params),
                layout.opt_state.unpack(kind, state.opt_state),
                layout.params.unpack(kind, grads),
            )
            return engine.vary((layout.params.pack(kind, params), layout.opt_state.pack(kind, opt_state)))

        branches = [lambda kind=kind: update(kind) for kind in sorted(set(layout.kind_of))]
        params, opt_state = jax.lax.switch(jnp.array(layout.kind_of, jnp.int32)[stage], branches)
        of_hook = state.data_hook
        if data_hook is not None:
            params, of_hook = data_hook.apply(params, of_hook, HookInfo(stage, state.updates, jnp.bool_(True)))
        return expand(engine.vary(SynchronousState(params, opt_state, hooks, of_hook, state.updates + 1))), losses

    def value_and_grad(state: SynchronousState, inputs: PyTree, targets: PyTree) -> tuple[Losses, Packed]:
        losses, grads, _ = gradients(squeeze(state), (inputs, targets))
        return losses, expand(engine.vary(grads))

    def current(state: SynchronousState) -> tuple[Packed, Packed, jax.Array]:
        return state.params, state.opt_state, jnp.zeros_like(state.updates)

    shard_map = lambda f, inputs, outputs: jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs)
    feed = PartitionSpec(None, "data")
    return Pipeline(
        layout=layout,
        batch=batch,
        start=jax.jit(shard_map(start, (SPEC, SPEC), SPEC)),
        current=jax.jit(shard_map(current, (SPEC,), SPEC)),
        step=jax.jit(shard_map(step, (SPEC, feed, feed), (SPEC, PartitionSpec())), donate_argnums=0),
        replaced=replacing(
            layout,
            (forward_hook, backward_hook),
            data_hook,
            lambda fresh, old, hooks: old._replace(params=fresh.params, opt_state=fresh.opt_state, hooks=hooks),
            lambda state: state.hooks,
        ),
        value_and_grad=jax.jit(shard_map(value_and_grad, (SPEC, feed, feed), (PartitionSpec(), SPEC))),
    )


def _circular(
    program: Program,
    layout: Layout,
    params: Packed,
    batches: tuple[PyTree, PyTree],
    num_microbatches: int,
    repeats: int,
    remat: bool,
) -> tuple[jax.Array, jax.Array]:
    """(mean loss, losses [M]), not zero on the last stage: the forward pass, to be differentiated on every device.

    Item u = 0, 1, ..., M R - 1 of a stage is round (u mod P R) div P of micro-batch (u div P R) P + u mod P; stage j
    works on item t - j in slot t. What leaves the last stage enters the first one in the next slot, one round later.
    """
    P, M, R = program.num_stages, num_microbatches, repeats
    stage = jax.lax.axis_index("stage")
    first, last = program.kind_of[0], program.kind_of[-1]
    blocks = layout.params.unpack(first, params)["blocks"]  # every kind has them
    n = len(blocks) // R
    rounds = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks[i::n]) for i in range(n)]
    # Around the branches and not in them: there the parameters would be kept once per slot.
    policy = None if remat else jax.checkpoint_policies.dots_saveable

    def work(starts: bool, ends: bool) -> Callable[..., tuple[PyTree, jax.Array]]:
        def run(params: Packed, x: PyTree, rounds: list[PyTree], r: jax.Array, m: jax.Array) -> Any:
            inputs, targets = jax.tree.map(lambda leaf: read(leaf, m), batches)
            tree = {"blocks": tuple(jax.tree.map(lambda leaf: read(leaf, r), block) for block in rounds)}
            if starts:
                tree["embed"] = layout.params.unpack(first, params)["embed"]
            if ends:
                tree["head"] = layout.params.unpack(last, params)["head"]
            out = stages_.run_stage(program.model, tree, inputs if starts else x, targets)
            return engine.vary((x, out) if ends else (out, jnp.zeros(())))

        return run

    idle = lambda params, x, rounds, r, m: engine.vary((x, jnp.zeros(())))
    kinds = [(False, False), (True, False), (False, True)] if P * R > 1 else [(True, True)]
    branches = [idle, *[work(*kind) for kind in kinds]]

    @functools.partial(jax.checkpoint, policy=policy)
    def run(index: jax.Array, *operands: Any) -> tuple[PyTree, jax.Array]:
        return jax.lax.switch(index, branches, *operands)

    def slot(x: PyTree, t: jax.Array) -> tuple[PyTree, jax.Array]:
        u = t - stage
        safe = jnp.clip(u, 0, M * R - 1)
        r, m = (safe % (P * R) // P, safe // (P * R) * P + safe % P) if R > 1 else (jnp.zeros_like(safe), safe)
        starts, ends = (stage == 0) & (r == 0), (stage == P - 1) & (r == R - 1)
        index = 1 + jnp.where(starts, 1, 0) + jnp.where(ends, 2, 0) if P * R > 1 else 1
        x, loss = run(jnp.where(u == safe, index, 0), params, x, rounds, r, m)
        if P > 1:
            pairs = [(j, (j + 1) % P) for j in range(P if R > 1 else P - 1)]
            x = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, "stage", pairs), x)
        return engine.vary(x), loss

    _, losses = jax.lax.scan(slot, engine.vary(zeros(program.x)), jnp.arange(M * R + P - 1, dtype=jnp.int32))
    m = jnp.arange(M)
    losses = losses[(m // P * P * R + (R - 1) * P + m % P if R > 1 else m) + P - 1]
    return jnp.sum(losses) / M, losses
