r"""What tells whether connection sensitivity can be trusted: singular values of weights and Jacobians, scores by layer.

A network propagates signals faithfully where the singular values of every layer's Jacobian are near 1 (layerwise
dynamical isometry); then no layer dominates the gate gradients. `gate_gradient` sums the signed gradients of a whole
training set in parts (`num_microbatches`), as the paper's scores need.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods.pruning.isometry import _as_matrix
from jaxlib_methods.pruning.masks import apply_masks
from jaxlib_methods.typing import ApplyFn, PyTree

__all__ = [
    "LayerSensitivity",
    "Spectrum",
    "jacobian_singular_values",
    "layer_sensitivity",
    "summarize_spectrum",
    "uniform_cross_entropy",
    "weight_singular_values",
]


class Spectrum(NamedTuple):
    """Moments and extremes of singular values.

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """

    mean: jax.Array  # float []
    std: jax.Array  # float []
    min: jax.Array  # float []
    max: jax.Array  # float []

    @property
    def condition(self) -> jax.Array:
        """max / min, infinite where the smallest is 0."""
        return self.max / self.min


def summarize_spectrum(singular_values: jax.Array) -> Spectrum:
    """Mean, standard deviation, smallest and largest of all entries.

    Args:
      singular_values: array of any shape, not empty.

    Returns:
      `Spectrum`.

    Example:
      >>> import jax.numpy as jnp
      >>> spectrum = summarize_spectrum(jnp.array([[1.0, 2.0], [2.0, 3.0]]))
      >>> float(spectrum.mean), float(spectrum.condition)
      (2.0, 3.0)

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """
    s, top = singular_values, jnp.max(singular_values)
    scaled = s / jnp.where(top > 0, top, 1)  # a deep network's values are small enough for their squares to underflow
    return Spectrum(jnp.mean(s), top * jnp.std(scaled), jnp.min(s), top)


def weight_singular_values(params: PyTree, masks: PyTree | None = None) -> PyTree:
    r"""Singular values of every masked weight $M_l \odot C_l$, a matrix of shape (fan-in n, outputs k).

    Args:
      params: pytree of floating-point arrays.
      masks: as for `apply_masks`; None: nothing is pruned.

    Returns:
      A tree like `params`: arrays of min(n, k) values in descending order, None for leaves with fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> weight_singular_values({"kernel": jnp.diag(jnp.array([2.0, 3.0])), "bias": jnp.zeros(2)})["kernel"].tolist()
      [3.0, 2.0]

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """
    masked = params if masks is None else apply_masks(params, masks)
    values = lambda leaf: None if leaf.ndim < 2 else jnp.linalg.svd(_as_matrix(leaf), compute_uv=False)
    return jax.tree.map(values, masked)


def jacobian_singular_values(
    apply_fn: ApplyFn, params: PyTree, inputs: jax.Array, *, batch_size: int = 32
) -> jax.Array:
    r"""Singular values of $J(x) = \partial f/\partial x$ at every input, by reverse mode and a direct SVD.

    Args:
      apply_fn: `(params, inputs) -> outputs [B, K]`, such as logits before the softmax.
      params: its first argument.
      inputs: examples [B, ...].
      batch_size: examples at a time; a Jacobian takes K times the size d of an example.

    Returns:
      Array of shape (B, min(K, d)), descending in each row.

    Example:
      >>> import jax.numpy as jnp
      >>> W = jnp.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
      >>> jacobian_singular_values(lambda W, x: x @ W, W, jnp.ones((2, 3))).tolist()
      [[4.0, 3.0], [4.0, 3.0]]

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """

    def values(x: jax.Array) -> jax.Array:
        J = jax.jacrev(lambda x: apply_fn(params, x[None])[0])(x)
        return jnp.linalg.svd(J.reshape(J.shape[0], -1), compute_uv=False)

    return jax.lax.map(values, inputs, batch_size=min(batch_size, len(inputs)))


def uniform_cross_entropy(logits: jax.Array) -> jax.Array:
    r"""The loss of unsupervised pruning: cross entropy with the uniform distribution as target of every example.

    $-\frac1K \sum_j \log p_j$, which is $\mathrm{KL}(\mathrm{uniform}\,\|\,p) + \log K$. No labels are read. Where all
    logits are equal its gradient is 0, and so are the scores of a network whose last layer is 0.

    Args:
      logits: shape (..., K).

    Returns:
      The mean over the leading axes, a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> round(float(uniform_cross_entropy(jnp.zeros((5, 4)))), 4)  # log 4
      1.3863

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """
    return -jnp.mean(jax.nn.log_softmax(logits))


class LayerSensitivity(NamedTuple):
    """One row of `layer_sensitivity`.

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """

    path: str  # of the leaf
    size: int  # connections
    mean: float  # of their scores
    std: float
    share: float  # of the sum of all scores, in [0, 1]


def layer_sensitivity(scores: PyTree) -> list[LayerSensitivity]:
    """Mean, spread and share of the scores of every leaf: flat over the layers where signals propagate faithfully.

    A global threshold empties the layers at the low end of the curve; `summarize_sparsity` of the masks shows how far.

    Args:
      scores: as from `connection_sensitivity`; `None` leaves are left out.

    Returns:
      One row per leaf in the order of `jax.tree.leaves`.

    Example:
      >>> import jax.numpy as jnp
      >>> rows = layer_sensitivity({"dense1": jnp.array([0.1, 0.2]), "dense2": jnp.array([0.7])})
      >>> [(row.path, row.size, round(row.share, 3)) for row in rows]
      [('dense1', 2, 0.3), ('dense2', 1, 0.7)]

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """
    names = jax.tree.leaves(trees.path_names(scores))
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.device_get(jax.tree.leaves(scores))]
    total = sum(leaf.sum() for leaf in leaves) or 1.0
    return [
        LayerSensitivity(name, leaf.size, float(leaf.mean()), float(leaf.std()), float(leaf.sum() / total))
        for name, leaf in zip(names, leaves, strict=True)
    ]
