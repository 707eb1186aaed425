"""Runs slots of a schedule on the devices of a mesh: one program, in which each stage branches to its own work.

A slot is: branch to F, B or nothing; then send along the boundaries that the slot uses. The branches hold no
collectives, so a stage that has nothing to do skips the computation. Kinds of stages (the first, those between, the
last) share a branch each, so the program does not grow with the number of stages.

Permutations name only the pairs of stages that exchange something in the slot. Nothing else crosses a link, and a stage
waits for its partner alone: neighbours drift apart by a slot where F and B take different times.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods.parallel.pipelines import stages as stages_
from jaxlib_methods.parallel.pipelines._transfer import transfer, vary
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, EndStates, HookStates, zeros
from jaxlib_methods.parallel.pipelines.packing import Packed, Packing
from jaxlib_methods.parallel.pipelines.schedules import Phase, Slot
from jaxlib_methods.parallel.pipelines.stages import StageModel, StageTree
from jaxlib_methods.typing import PyTree


class Traffic(NamedTuple):
    """What is under way inside of a pipeline, on one device."""

    kept: PyTree  # [depth, ...] like x: inputs of the stage whose B is still to come, micro-batch m in slot m mod depth
    x: PyTree  # activations that arrived in the last slot
    cotangent: list[jax.Array]  # cotangents that arrived in the last slot
    hooks: HookStates  # at the boundaries


@dataclasses.dataclass(frozen=True)
class Program:
    """What all schedules need to know."""

    model: StageModel
    kind_of: tuple[int, ...]  # of each stage
    params: Packing
    x: PyTree  # shapes of the activations of one micro-batch on one device
    hooks: tuple[BoundaryHook | None, BoundaryHook | None]  # at forward and at backward boundaries

    @property
    def num_stages(self) -> int:
        return len(self.kind_of)

    def is_first(self, kind: int) -> bool:
        return self.kind_of[0] == kind

    def is_last(self, kind: int) -> bool:
        return self.kind_of[-1] == kind

    def cotangents(self) -> list[jax.ShapeDtypeStruct]:
        """Shapes of what goes backward: one array for each differentiable leaf of x."""
        return [leaf for leaf in jax.tree.leaves(self.x) if stages_.differentiable(leaf)]

    def start(self, depth: int) -> Traffic:
        """An empty pipe."""
        ring = jax.tree.map(lambda leaf: jnp.zeros((depth, *leaf.shape), leaf.dtype), self.x)
        crossing = (self.x, self.cotangents())
        hooks = (
            None if hook is None else EndStates(hook.init(what), hook.init(what))
            for hook, what in zip(self.hooks, crossing, strict=True)
        )
        return Traffic(ring, zeros(self.x), zeros(self.cotangents()), HookStates(*hooks))


class Done(NamedTuple):
    """What a slot has computed on this device."""

    loss: jax.Array  # of the micro-batch, on the last stage after B; else 0
    grads: Packed | None  # after B, of this slot or summed; None in slots without B
    microbatch: jax.Array
    worked_backward: jax.Array  # bool


def kinds_of(num_stages: int) -> tuple[int, ...]:
    """First, between, last; a single stage is the only kind."""
    if num_stages <= 2:
        return tuple(range(num_stages))
    return (0, *[1] * (num_stages - 2), 2)


def run_slot(
    program: Program,
    slot: Slot,
    k: jax.Array,
    limit: jax.Array,
    traffic: Traffic,
    grads: Packed,
    forward_params: Callable[[int, jax.Array], StageTree],
    backward_params: Callable[[int, jax.Array], StageTree],
    feed: Callable[[jax.Array], tuple[PyTree, PyTree]],
    *,
    accumulate: bool,
) -> tuple[Traffic, Done]:
    """One slot of repetition k; micro-batches outside of [0, limit) do not exist.

    Args:
      program: the stages.
      slot: its pattern.
      k: repetition.
      limit: number of micro-batches.
      traffic: from the slot before.
      grads: of the slot before; B adds to it or replaces it.
      forward_params: (kind, m) -> tree of the stage for F.
      backward_params: (kind, m) -> tree of the stage for B.
      feed: m -> (inputs, targets).
      accumulate: whether B adds to `grads`.

    Returns:
      What is under way after the slot, and what was done in it.
    """
    P = program.num_stages
    stage = jax.lax.axis_index("stage")
    microbatches = slot.step * k + jnp.array(slot.offsets, jnp.int32)
    exist = (microbatches >= 0) & (microbatches < limit)
    m, active = microbatches[stage], exist[stage]
    safe = jnp.maximum(m, 0)
    forwards, backwards = any(slot.forward), not all(slot.forward)

    kept = traffic.kept
    depth = len(jax.tree.leaves(kept)[0])
    if forwards and P > 1:
        keep = active & jnp.array(slot.forward)[stage]
        store = lambda ring, x: write(ring, jnp.where(keep, x, read(ring, safe % depth)), safe % depth)
        kept = jax.tree.map(store, kept, traffic.x)
    at = lambda: jax.tree.map(lambda ring: read(ring, safe % depth), kept)

    def output(x: PyTree, cotangent: list[jax.Array], loss: jax.Array, grads: Packed) -> tuple[Any, ...]:
        return vary((x if forwards else (), (cotangent, loss, grads) if backwards else ()))

    def idle() -> tuple[Any, ...]:
        return output(traffic.x, traffic.cotangent, jnp.zeros(()), grads)

    def forward(kind: int) -> tuple[Any, ...]:
        x = feed(safe)[0] if program.is_first(kind) else traffic.x
        x = stages_.run_stage(program.model, *_alone((forward_params(kind, safe), x)))
        return output(x, traffic.cotangent, jnp.zeros(()), grads)

    def backward(kind: int) -> tuple[Any, ...]:
        inputs, targets = feed(safe)
        x = inputs if program.is_first(kind) else at()
        operands = _alone((backward_params(kind, safe), x, targets, traffic.cotangent))
        loss, gradient, cotangent = _alone(stages_.stage_vjp(program.model, *operands))
        gradient = program.params.pack(kind, gradient)
        if accumulate:
            gradient = jax.tree.map(jnp.add, grads, gradient)
        return output(traffic.x, cotangent or traffic.cotangent, loss, gradient)

    branches, index = [idle], np.zeros(P, np.int32)
    position: dict[tuple[int, bool], int] = {}
    for j, works_forward in enumerate(slot.forward):
        kind = program.kind_of[j]
        if works_forward and program.is_last(kind):
            continue  # the last stage computes in B alone, from the input that it keeps
        if (kind, works_forward) not in position:
            position[kind, works_forward] = len(branches)
            branches.append(lambda kind=kind, work=forward if works_forward else backward: work(kind))
        index[j] = position[kind, works_forward]
    chosen = jnp.where(active, jnp.asarray(index)[stage], 0)
    x, of_backward = jax.lax.switch(chosen, branches)

    out_x, out_cotangent, hooks = traffic.x, traffic.cotangent, list(traffic.hooks)
    info = (stage, microbatches, exist)
    if forwards:
        pairs = [(j, j + 1) for j in range(P - 1) if slot.forward[j]]
        out_x, hooks[0] = transfer(program.hooks[0], hooks[0], x, traffic.x, pairs, info)
    loss, done_grads = jnp.zeros(()), None
    if backwards:
        cotangent, loss, done_grads = of_backward
        pairs = [(j, j - 1) for j in range(1, P) if not slot.forward[j]]
        out_cotangent, hooks[1] = transfer(program.hooks[1], hooks[1], cotangent, traffic.cotangent, pairs, info)
    done = Done(loss, done_grads, safe, active & ~jnp.array(slot.forward)[stage])
    return Traffic(kept, out_x, out_cotangent, HookStates(*hooks)), done


def run_phases(
    phases: Sequence[Phase],
    body: Callable[[Slot, jax.Array, PyTree], tuple[PyTree, jax.Array]],
    carry: PyTree,
) -> tuple[PyTree, list[jax.Array]]:
    """Scans each phase; `body` runs a slot. The losses [repetitions] of each phase, one per repetition."""
    losses = []
    for phase in phases:

        def repetition(carry: PyTree, k: jax.Array, phase: Phase = phase) -> tuple[PyTree, jax.Array]:
            total = jnp.zeros(())
            for slot in phase.slots:
                carry, loss = body(slot, k, carry)
                total += loss
            return vary(carry), vary(total)

        carry, of_phase = jax.lax.scan(repetition, vary(carry), jnp.arange(phase.repetitions, dtype=jnp.int32))
        losses.append(of_phase)
    return carry, losses


def update_stage(
    optimizer: optax.GradientTransformation, params: StageTree, opt_state: PyTree, grads: StageTree
) -> tuple[PyTree, PyTree]:
    """The optimizer step of one stage: clipping in its chain acts on this stage alone."""
    params, opt_state, grads = _alone((params, opt_state, grads))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def _alone(tree: PyTree) -> PyTree:
    """Keeps the compiler from fusing across: what a stage computes is to the bit what it computes on its own."""
    return jax.lax.optimization_barrier(tree)


def read(ring: jax.Array, slot: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(ring, slot, 0, keepdims=False)


def write(ring: jax.Array, value: jax.Array, slot: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(ring, value, slot, 0)
