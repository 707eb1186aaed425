"""Low-rank compression of a trained decoder: its validation loss with parameters taken away, and its ranks.

    compressed = compression.Compression(task, calibration_windows=256)
    statistics = compressed.statistics(state.params)
    compressed.loss(state, "svd_llm", removed=0.6, statistics=statistics)

The matrices of the blocks become products of two factors, each keeping rank floor(m n keep / (m + n)).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._machinery import loop
from experiments.tasks import language_modelling
from jaxlib_methods import low_rank, trees

PyTree = Any
Method = Literal["svd", "asvd", "svd_llm"]
MATRICES = "^blocks/.*kernel$"


class Compression(NamedTuple):
    """What measures the models of one task."""

    task: language_modelling.Task
    calibration_windows: int  # of the training text, the same ones for every model

    def statistics(self, params: PyTree) -> dict[str, low_rank.compression.InputStatistics]:
        """What the linear layers are given on the calibration windows."""
        size = min(self.task.options.batch_size, self.calibration_windows)
        windows = self.task.calibration(self.calibration_windows)[:, :-1]
        batches = np.split(windows[: len(windows) // size * size], len(windows) // size)
        params = jax.device_get(params)
        # The parameters are part of the batch, so that the compiled program is the same for every model.
        inputs = lambda batch: low_rank.linear_inputs(self.task.merge(batch[0]), batch[1])
        return low_rank.collect_inputs(inputs, [(params, tokens) for tokens in batches])

    def loss(self, state: loop.TrainState, method: Method, removed: float, statistics: dict[str, Any]) -> float:
        """Validation loss with a share of every matrix's parameters removed."""
        params = low_rank.compress_kernels(
            state.params, MATRICES, removal=removed, method=method, statistics=statistics
        )
        return self.task.evaluate(state._replace(params=params))["validation_loss"]


def rank_by_type(params: PyTree, rank: Callable[[jax.Array], jax.Array]) -> dict[str, float]:
    """Mean rank over the blocks, by the last module's name in the path: query, key, ..., down."""
    found: dict[str, list[float]] = {}
    names, leaves = jax.tree.leaves(trees.path_names(params)), jax.tree.leaves(params)
    chosen = jax.tree.leaves(trees.mask_tree(params, MATRICES))
    for path, leaf, hidden in zip(names, leaves, chosen, strict=True):
        if hidden:
            found.setdefault(path.split("/")[-2], []).append(float(rank(jnp.asarray(leaf))))
    return {kind: float(np.mean(values)) for kind, values in found.items()}


def at_equal_loss(
    one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]
) -> tuple[float, float, float]:
    """Both curves (full loss, compressed loss) at the higher of their final full losses.

    Returns:
      (that full loss, the first's compressed loss there, the second's), between evaluations by linear interpolation.
    """
    loss = max(one[-1][0], other[-1][0])
    read_off = lambda curve: float(np.interp(loss, *zip(*sorted(curve), strict=True)))
    return loss, read_off(one), read_off(other)
