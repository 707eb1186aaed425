r"""Asynchronous pipelines: every backward pass is followed by an update of its stage, and the pipe never runs dry.

Symbols: stages j = 0..P-1, micro-batches m = 0, 1, ... since the pipe was filled, w_j^(v) parameters of stage j after v
updates. F of m on stage j is in slot 2 m + j at version max(m - (P - 1 - j), 0), and its B in slot 2 m + 2 P - 1 - j
makes version m + 1.

  with weight stashing     B at the version of F, from a ring of the last P versions
  without                  B at the newest version, or at one predicted from it (PipeMare)

In a slot half of the stages make an update. Where replicas average gradients, the collective is outside of the branches
and all stages take part, so that it carries twice the bytes that are used; a data hook may send less.

P versions are what stage 0 needs, w^(m - P + 1)..w^(m), the newest one included; stage j needs P - j of them, but in
one program the rings of all stages have one size.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxlib_methods.parallel.pipelines import _engine as engine
from jaxlib_methods.parallel.pipelines._engine import Traffic, read, write
from jaxlib_methods.parallel.pipelines.base import Losses, Pipeline, expand, local_program, replacing, squeeze
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, DataHook, HookInfo
from jaxlib_methods.parallel.pipelines.layout import SPEC, Layout, Optimizer
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.parallel.pipelines.schedules import Slot, one_forward_one_backward
from jaxlib_methods.parallel.pipelines.stages import StageModel, StageTree

__all__ = [
    "AsynchronousState",
    "asynchronous_pipeline",
]

PyTree = Any


class AsynchronousState(NamedTuple):
    """State of an asynchronous pipeline, what is in flight included; every leaf starts with the axes [P, D]."""

    versions: Packed  # [P, D, depth, ...]: version v in slot v mod depth; depth P, or 1 without stash
    opt_state: Packed  # [P, D, ...]
    traffic: Traffic  # what is under way
    feed: tuple[PyTree, PyTree]  # [P, D, P, ...] inputs and targets of the last P micro-batches
    data_hook: PyTree  # state of the hook on the data axis
    fed: jax.Array  # int32 [P, D]: micro-batches since the pipe was filled
    updates: jax.Array  # int32 [P, D]: optimizer steps of the stage in all


def asynchronous_pipeline(
    model: StageModel,
    stages: Sequence[StageTree],
    optimizer: Optimizer,
    mesh: Mesh,
    batch: tuple[PyTree, PyTree],
    *,
    stash: bool = True,
    predict_backward: Callable[[PyTree, StageTree], StageTree] | None = None,
    average_gradients: bool = True,
    forward_hook: BoundaryHook | None = None,
    backward_hook: BoundaryHook | None = None,
    data_hook: DataHook | None = None,
) -> Pipeline:
    """Asynchronous 1F1B with delays of exactly P - 1 - j updates on stage j.

    `step` takes n micro-batches into the pipe and leaves it full; `drain` finishes what is in flight. Stages recompute
    their activations from their inputs, at the weights of the backward pass.

    Args:
      model: what the stages compute.
      stages: the trees of the stages from `split_stages`, or their shapes.
      optimizer: of each stage, on its own tree: gradient clipping in its chain acts per stage. Or a function of the
        stage's delay P - 1 - j (int32 scalar, traced) that returns the optimizer; all must have states of one
        structure. For K micro-batches per update give `optax.MultiSteps(it, K).gradient_transformation()`.
      mesh: from `make_mesh`.
      batch: one micro-batch (inputs, targets) of all replicas, or its shapes: arrays (B, ...).
      stash: whether the backward pass uses the weights of the forward pass.
      predict_backward: without stash, (optimizer state, newest parameters) -> parameters of the backward pass, such as
        `optimizers.no_stash.discrepancy_corrected`; None: the newest.
      average_gradients: whether the gradients of the replicas are averaged before each update; False leaves the
        replicas to `data_hook`.
      forward_hook: at the boundaries, on activations.
      backward_hook: at the boundaries, on cotangents.
      data_hook: on the data axis, after each optimizer step.

    Returns:
      The pipeline; its state is an `AsynchronousState`.

    Raises:
      ValueError: for stages, a mesh or a batch that do not fit, and for `predict_backward` with a stash.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> from jaxlib_methods.parallel import make_mesh, shard_batch
      >>> model = StageModel(
      ...     embed=lambda E, ids: E[ids],
      ...     block=lambda w, x: jnp.tanh(x @ w),
      ...     head=lambda w, x, y: jnp.mean((x @ w - y) ** 2),
      ... )
      >>> stages = ({"embed": jnp.ones((5, 2)), "blocks": (jnp.eye(2),), "head": jnp.ones(2)},)  # one, for any machine
      >>> mesh, ids, y = make_mesh(1), np.zeros((6, 4), np.int32), np.zeros((6, 4), np.float32)
      >>> pipe = asynchronous_pipeline(model, stages, optax.sgd(0.1), mesh, (ids[0], y[0]))
      >>> state, out = pipe.step(pipe.init(stages), *shard_batch(mesh, (ids, y)))
      >>> bool(out.loss[5] < out.loss[0]), out.microbatch.tolist()
      (True, [0, 1, 2, 3, 4, 5])

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov]; Narayanan et
    al. (SOSP 2019), arXiv:1806.03377 [narayanan2019pipedream].
    """
    if stash and predict_backward is not None:
        raise ValueError("predict_backward replaces the stash; pass stash=False, or leave it out")
    layout = Layout(mesh, stages, optimizer, repeats=1)
    program, local = local_program(layout, model, batch, (forward_hook, backward_hook))
    P, D = layout.num_stages, layout.num_replicas
    depth = P if stash else 1

    def start(params: Packed, opt_state: Packed) -> AsynchronousState:
        params, opt_state = squeeze((params, opt_state))
        versions = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (depth, *leaf.shape)), params)
        feed = jax.tree.map(lambda leaf: jnp.zeros((P, *leaf.shape), leaf.dtype), local)
        of_hook = () if data_hook is None else data_hook.init(params)
        zero = jnp.zeros((), jnp.int32)
        return expand(engine.vary(AsynchronousState(versions, opt_state, program.start(P), feed, of_hook, zero, zero)))

    def version_of(m: jax.Array) -> jax.Array:
        delay = P - 1 - jax.lax.axis_index("stage")
        return jnp.maximum(m - delay, 0) % depth

    def newest(versions: Packed, number: jax.Array) -> Packed:
        return jax.tree.map(lambda ring: read(ring, number % depth), versions)

    def update(slot: Slot, versions: Packed, opt_state: Packed, grads: Packed, m: jax.Array, worked: jax.Array) -> Any:
        """The optimizer step of the stages that worked backward: version m + 1 beside version m."""

        def step(kind: int) -> tuple[Packed, Packed]:
            optimizer = layout.optimizer(jax.lax.axis_index("stage"))
            params, state = engine.update_stage(
                optimizer,
                layout.params.unpack(kind, newest(versions, m)),
                layout.opt_state.unpack(kind, opt_state),
                layout.params.unpack(kind, grads),
            )
            params, state = layout.params.pack(kind, params), layout.opt_state.pack(kind, state)
            ring = jax.tree.map(lambda ring, leaf: write(ring, leaf, (m + 1) % depth), versions, params)
            return engine.vary((ring, state))

        backward = [not forward for forward in slot.forward]
        kinds = sorted({kind for kind, works in zip(layout.kind_of, backward, strict=True) if works})
        index = [kinds.index(kind) + 1 if works else 0 for kind, works in zip(layout.kind_of, backward, strict=True)]
        branches = [lambda: (versions, opt_state), *[lambda kind=kind: step(kind) for kind in kinds]]
        chosen = jnp.where(worked, jnp.array(index, jnp.int32)[jax.lax.axis_index("stage")], 0)
        return jax.lax.switch(chosen, branches)

    def run(state: AsynchronousState, batches: tuple[PyTree, PyTree] | None, repetitions: int) -> Any:
        """Repeats the two slots; without batches the pipe runs dry."""
        state = squeeze(state)
        begin = state.fed

        def body(slot: Slot, i: jax.Array, carry: Any) -> tuple[Any, jax.Array]:
            versions, opt_state, traffic, feed, of_hook, grads, updates = carry
            k = begin + i
            if batches is not None and slot is pattern.slots[0]:
                feed = jax.tree.map(lambda ring, new: write(ring, read(new, i), k % P), feed, batches)
            tree_of = lambda kind, m: layout.params.unpack(kind, newest(versions, version_of(m)))

            def backward_tree(kind: int, m: jax.Array) -> StageTree:
                if predict_backward is None:
                    return tree_of(kind, m)
                return predict_backward(layout.opt_state.unpack(kind, opt_state), tree_of(kind, m))

            traffic, done = engine.run_slot(
                program,
                slot,
                k,
                begin if batches is None else k + 1,
                traffic,
                grads,
                tree_of,
                backward_tree,
                lambda m: jax.tree.map(lambda ring: read(ring, m % P), feed),
                accumulate=False,
            )
            if P > 1 or slot is pattern.slots[1]:
                grads = averaged = done.grads
                if average_gradients and D > 1:
                    averaged = engine.vary(jax.tree.map(lambda g: jax.lax.pmean(g, "data"), grads))
                m = done.microbatch
                versions, opt_state = update(slot, versions, opt_state, averaged, m, done.worked_backward)
                if data_hook is not None:
                    info = HookInfo(jax.lax.axis_index("stage"), m, done.worked_backward)
                    params = newest(versions, m + 1)
                    changed, of_hook = engine.select(
                        info.active, data_hook.apply(params, of_hook, info), (params, of_hook)
                    )
                    back = lambda ring, new, old: ring if new is old else write(ring, new, (m + 1) % depth)
                    versions = jax.tree.map(back, versions, changed, params)
                updates += done.worked_backward.astype(jnp.int32)
            return (versions, opt_state, traffic, feed, of_hook, grads, updates), done.loss

        pattern = one_forward_one_backward(P, repetitions)
        grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout.params.shapes)
        carry = (*state[:5], grads, state.updates)
        (*rest, _, updates), (loss,) = engine.run_phases((pattern,), body, carry)
        k = begin + jnp.arange(repetitions, dtype=jnp.int32)
        fed = begin if batches is None else begin + repetitions
        finished = jnp.where((k >= P // 2) & (k - P // 2 < fed), k - P // 2, -1)
        # Equal on all devices, which a maximum says in a way that the type of the result shows.
        losses = Losses(jax.lax.pmean(jax.lax.psum(loss, "stage"), "data"), jax.lax.pmax(finished, engine.AXES))
        return AsynchronousState(*rest, fed, updates), losses

    def step(state: AsynchronousState, inputs: PyTree, targets: PyTree) -> tuple[AsynchronousState, Losses]:
        state, losses = run(state, (inputs, targets), len(jax.tree.leaves(inputs)[0]))
        return expand(engine.vary(state)), losses

    def drain(state: AsynchronousState) -> tuple[AsynchronousState, Losses]:
        state, losses = run(state, None, P - 1)
        ring = jax.tree.map(lambda ring: write(ring, read(ring, state.fed % depth), 0), state.versions)
        return expand(engine.vary(state._replace(versions=ring, fed=jnp.zeros_like(state.fed)))), losses

    def current(state: AsynchronousState) -> tuple[Packed, Packed, jax.Array]:
        """Newest parameters, optimizer state, micro-batches in flight."""
        state = squeeze(state)
        made = jnp.maximum(state.fed - P + 1 + jax.lax.axis_index("stage") // 2, 0)  # B in slots before 2 fed
        return expand(engine.vary((newest(state.versions, made), state.opt_state, state.fed)))

    shard_map = lambda f, inputs, outputs: jax.shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs)
    feed = PartitionSpec(None, "data")
    out = (SPEC, PartitionSpec())
    return Pipeline(
        layout=layout,
        batch=batch,
        start=jax.jit(shard_map(start, (SPEC, SPEC), SPEC)),
        current=jax.jit(shard_map(current, (SPEC,), SPEC)),
        step=jax.jit(shard_map(step, (SPEC, feed, feed), out), donate_argnums=0),
        replaced=replacing(
            layout,
            (forward_hook, backward_hook),
            data_hook,
            lambda fresh, old, hooks: old._replace(
                versions=fresh.versions, opt_state=fresh.opt_state, traffic=old.traffic._replace(hooks=hooks)
            ),
            lambda state: state.traffic.hooks,
        ),
        drain=jax.jit(shard_map(drain, (SPEC,), out), donate_argnums=0),
    )
