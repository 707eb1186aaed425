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

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlib_methods.parallel.pipelines import _engine as engine
from jaxlib_methods.parallel.pipelines._device import expand, squeeze
from jaxlib_methods.parallel.pipelines._engine import Traffic, read, write
from jaxlib_methods.parallel.pipelines._transfer import select, vary
from jaxlib_methods.parallel.pipelines.base import REPLICATED, Losses, Parts, Pipeline
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, DataHook, HookInfo, HookStates
from jaxlib_methods.parallel.pipelines.layout import SPEC, Layout, Optimizer
from jaxlib_methods.parallel.pipelines.mesh import AXES
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.parallel.pipelines.schedules import Slot, one_forward_one_backward
from jaxlib_methods.parallel.pipelines.stages import StageModel, StageTree
from jaxlib_methods.typing import PyTree

__all__ = [
    "AsynchronousPipeline",
    "AsynchronousState",
    "asynchronous_pipeline",
]


class AsynchronousState(NamedTuple):
    """State of an asynchronous pipeline, what is in flight included; every leaf starts with the axes [P, D]."""

    versions: Packed  # [P, D, depth, ...]: version v in slot v mod depth; depth P, or 1 without stash
    opt_state: Packed  # [P, D, ...]
    traffic: Traffic  # what is under way
    feed: tuple[PyTree, PyTree]  # [P, D, P, ...] inputs and targets of the last P micro-batches
    data_hook: PyTree  # state of the hook on the data axis
    fed: jax.Array  # int32 [P, D]: micro-batches since the pipe was filled
    updates: jax.Array  # int32 [P, D]: optimizer steps of the stage in all


class _Carry(NamedTuple):
    """What slots hand on, on one device."""

    versions: Packed
    opt_state: Packed
    traffic: Traffic
    feed: tuple[PyTree, PyTree]
    data_hook: PyTree
    grads: Packed
    updates: jax.Array


class AsynchronousPipeline(Pipeline):
    """A pipeline that stays full: `step` feeds it, `drain` empties it; `asynchronous_pipeline` makes it.

    Args:
      parts: what it is made of.
      depth: versions of the parameters that are kept.
      predict_backward: (optimizer state, newest parameters) -> parameters of the backward pass, or None.
    """

    def __init__(
        self, parts: Parts, *, depth: int, predict_backward: Callable[[PyTree, StageTree], StageTree] | None = None
    ):
        self.depth, self.predict_backward = depth, predict_backward
        super().__init__(parts)
        self._drain_jit = self._on_mesh(self._drain, (SPEC,), (SPEC, REPLICATED), donate_argnums=0)

    def drain(self, state: AsynchronousState) -> tuple[AsynchronousState, Losses]:
        """Finishes what is in flight; the state, which is donated, can be fed again or saved as a `snapshot`."""
        return self._drain_jit(state)

    def hook_states(self, state: AsynchronousState) -> HookStates:
        return state.traffic.hooks

    def replace_hook_states(self, state: AsynchronousState, hooks: HookStates) -> AsynchronousState:
        return state._replace(traffic=state.traffic._replace(hooks=hooks))

    def _with_trained(self, state: AsynchronousState, fresh: AsynchronousState) -> AsynchronousState:
        return state._replace(versions=fresh.versions, opt_state=fresh.opt_state)

    def _start(self, params: Packed, opt_state: Packed) -> AsynchronousState:
        P, zero = self.layout.num_stages, jnp.zeros((), jnp.int32)
        params, opt_state = squeeze((params, opt_state))
        versions = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.depth, *leaf.shape)), params)
        feed = jax.tree.map(lambda leaf: jnp.zeros((P, *leaf.shape), leaf.dtype), self._local_batch)
        traffic, data_hook = self._program.start(P), self._start_data_hook(params)
        return expand(vary(AsynchronousState(versions, opt_state, traffic, feed, data_hook, zero, zero)))

    def _current(self, state: AsynchronousState) -> tuple[Packed, Packed, jax.Array]:
        state, P = squeeze(state), self.layout.num_stages
        made = jnp.maximum(state.fed - P + 1 + jax.lax.axis_index("stage") // 2, 0)  # B in slots before 2 fed
        return expand(vary((self._version(state.versions, made), state.opt_state, state.fed)))

    def _step(self, state: AsynchronousState, inputs: PyTree, targets: PyTree) -> tuple[AsynchronousState, Losses]:
        state, losses = self._run(squeeze(state), (inputs, targets), len(jax.tree.leaves(inputs)[0]))
        return expand(vary(state)), losses

    def _drain(self, state: AsynchronousState) -> tuple[AsynchronousState, Losses]:
        state, losses = self._run(squeeze(state), None, self.layout.num_stages - 1)
        newest = jax.tree.map(lambda ring: write(ring, read(ring, state.fed % self.depth), 0), state.versions)
        return expand(vary(state._replace(versions=newest, fed=jnp.zeros_like(state.fed)))), losses

    def _run(
        self, state: AsynchronousState, batches: tuple[PyTree, PyTree] | None, repetitions: int
    ) -> tuple[AsynchronousState, Losses]:
        """Repeats the two slots; without batches the pipe runs dry."""
        P, begin = self.layout.num_stages, state.fed
        pattern = one_forward_one_backward(P, repetitions)

        def body(slot: Slot, i: jax.Array, carry: _Carry) -> tuple[_Carry, jax.Array]:
            k = begin + i
            if batches is not None and slot is pattern.slots[0]:
                put = lambda ring, new: write(ring, read(new, i), k % P)
                carry = carry._replace(feed=jax.tree.map(put, carry.feed, batches))
            return self._slot(slot, k, begin if batches is None else k + 1, carry)

        grads = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.layout.params.shapes)
        carry, (loss,) = engine.run_phases((pattern,), body, _Carry(*state[:5], grads, state.updates))
        k = begin + jnp.arange(repetitions, dtype=jnp.int32)
        fed = begin if batches is None else begin + repetitions
        finished = jnp.where((k >= P // 2) & (k - P // 2 < fed), k - P // 2, -1)
        # Equal on all devices, which a maximum says in a way that the type of the result shows.
        losses = Losses(jax.lax.pmean(jax.lax.psum(loss, "stage"), "data"), jax.lax.pmax(finished, AXES))
        return AsynchronousState(*carry[:5], fed, carry.updates), losses

    def _slot(self, slot: Slot, k: jax.Array, limit: jax.Array, carry: _Carry) -> tuple[_Carry, jax.Array]:
        """A slot of the schedule, and the updates of the stages that worked backward in it."""
        layout, P = self.layout, self.layout.num_stages

        def forward_tree(kind: int, m: jax.Array) -> StageTree:
            delay = P - 1 - jax.lax.axis_index("stage")
            return layout.params.unpack(kind, self._version(carry.versions, jnp.maximum(m - delay, 0)))

        def backward_tree(kind: int, m: jax.Array) -> StageTree:
            if self.predict_backward is None:
                return forward_tree(kind, m)
            return self.predict_backward(layout.opt_state.unpack(kind, carry.opt_state), forward_tree(kind, m))

        feed = lambda m: jax.tree.map(lambda ring: read(ring, m % P), carry.feed)
        traffic, done = engine.run_slot(
            self._program, slot, k, limit, carry.traffic, carry.grads, forward_tree, backward_tree, feed,
            accumulate=False,
        )  # fmt: skip
        carry = carry._replace(traffic=traffic)
        if all(slot.forward):
            return carry, done.loss
        carry = self._update(slot, carry._replace(grads=done.grads), done.microbatch, done.worked_backward)
        return carry._replace(updates=carry.updates + done.worked_backward.astype(jnp.int32)), done.loss

    def _update(self, slot: Slot, carry: _Carry, m: jax.Array, worked: jax.Array) -> _Carry:
        """The optimizer step of the stages that worked backward, version m + 1 beside version m; then the data hook."""
        layout, grads = self.layout, self._averaged(carry.grads)
        stage = jax.lax.axis_index("stage")

        def step(kind: int) -> tuple[Packed, Packed]:
            params, state = engine.update_stage(
                layout.optimizer(jax.lax.axis_index("stage")),
                layout.params.unpack(kind, self._version(carry.versions, m)),
                layout.opt_state.unpack(kind, carry.opt_state),
                layout.params.unpack(kind, grads),
            )
            params, state = layout.params.pack(kind, params), layout.opt_state.pack(kind, state)
            put = lambda ring, leaf: write(ring, leaf, (m + 1) % self.depth)
            return vary((jax.tree.map(put, carry.versions, params), state))

        backward = [not forward for forward in slot.forward]
        kinds = sorted({kind for kind, works in zip(layout.kind_of, backward, strict=True) if works})
        index = [kinds.index(kind) + 1 if works else 0 for kind, works in zip(layout.kind_of, backward, strict=True)]
        branches = [lambda: (carry.versions, carry.opt_state), *[functools.partial(step, kind) for kind in kinds]]
        chosen = jnp.where(worked, jnp.array(index, jnp.int32)[stage], 0)
        versions, opt_state = jax.lax.switch(chosen, branches)
        data_hook = carry.data_hook
        if self.data_hook is not None:
            info, params = HookInfo(stage, m, worked), self._version(versions, m + 1)
            applied = self.data_hook.apply(params, data_hook, info)
            changed, data_hook = select(info.active, applied, (params, data_hook))
            put = lambda ring, new, old: ring if new is old else write(ring, new, (m + 1) % self.depth)
            versions = jax.tree.map(put, versions, changed, params)
        return carry._replace(versions=versions, opt_state=opt_state, data_hook=data_hook)

    def _version(self, versions: Packed, number: jax.Array) -> Packed:
        return jax.tree.map(lambda ring: read(ring, number % self.depth), versions)


def asynchronous_pipeline(
    model: StageModel,
    stages: Sequence[StageTree],
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    batch: tuple[PyTree, PyTree],
    stash: bool = True,
    predict_backward: Callable[[PyTree, StageTree], StageTree] | None = None,
    average_gradients: bool = True,
    forward_hook: BoundaryHook | None = None,
    backward_hook: BoundaryHook | None = None,
    data_hook: DataHook | None = None,
) -> AsynchronousPipeline:
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
      >>> pipe = asynchronous_pipeline(model, stages, optax.sgd(0.1), mesh, batch=(ids[0], y[0]))
      >>> state, out = pipe.step(pipe.init(stages), *shard_batch(mesh, (ids, y)))
      >>> bool(out.loss[5] < out.loss[0]), out.microbatch.tolist()
      (True, [0, 1, 2, 3, 4, 5])

    Source: Ajanthan, Ramasinghe, Zuo, Avraham, Long (ICML 2025), arXiv:2505.01099 [ajanthan2025nesterov]; Narayanan et
    al. (SOSP 2019), arXiv:1806.03377 [narayanan2019pipedream].
    """
    if stash and predict_backward is not None:
        raise ValueError("predict_backward replaces the stash; pass stash=False, or leave it out")
    layout, hooks = Layout(mesh, stages, optimizer, num_rounds=1), (forward_hook, backward_hook)
    parts = Parts(layout, model, batch, hooks, data_hook, average_gradients)
    return AsynchronousPipeline(parts, depth=layout.num_stages if stash else 1, predict_backward=predict_backward)
