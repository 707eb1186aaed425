"""A decoder cut into the stages of a pipeline, on one device: the parameters of a stage are one vector.

    staged = staged_decoder.StagedDecoder(task, num_stages=4)
    vectors = staged.split(task.init(key))  # {"stage00": [n0], "stage01": [n1], ...}
    loss, _ = staged.loss_fn(vectors, (), windows, key)

The blocks are scanned, so that what XLA has to compile does not grow with the depth.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks import language_modelling
from jaxlib_methods import models, optimizers, trees

PyTree = Any


class StagedDecoder:
    """A decoder whose parameters are one vector for each stage, {"stage00": [n0], "stage01": [n1], ...}."""

    def __init__(self, task: language_modelling.Task, num_stages: int):
        config, stages = task.config, models.gpt_stages(task.config)
        like = jax.eval_shape(task.init, jax.random.key(0))
        leaves, structure = jax.tree.flatten(like)
        labels = jax.tree.leaves(trees.label_tree(like, stage_rules(config.layers, num_stages)))
        members = [[i for i, label in enumerate(labels) if label == stage] for stage in range(num_stages)]

        def split(params: PyTree) -> dict[str, jax.Array]:
            flat = [leaf.ravel() for leaf in jax.tree.leaves(params)]
            return {
                stage_name(stage): jnp.concatenate([flat[i] for i in members[stage]]) for stage in range(num_stages)
            }

        def join(vectors: dict[str, jax.Array]) -> PyTree:
            found = {}
            for stage in range(num_stages):
                ends = np.cumsum([math.prod(leaves[i].shape) for i in members[stage]])
                parts = jnp.split(vectors[stage_name(stage)], ends[:-1])
                found |= {i: part.reshape(leaves[i].shape) for i, part in zip(members[stage], parts, strict=True)}
            return structure.unflatten([found[i] for i in range(len(leaves))])

        def loss_fn(vectors: PyTree, model_state: PyTree, windows: jax.Array, key: jax.Array):
            del key
            embed, blocks, head = models.split_gpt_params(config, join(vectors))
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
            x = stages.embed(embed, windows[:, :-1])
            x, _ = jax.lax.scan(lambda x, block: (stages.block(block, x), None), x, stacked)
            return language_modelling.cross_entropy(stages.head(head, x), windows[:, 1:]).mean(), (model_state, {})

        self.split, self.join, self.loss_fn = jax.jit(split), jax.jit(join), loss_fn


def stage_name(stage: int) -> str:
    """Of a stage in the tree of vectors, counted from 0."""
    return f"stage{stage:02d}"


def stage_rules(num_blocks: int, num_stages: int) -> list[tuple[str, int]]:
    """Rules that label the parameters of a `models.GPT` with their stage, counted from 0; blocks are spread evenly."""
    of_blocks = [(f"^blocks/{block}/", block * num_stages // num_blocks) for block in range(num_blocks)]
    return [("^embed/", 0), *of_blocks, ("^head/", num_stages - 1)]


def measure_staleness(history: optimizers.delays.ParamHistoryState, params: PyTree) -> dict[str, float]:
    r"""How far apart the newest and the stale weights of the first stage are, and whether momentum points there.

    alignment: cosine of the angle between the step that made version s + 1 from s and the change from s + 1 to now,
    for the second oldest version s + 1 in the ring: the delay is the first stage's less one. gap: root mean square of
    newest minus stale weights.
    """
    tau = max(len(ring) for ring in jax.tree.leaves(history.history))
    m = int(history.count)
    if m < 2 * tau:
        return {}
    leaves, structure = jax.tree.flatten(params)
    pairs = zip(leaves, structure.flatten_up_to(history.history), strict=True)
    ((newest, ring),) = [pair for pair in pairs if pair[1] is not None and len(pair[1]) == tau]
    newest, ring = np.asarray(newest, np.float64), np.asarray(ring, np.float64)
    version = lambda v: ring[v % tau]
    stale, next_one = version(m - tau), version(m - tau + 1)
    step, change = next_one - stale, newest - next_one
    size = np.linalg.norm(step) * np.linalg.norm(change)
    return {
        "alignment": float(step @ change / size) if size > 0 else 0.0,
        "gap": float(np.sqrt(np.mean((newest - stale) ** 2))),
    }
