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
from jaxlib_methods import models, trees

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
