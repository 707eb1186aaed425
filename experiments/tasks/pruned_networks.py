"""Networks pruned before they are trained: scores of one batch or summed over a training set, and their masks.

    masks = masks_of(task, "snip", 0.98, params, model_state, key=key)               # one batch of 100 examples
    scores = sensitivity(logits_fn, standardise, "unsupervised", params, *whole_batches(split))

The authors of SNIP score one batch; their later studies the whole training set, in parts.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import images
from experiments.tasks import classification
from jaxlib_methods import pruning, trees
from jaxlib_methods.pruning.signal_propagation import uniform_cross_entropy
from jaxlib_methods.typing import PruningPolicy, PyTree

READS_DATA = ("snip", "grasp")  # scores that depend on the size of the scoring batch
SCORING_BATCH = 100  # examples of one gradient of a score that is summed over a training set


def masks_of(
    task: classification.Task,
    score: str,
    sparsity: float,
    params: PyTree,
    model_state: PyTree,
    *,
    key: jax.Array,
    batch_size: int = 100,
    gated: PruningPolicy = "snip",
) -> PyTree:
    """Masks by a score of one batch; the batch norm is in evaluation mode while scoring, as in the authors' code."""
    candidates, others = trees.partition(params, pruning.mark_prunable(params, gated))
    if score in READS_DATA:
        pixels, labels = task.dataset.train
        rows = np.asarray(jax.random.choice(key, len(labels), (min(batch_size, len(labels)),), replace=False))
        scores = score_batch(task, score, candidates, others, model_state, images.Split(pixels[rows], labels[rows]))
    elif score == "random":
        scores = pruning.scores.random(candidates, key=key)
    elif score == "synflow":  # 100 cuts without data, as its authors
        forward = lambda c, x: task.forward(trees.combine(c, others), model_state, x, False)[0]
        example = jnp.zeros((1, *task.dataset.train.images.shape[1:]))
        return pruning.iterative_prune(lambda c: pruning.synflow(forward, c, example), candidates, sparsity)
    else:
        scores = pruning.scores.magnitude(candidates)
    return pruning.prune_masks(scores, sparsity)


def score_batch(
    task: classification.Task, score: str, candidates: PyTree, others: PyTree, model_state: PyTree, batch: images.Split
) -> PyTree:
    """Scores of the gated parameters from one batch, without weight decay and augmentation."""
    batch = images.Split(*map(jnp.asarray, batch))

    def loss(temperature: float, candidates: PyTree, batch: images.Split) -> jax.Array:
        out = task.logits(trees.combine(candidates, others), model_state, batch.images) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(out, batch.labels).mean()

    if score == "snip":
        return pruning.connection_sensitivity(functools.partial(loss, 1.0), candidates, batch)
    return pruning.grasp(functools.partial(loss, 200.0), candidates, batch)  # 200 as the authors of GraSP


def whole_batches(split: images.Split) -> tuple[images.Split, int]:
    """As many examples as fill batches of `SCORING_BATCH`, and how many batches they are."""
    count = len(split.labels) // SCORING_BATCH
    return images.Split(*(array[: count * SCORING_BATCH] for array in split)), count


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 5))
def sensitivity(
    logits: Callable[..., jax.Array],
    standardise: Callable[[jax.Array], jax.Array],
    score: str,
    params: PyTree,
    batch: images.Split,
    count: int,
) -> PyTree:
    """Connection sensitivity summed over so many parts of the batch, with its labels or with uniform targets."""

    def loss(params: PyTree, batch: images.Split) -> jax.Array:
        out = logits(params, standardise(batch.images))
        return uniform_cross_entropy(out) if score == "unsupervised" else cross_entropy(out, batch.labels)

    return pruning.connection_sensitivity(loss, params, batch, num_microbatches=count)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
