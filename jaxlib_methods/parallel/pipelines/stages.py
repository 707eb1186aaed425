"""A model as stages: what a stage computes, and its parameters as plain trees, cut and joined.

A model is `head(block(... block(embed(inputs))), targets)`. With P stages of R rounds, the L blocks are dealt in groups
of n = L / (P R): round r of stage j holds the blocks ((r P + j) n, ..., (r P + j) n + n - 1). The first stage also
embeds, the last one also computes the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.typing import PyTree

__all__ = [
    "StageModel",
    "join_stages",
    "sequential_loss",
    "split_stages",
]

StageTree = dict[str, Any]  # {"embed": ..., "blocks": (...), "head": ...}, the ends only where the stage has them


class StageModel(NamedTuple):
    """The three parts of a model as pure functions of their parameters, which are any trees of arrays.

        The activations x may be a tree too; its integer leaves, such as token ids, are sent along and have no gradient.

        Args:
          embed: (parameters, inputs) -> x.
          block: (parameters, x) -> x, of the same shapes; the same function for every block.
          head: (parameters, x, targets) -> the loss, a scalar: the mean over the examples of the micro-batch.

        Example:
          >>> import jax.numpy as jnp

    from jaxlib_methods._core import checks
    from jaxlib_methods.typing import PyTree
          >>> model = StageModel(
          ...     embed=lambda table, ids: table[ids],
          ...     block=lambda w, x: x + jnp.tanh(x @ w),
          ...     head=lambda w, x, y: jnp.mean((x @ w - y) ** 2),
          ... )
          >>> stages = split_stages((jnp.ones((5, 2)), [jnp.eye(2)] * 4, jnp.ones(2)), num_stages=2)
          >>> [sorted(stage) for stage in stages], len(stages[0]["blocks"])
          ([['blocks', 'embed'], ['blocks', 'head']], 2)
          >>> float(sequential_loss(model, stages, jnp.array([0, 3]), jnp.zeros(2))) > 0
          True
    """

    embed: Callable[[PyTree, PyTree], PyTree]
    block: Callable[[PyTree, PyTree], PyTree]
    head: Callable[[PyTree, PyTree, PyTree], jax.Array]


def split_stages(
    params: tuple[PyTree, Sequence[PyTree], PyTree], num_stages: int, num_rounds: int = 1
) -> tuple[StageTree, ...]:
    """Deals the parameters of a model to stages.

    Args:
      params: (of the embedding, one tree per block, of the head), as `models.split_gpt_params` gives them.
      num_stages: P.
      num_rounds: R, the rounds of a circular schedule.

    Returns:
      P trees {"embed": ..., "blocks": (block, ...), "head": ...}; "embed" only in the first and "head" only in the
      last. The blocks of a stage are in the order of its rounds.

    Raises:
      ValueError: if P R does not divide the blocks, and for blocks of different structures.

    Example:
      >>> first, last = split_stages(("E", ["b0", "b1", "b2", "b3"], "H"), num_stages=2, num_rounds=2)
      >>> first, last
      ({'blocks': ('b0', 'b2'), 'embed': 'E'}, {'blocks': ('b1', 'b3'), 'head': 'H'})

    Source: Narayanan et al. (SC 2021), arXiv:2104.04473, Section 2.2 (rounds) [narayanan2021efficient].
    """
    embed, blocks, head = params
    blocks = tuple(blocks)
    checks.at_least(1, num_stages=num_stages, num_rounds=num_rounds)
    if not blocks or len(blocks) % (num_stages * num_rounds):
        raise ValueError(
            f"{num_stages} stages of {num_rounds} round(s) must divide the {len(blocks)} blocks of the model; "
            f"take a divisor of {len(blocks)}, or another number of layers"
        )
    for i, block in enumerate(blocks):
        if jax.tree.structure(block) != jax.tree.structure(blocks[0]):
            raise ValueError(f"all blocks must have one structure, but that of block {i} differs from that of block 0")
    stages: list[StageTree] = []
    for j in range(num_stages):
        stages.append({"blocks": tuple(blocks[i] for i in layers_of(j, len(blocks), num_stages, num_rounds))})
    stages[0] = {"blocks": stages[0]["blocks"], "embed": embed}
    stages[-1]["head"] = head
    return tuple(stages)


def join_stages(stages: Sequence[StageTree], *, num_rounds: int = 1) -> tuple[PyTree, list[PyTree], PyTree]:
    """The parameters of the model again: the inverse of `split_stages`.

    Args:
      stages: its result, or trees of that form.
      num_rounds: R.

    Returns:
      (of the embedding, one tree per block, of the head).

    Example:
      >>> join_stages(split_stages(("E", ["b0", "b1", "b2", "b3"], "H"), 2, num_rounds=2), num_rounds=2)
      ('E', ['b0', 'b1', 'b2', 'b3'], 'H')
    """
    count = sum(len(stage["blocks"]) for stage in stages)
    blocks: list[PyTree] = [None] * count
    for j, stage in enumerate(stages):
        for i, block in zip(layers_of(j, count, len(stages), num_rounds), stage["blocks"], strict=True):
            blocks[i] = block
    return stages[0]["embed"], blocks, stages[-1]["head"]


def layers_of(stage: int, layers: int, num_stages: int, num_rounds: int) -> list[int]:
    """The numbers of the blocks of a stage, in its order."""
    n = layers // (num_stages * num_rounds)
    return [(r * num_stages + stage) * n + i for r in range(num_rounds) for i in range(n)]


def sequential_loss(
    model: StageModel, stages: Sequence[StageTree], inputs: PyTree, targets: PyTree, *, num_rounds: int = 1
) -> jax.Array:
    """The loss of the model without a pipeline: what every schedule is tested against, and what to evaluate with.

    Args:
      model: its functions.
      stages: its parameters, from `split_stages`.
      inputs: one micro-batch.
      targets: one micro-batch.
      num_rounds: R.

    Returns:
      The loss, a scalar.

    Example: see `StageModel`.
    """
    embed, blocks, head = join_stages(stages, num_rounds=num_rounds)
    return run_stage(model, {"embed": embed, "blocks": tuple(blocks), "head": head}, inputs, targets)


# -------------------------------------------------------------------------------------------- for the schedules


def run_stage(model: StageModel, params: StageTree, x: PyTree, targets: PyTree = None) -> PyTree:
    """What a stage with these parameters makes of its input: activations, or the loss where it has the head."""
    if "embed" in params:
        x = model.embed(params["embed"], x)
    for block in params["blocks"]:
        x = model.block(block, x)
    return model.head(params["head"], x, targets) if "head" in params else x


def stage_vjp(
    model: StageModel, params: StageTree, x: PyTree, targets: PyTree, cotangent: list[jax.Array] | None
) -> tuple[jax.Array, StageTree, list[jax.Array]]:
    """(loss, gradient of the parameters, cotangents of the differentiable leaves of x) of one stage, by recomputation.

    `cotangent` belongs to the differentiable leaves of the output; a stage with the head starts from its loss, and the
    loss of one without is 0. A stage with the embedding returns no cotangents.
    """
    leaves, structure = jax.tree.flatten(x)
    moving = [] if "embed" in params else [i for i, leaf in enumerate(leaves) if differentiable(leaf)]

    def function(params: StageTree, moved: list[jax.Array]) -> PyTree:
        filled = dict(enumerate(leaves)) | dict(zip(moving, moved, strict=True))
        out = run_stage(model, params, structure.unflatten([filled[i] for i in range(len(leaves))]), targets)
        return [leaf for leaf in jax.tree.leaves(out) if differentiable(leaf)]

    out, vjp = jax.vjp(function, params, [leaves[i] for i in moving])
    if "head" in params:
        return out[0], *vjp([jnp.ones_like(out[0])])
    return jnp.zeros(()), *vjp(cotangent)


def differentiable(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
