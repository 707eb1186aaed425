r"""Aggregation of the replicas' gradients that a minority of malicious replicas cannot steer: the data axis' companion.

Replicas i = 1..n send vectors $g_i$ (trees of arrays with a leading axis n), f of them are malicious. All rules treat a
vector that is not finite as infinitely far away. A rule may stand in for the mean of the gradients, inside of
`jax.shard_map` after an all-gather over the data axis.
"""

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import widen
from jaxlib_methods.typing import PyTree

__all__ = [
    "centered_clip",
    "coordinate_median",
    "geometric_median",
    "krum_scores",
    "multi_krum",
    "trimmed_mean",
]


def coordinate_median(gradients: PyTree) -> PyTree:
    """The median of each coordinate.

    Args:
      gradients: arrays (n, ...).

    Returns:
      Arrays (...); of an even number the mean of the middle two.

    Example:
      >>> coordinate_median(jnp.array([[1.0, 9.0], [2.0, 8.0], [jnp.inf, -jnp.inf]])).tolist()
      [2.0, 8.0]

    Source: Yin et al. (ICML 2018), arXiv:1803.01498, Definition 1 [yin2018byzantine].
    """
    n = _count(gradients)
    return trimmed_mean(gradients, num_trimmed=(n - 1) // 2)


def trimmed_mean(gradients: PyTree, *, num_trimmed: int) -> PyTree:
    """The mean of each coordinate without its `num_trimmed` smallest and as many largest values.

    Args:
      gradients: arrays (n, ...).
      num_trimmed: at least the number f of malicious replicas. Static.

    Returns:
      Arrays (...). An entry that is not a number is sorted last, as the largest.

    Raises:
      ValueError: if nothing would be left.

    Example:
      >>> trimmed_mean(jnp.array([[1.0], [2.0], [3.0], [1e9]]), num_trimmed=1).tolist()
      [2.5]

    Source: Yin et al. (ICML 2018), arXiv:1803.01498, Definition 2 [yin2018byzantine].
    """
    n = _count(gradients)
    checks.within(f"[0, {n / 2:g})", num_trimmed=num_trimmed, remedy=f"something of {n} replicas must be left")
    return jax.tree.map(lambda g: jnp.mean(jnp.sort(g, axis=0)[num_trimmed : n - num_trimmed], axis=0), gradients)


def krum_scores(gradients: PyTree, *, num_malicious: int) -> jax.Array:
    r"""$s_i = \sum_{j \in N_i} \|g_i - g_j\|^2$ over the n - f - 2 nearest others.

    Args:
      gradients: arrays (n, ...).
      num_malicious: f, the number of malicious replicas that is to be survived. Static.

    Returns:
      float32 (n,); infinity for vectors that are not finite.

    Raises:
      ValueError: for n < 2 f + 3, where Krum guarantees nothing.

    Example:
      >>> krum_scores(jnp.array([[0.0], [1.0], [2.0], [9.0], [1.0]]), num_malicious=1).tolist()
      [2.0, 1.0, 2.0, 113.0, 1.0]

    Source: Blanchard et al. (NeurIPS 2017), arXiv:1703.02757, Section 4 [blanchard2017machine].
    """
    n = _count(gradients)
    if not 0 <= num_malicious <= (n - 3) / 2:
        raise ValueError(f"Krum needs n >= 2 f + 3 replicas, got n={n} and f={num_malicious}")
    finite, rows = _rows(gradients)
    squares = jnp.sum((rows[:, None] - rows[None]) ** 2, axis=-1)
    apart = jnp.where(finite[:, None] & finite[None] & ~jnp.eye(n, dtype=bool), squares, jnp.inf)
    return jnp.sum(jnp.sort(apart, axis=1)[:, : n - num_malicious - 2], axis=1)


def multi_krum(gradients: PyTree, *, num_malicious: int, num_keep: int | None = None) -> PyTree:
    """The mean of the `num_keep` vectors with the smallest Krum scores; `num_keep=1` is Krum.

    Args:
      gradients: arrays (n, ...).
      num_malicious: f. Static.
      num_keep: m; None: n - f. Static.

    Returns:
      Arrays (...).

    Raises:
      ValueError: as `krum_scores`, and for m outside of [1, n].

    Example:
      >>> multi_krum(jnp.array([[0.0], [1.0], [2.0], [9.0], [1.0]]), num_malicious=1, num_keep=1).tolist()
      [1.0]

    Source: Blanchard et al. (NeurIPS 2017), arXiv:1703.02757, Sections 4 and 6 [blanchard2017machine].
    """
    n = _count(gradients)
    num_keep = n - num_malicious if num_keep is None else num_keep
    checks.within(f"[1, {n}]", num_keep=num_keep)
    chosen = jnp.argsort(krum_scores(gradients, num_malicious=num_malicious), stable=True)[:num_keep]
    return jax.tree.map(lambda g: jnp.mean(g[chosen], axis=0), gradients)


def geometric_median(gradients: PyTree, *, num_steps: int = 8, eps: float = 1e-6) -> PyTree:
    r"""$\arg\min_v \sum_i \|g_i - v\|$ by the smoothed Weiszfeld iteration, from the coordinates' medians.

    Args:
      gradients: arrays (n, ...).
      num_steps: iterations. Static.
      eps: least distance by which a vector is weighted, $1 / \max(\|g_i - v\|, \epsilon)$.

    Returns:
      Arrays (...).

    Raises:
      ValueError: for negative num_steps.

    Example:
      >>> v = geometric_median(jnp.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [100.0, 100.0]]), num_steps=100)
      >>> [round(float(c), 2) for c in v]  # where the diagonals of the four points cross
      [0.5, 0.5]

    Source: Pillutla, Kakade, Harchaoui (IEEE TSP 2022), arXiv:1912.13445, Algorithm 2 [pillutla2022robust].
    """
    checks.not_negative(num_steps=num_steps)
    finite, rows = _rows(gradients)

    def step(v: jax.Array, _: None) -> tuple[jax.Array, None]:
        weights = jnp.where(finite, 1 / jnp.maximum(jnp.linalg.norm(rows - v[None], axis=1), eps), 0.0)
        return weights @ rows / jnp.maximum(jnp.sum(weights), eps), None

    return _unravel(jax.lax.scan(step, _row(coordinate_median(gradients)), None, length=num_steps)[0], gradients)


def centered_clip(gradients: PyTree, centre: PyTree, *, radius: jax.typing.ArrayLike, num_steps: int = 3) -> PyTree:
    r"""$v \leftarrow v + \frac1n \sum_i (g_i - v) \min(1, \rho / \|g_i - v\|)$, from a trusted centre.

    Args:
      gradients: arrays (n, ...).
      centre: arrays (...), for example the last step's result.
      radius: rho.
      num_steps: iterations. Static.

    Returns:
      Arrays (...). A vector that is not finite moves nothing.

    Raises:
      ValueError: for negative num_steps.

    Example:
      >>> centered_clip(jnp.array([[1.0], [-1.0], [50.0]]), jnp.zeros(1), radius=3.0, num_steps=1).tolist()
      [1.0]

    Source: Karimireddy, He, Jaggi (ICML 2021), arXiv:2012.10333, Algorithm 2 [karimireddy2021learning].
    """
    checks.not_negative(num_steps=num_steps)
    finite, rows = _rows(gradients)

    def step(v: jax.Array, _: None) -> tuple[jax.Array, None]:
        apart = rows - v[None]
        norms = jnp.linalg.norm(apart, axis=1)
        shrink = jnp.where(finite, jnp.minimum(1.0, radius / jnp.maximum(norms, jnp.finfo(rows.dtype).tiny)), 0.0)
        return v + shrink @ apart / rows.shape[0], None

    return _unravel(jax.lax.scan(step, _row(centre), None, length=num_steps)[0], gradients)


# ------------------------------------------------------------------------------ trees as rows


def _count(gradients: PyTree) -> int:
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(gradients)}
    if len(counts) != 1 or counts == {()}:
        raise ValueError(f"all gradients need the same leading axis of replicas, got {sorted(counts)}")
    return counts.pop()[0]


def _rows(gradients: PyTree) -> tuple[jax.Array, jax.Array]:
    """(which vectors are finite (n,), the vectors (n, d) in float32 at least, with zeros for the others)."""
    n = _count(gradients)
    rows = jnp.concatenate([widen(leaf).reshape(n, -1) for leaf in jax.tree.leaves(gradients)], axis=1)
    finite = jnp.all(jnp.isfinite(rows), axis=1)
    return finite, jnp.where(finite[:, None], rows, 0.0)


def _row(tree: PyTree) -> jax.Array:
    return jnp.concatenate([widen(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


def _unravel(row: jax.Array, gradients: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(gradients)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf[0].size)
    parts = [
        row[start:end].reshape(leaf.shape[1:]).astype(leaf.dtype)
        for leaf, start, end in zip(leaves, ends[:-1], ends[1:], strict=True)
    ]
    return jax.tree.unflatten(structure, parts)
