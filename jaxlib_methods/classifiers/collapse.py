"""Neural-collapse metrics of a classifier on a data set, streamed.

Symbols: f_i features as the classifier sees them, mu_c class means, mu_G their global mean, H = [mu_c - mu_G] (d x K),
Sigma_W the mean within-class scatter, Sigma_B = H H^T / K, W (K x d) and b the classifier, M = I - 1 1^T / K.

How many passes: counts, class means and scatters merge exactly (Chan's update, which subtracts no large numbers, so
that collapse down to round-off is seen), hence NC1, NC2, NC3, ||W mu_G + b||, VCI, rank and ETF distances take one
pass. The cosine margin and the nearest-centre mismatch are non-linear in the final mu_G and mu_c example by example;
no statistic of fixed size holds them. They take a second look at the features: from memory (N d numbers kept, the
network runs once), or by a second pass of the data through the network.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.classifiers.class_means import validate_batch
from jaxlib_methods.classifiers.class_statistics import ClassStatistics, init_class_statistics, update_class_statistics

__all__ = [
    "collapse_metrics",
    "cosine_margins",
    "nearest_centre_agreement",
    "neural_collapse",
]


def collapse_metrics(
    statistics: ClassStatistics, kernel: jax.typing.ArrayLike, bias: jax.typing.ArrayLike | None = None
) -> dict[str, float]:
    """The metrics that the statistics determine, in float64 on the host.

    nc1 = tr(Sigma_W pinv(Sigma_B)) / K; nc2 = ||W W^T/||W W^T||_F - M/sqrt(K-1)||_F; nc3 the same of W H;
    nc4_bias = ||W mu_G + b||_2; equinorm = |CV(||w_c||) - CV(||mu_c - mu_G||)| with CV = standard deviation / mean;
    vci = 1 - tr(pinv(Sigma_B + Sigma_W) Sigma_B) / min(d, K-1); etf_distance_weights and etf_distance_means, see
    `distance_to_nearest_etf`; numerical_rank = mean over classes of (nuclear / Frobenius norm)^2 of the class's
    features, with statistics kept by class.

    Args:
      statistics: of the whole data set.
      kernel: W^T, shape (d, K), as the heads keep it.
      bias: (K,); None is zero.

    Returns:
      Name -> value; all zero at perfect collapse, numerical_rank one.

    Raises:
      ValueError: a class without examples, shapes that disagree.

    Example:
      >>> import jax.numpy as jnp
      >>> W = jnp.array([[1.0, -1.0], [0.0, 0.0]])
      >>> s = update_class_statistics(init_class_statistics(2, 2), W.T, jnp.array([0, 1]))
      >>> {name: round(value, 6) for name, value in collapse_metrics(s, W).items() if name in ("nc1", "nc2", "nc3")}
      {'nc1': 0.0, 'nc2': 0.0, 'nc3': 0.0}

    Source: Papyan, Han, Donoho (PNAS 2020), arXiv:2008.08186; as in Markou, Ajanthan, Gould (NeurIPS 2024),
    arXiv:2411.01248 [papyan2020prevalence] [markou2024guiding].
    """
    n, mu, S = (np.asarray(x, np.float64) for x in statistics)
    K, d = mu.shape
    W = np.asarray(kernel, np.float64).T
    b = np.zeros(K) if bias is None else np.asarray(bias, np.float64)
    if W.shape != (K, d) or b.shape != (K,):
        raise ValueError(f"kernel must be ({d}, {K}) and bias ({K},), got {W.T.shape} and {b.shape}")
    if (empty := np.flatnonzero(n == 0)).size:
        raise ValueError(f"every class needs examples, got none of {empty.tolist()}; drop these classes or add data")
    mu_G = n @ mu / n.sum()
    H = (mu - mu_G).T
    Sigma_W = (S.sum(0) if S.ndim == 3 else S) / n.sum()
    Sigma_B = H @ H.T / K
    M = np.eye(K) - 1 / K

    Q, s, _ = np.linalg.svd(H, full_matrices=False)
    kept = s > s.max(initial=0) * max(d, K) * np.finfo(np.float64).eps
    Q, s = Q[:, kept], s[kept]
    total, vectors = np.linalg.eigh(Sigma_B + Sigma_W)
    # The scatter was summed in the statistics' type: what lies below its round-off is no direction of the data.
    alive = total > total.max(initial=0) * d * float(jnp.finfo(statistics.mean.dtype).eps)
    vectors = vectors[:, alive]
    explained = np.sum((vectors.T @ Sigma_B) * vectors.T, axis=1) / total[alive]

    off_etf = lambda A: float(np.linalg.norm(A / max(np.linalg.norm(A), 1e-300) - M / math.sqrt(K - 1)))
    variation = lambda norms: norms.std(ddof=1) / max(norms.mean(), 1e-300)
    metrics = {
        "nc1": float(np.sum(np.einsum("ik,ij,jk->k", Q, Sigma_W, Q, optimize=True) / s**2)),
        "vci": float(1 - explained.sum() / min(d, K - 1)),
        "nc2": off_etf(W @ W.T),
        "equinorm": float(abs(variation(np.linalg.norm(W, axis=1)) - variation(np.linalg.norm(H, axis=0)))),
        "nc3": off_etf(W @ H),
        "nc4_bias": float(np.linalg.norm(W @ mu_G + b)),
    }
    if d >= K - 1:
        metrics["etf_distance_weights"] = _distance(W.T)
        metrics["etf_distance_means"] = _distance(H)
    if S.ndim == 3:
        # Second moments about the origin, put together in float64: the means dominate them near collapse.
        second = S + n[:, None, None] * mu[:, :, None] * mu[:, None, :]
        singular = np.sqrt(np.maximum(np.linalg.eigvalsh(second), 0))
        norms = np.maximum(np.sum(singular**2, axis=1), 1e-300)
        metrics["numerical_rank"] = float(np.mean(np.sum(singular, axis=1) ** 2 / norms))
    return metrics


def _distance(Y: np.ndarray) -> float:
    """`distance_to_nearest_etf` in float64 without JAX's x64 mode."""
    K = Y.shape[1]
    YM = (Y - Y.mean(axis=1, keepdims=True)) / max(np.linalg.norm(Y), 1e-300)
    return float(2 - 2 / math.sqrt(K - 1) * np.linalg.norm(YM, "nuc"))


def cosine_margins(features: jax.Array, labels: jax.Array, kernel: jax.Array, global_mean: jax.Array) -> jax.Array:
    """Cosine margin of each example: cos(f_i - mu_G, w_y - wbar) - max_{j != y} cos(f_i - mu_G, w_j - wbar).

    Args:
      features: (B, d).
      labels: (B,).
      kernel: W^T, shape (d, K).
      global_mean: mu_G, shape (d,).

    Returns:
      Margins (B,), at most 2; K/(K-1) for every example at perfect collapse.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlib_methods.classifiers import simplex_etf
      >>> W = simplex_etf(3, 4)
      >>> cosine_margins(W, jnp.arange(3), W.T, jnp.zeros(4)).round(4).tolist()
      [1.5, 1.5, 1.5]

    Source: Markou, Ajanthan, Gould (NeurIPS 2024), arXiv:2411.01248 [markou2024guiding].
    """
    unit = lambda x, axis: x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True)), 1e-12)
    f = unit(features - global_mean[None, :], 1)
    cosines = matmul(f, unit(kernel - jnp.mean(kernel, axis=1, keepdims=True), 0))
    own = jax.nn.one_hot(labels, kernel.shape[1], dtype=bool)
    return jnp.sum(jnp.where(own, cosines, 0), axis=1) - jnp.max(jnp.where(own, -jnp.inf, cosines), axis=1)


def nearest_centre_agreement(
    features: jax.Array, kernel: jax.Array, bias: jax.Array, class_means: jax.Array
) -> jax.Array:
    """Whether the classifier and the nearest class centre name the same class, for each example (NC4).

    Args:
      features: (B, d).
      kernel: W^T, shape (d, K).
      bias: (K,).
      class_means: mu_c, shape (K, d).

    Returns:
      Flags (B,): argmin_c ||f - mu_c|| == argmax_c (W f + b)_c.

    Example:
      >>> import jax.numpy as jnp
      >>> nearest_centre_agreement(jnp.eye(2), jnp.eye(2), jnp.zeros(2), jnp.eye(2)).tolist()
      [True, True]

    Source: Papyan, Han, Donoho (PNAS 2020), arXiv:2008.08186 [papyan2020prevalence].
    """
    logits = matmul(features, kernel) + bias[None, :]
    centre = jnp.mean(class_means, axis=0, keepdims=True)  # differences of close means lose no digits this way
    means = class_means - centre
    scores = matmul(features - centre, means.T) - 0.5 * jnp.sum(means * means, axis=1)[None, :]
    return jnp.argmax(logits, axis=1) == jnp.argmax(scores, axis=1)


_update = jax.jit(update_class_statistics, donate_argnums=0)


@jax.jit
def _second_look(f: jax.Array, labels: jax.Array, kernel: jax.Array, bias: jax.Array, mu_G: jax.Array, mu: jax.Array):
    margins = cosine_margins(f, labels, kernel, mu_G)
    return jnp.sum(margins), jnp.sum(nearest_centre_agreement(f, kernel, bias, mu))


def neural_collapse(
    batches: Iterable[tuple[Any, Any]] | Callable[[], Iterable[tuple[Any, Any]]],
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    by_class: bool = False,
) -> dict[str, float]:
    """All neural-collapse metrics of a classifier on a data set.

    Those of `collapse_metrics`, and cosine_margin (mean of `cosine_margins`) and nc4_mismatch (percentage of
    examples on which classifier and nearest class centre disagree).

    Args:
      batches: pairs (features (B, d), labels (B,)), with the features that the classifier sees
        (`head.normalized(h)`). An iterable is read once and its features are kept in host memory, N d numbers. A
        callable that returns a fresh iterator is called twice, with O(K d + d^2) memory, for data too large to keep.
      kernel: W^T, shape (d, K).
      bias: (K,); None is zero.
      by_class: also report numerical_rank, at the price of K d^2 memory.

    Returns:
      Name -> value.

    Raises:
      ValueError: no batch, a class without examples, labels out of range, non-finite features.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlib_methods.classifiers import simplex_etf
      >>> W = simplex_etf(3, 4)
      >>> metrics = neural_collapse([(W, jnp.arange(3)), (W, jnp.arange(3))], W.T)
      >>> round(metrics["nc1"], 6), round(metrics["cosine_margin"], 6), metrics["nc4_mismatch"]
      (0.0, 1.5, 0.0)

    Source: Papyan, Han, Donoho (PNAS 2020), arXiv:2008.08186; as in Markou, Ajanthan, Gould (NeurIPS 2024),
    arXiv:2411.01248 [papyan2020prevalence] [markou2024guiding].
    """
    d, K = kernel.shape
    dtype = compute_dtype(kernel.dtype)
    kernel = kernel.astype(dtype)
    bias = jnp.zeros((K,), dtype) if bias is None else bias.astype(dtype)
    statistics = init_class_statistics(K, d, by_class=by_class, dtype=dtype)
    kept = []
    for features, labels in batches() if callable(batches) else batches:
        f, y = np.asarray(features).astype(dtype), np.asarray(labels).astype(np.int32)
        validate_batch(f, y, num_classes=K)
        statistics = _update(statistics, f, y)
        if not callable(batches):
            kept.append((f, y))
    metrics = collapse_metrics(statistics, kernel, bias)

    n, mu, _ = statistics
    mu_G = jnp.sum(n[:, None] * mu, axis=0) / jnp.sum(n)
    margin = agreement = 0.0
    for features, labels in batches() if callable(batches) else kept:
        f, y = np.asarray(features).astype(dtype), np.asarray(labels).astype(np.int32)
        totals = _second_look(f, y, kernel, bias, mu_G, mu)
        margin, agreement = margin + float(totals[0]), agreement + float(totals[1])
    size = float(jnp.sum(n))
    return metrics | {"cosine_margin": margin / size, "nc4_mismatch": 100.0 * (1 - agreement / size)}
