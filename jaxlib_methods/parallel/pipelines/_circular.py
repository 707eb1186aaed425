"""The forward pass of a circular pipeline as one scan, which JAX differentiates, branches, permutations and all."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods.parallel.pipelines import stages as stages_
from jaxlib_methods.parallel.pipelines._engine import Program, read
from jaxlib_methods.parallel.pipelines._transfer import vary
from jaxlib_methods.parallel.pipelines.hooks import zeros
from jaxlib_methods.parallel.pipelines.layout import Layout
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.typing import PyTree


def circular_loss(
    program: Program,
    layout: Layout,
    params: Packed,
    batches: tuple[PyTree, PyTree],
    *,
    num_microbatches: int,
    remat: bool,
) -> tuple[jax.Array, jax.Array]:
    """(mean loss, losses [M]), not zero on the last stage: the forward pass, to be differentiated on every device.

    Item u = 0, 1, ..., M R - 1 of a stage is round (u mod P R) div P of micro-batch (u div P R) P + u mod P; stage j
    works on item t - j in slot t. What leaves the last stage enters the first one in the next slot, one round later.
    """
    P, M, R = program.num_stages, num_microbatches, layout.num_rounds
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
            return vary((x, out) if ends else (out, jnp.zeros(())))

        return run

    idle = lambda params, x, rounds, r, m: vary((x, jnp.zeros(())))
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
        return vary(x), loss

    _, losses = jax.lax.scan(slot, vary(zeros(program.x)), jnp.arange(M * R + P - 1, dtype=jnp.int32))
    m = jnp.arange(M)
    losses = losses[(m // P * P * R + (R - 1) * P + m % P if R > 1 else m) + P - 1]
    return jnp.sum(losses) / M, losses
