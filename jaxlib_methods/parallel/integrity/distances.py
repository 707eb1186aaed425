"""What SENTINEL's verifiers compare: summaries of messages, four distances between them, and Tukey's fence."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlib_methods.typing import MessageDistance

__all__ = [
    "DISTANCES",
    "expand_reference",
    "message_distances",
    "message_summary",
    "random_directions",
    "sliced_wasserstein",
    "tukey_fence",
]

DISTANCES: tuple[MessageDistance, ...] = ("absolute", "euclidean", "sign", "wasserstein")
_EPS = 1e-8


def message_summary(message: jax.Array, reduce_axes: Sequence[int] = (0,)) -> jax.Array:
    """The mean of a message over some axes, as points: float32 (N', D).

    Args:
      message: (B, N, D), or any shape whose last axis is D.
      reduce_axes: axes to average over; not the last one.

    Returns:
      The mean, its remaining axes but the last flattened to N' (1 if none remains).

    Raises:
      ValueError: if the last axis or one that does not exist is to be averaged.

    Example:
      >>> message_summary(jnp.ones((4, 3, 2)), (0, 1)).tolist()
      [[1.0, 1.0]]

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    check_axes(message.shape, reduce_axes)
    mean = jnp.mean(message.astype(jnp.float32), axis=tuple(reduce_axes))
    return mean.reshape(-1, message.shape[-1])


def check_axes(shape: tuple[int, ...], reduce_axes: Sequence[int]) -> None:
    last = len(shape) - 1
    if any(not 0 <= axis < last for axis in reduce_axes):
        raise ValueError(
            f"reduce_axes must be axes before the last one of a message of shape {tuple(shape)}, got {reduce_axes}"
        )


def expand_reference(reference: jax.Array, shape: Sequence[int], reduce_axes: Sequence[int] = (0,)) -> jax.Array:
    """A reference as a message: repeated over the axes that `message_summary` averages.

    Args:
      reference: float32 (N', D).
      shape: of the message.
      reduce_axes: as in `message_summary`.

    Returns:
      An array of that shape.

    Example:
      >>> expand_reference(jnp.ones((3, 5)), (2, 3, 5)).shape
      (2, 3, 5)

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    kept = tuple(1 if axis in reduce_axes else size for axis, size in enumerate(shape))
    return jnp.broadcast_to(reference.reshape(kept), tuple(shape))


def random_directions(width: int, num_directions: int = 64, *, key: jax.Array) -> jax.Array:
    """Unit vectors, uniform on the sphere: the projections that all verifiers of a run share.

    Args:
      width: D.
      num_directions: L.
      key: typed key.

    Returns:
      float32 (D, L).

    Example:
      >>> random_directions(8, 3, key=jax.random.key(0)).shape
      (8, 3)

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    w = jax.random.normal(key, (width, num_directions), jnp.float32)
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


def sliced_wasserstein(x: jax.Array, m: jax.Array, projections: jax.Array) -> jax.Array:
    r"""$d_4 = \mathrm{mean}_w\, \mathrm{mean}_i\, |\mathrm{sort}(x w)_i - \mathrm{sort}(m w)_i|$, order 1.

    Args:
      x: points (..., N, D).
      m: as many points (N, D).
      projections: unit columns w, (D, L).

    Returns:
      The distance (...).

    Example:
      >>> x = jnp.array([[0.0], [2.0]])
      >>> float(sliced_wasserstein(x, x[::-1] + 1.0, jnp.ones((1, 1))))
      1.0

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    project = lambda y: jnp.matmul(y, projections, precision=jax.lax.Precision.HIGHEST)
    of_x = project(x)
    both = jnp.concatenate([of_x.reshape(-1, *of_x.shape[-2:]), project(m)[None]])
    by_value = lambda y: jnp.sort(y, axis=-2)
    both = jax.lax.platform_dependent(both, cpu=sorting_network, default=by_value)
    return jnp.mean(jnp.abs(both[:-1] - both[-1:]), axis=(-2, -1)).reshape(x.shape[:-2])


@jax.jit
def sorting_network(y: jax.Array) -> jax.Array:
    """`jnp.sort(y, axis=-2)` of (..., N, L) as a bitonic network, which on a CPU is an order of magnitude faster.

    XLA sorts there by comparing two numbers at a time; log N (log N + 1) / 2 minima and maxima of whole arrays are
    vectorised. Each pass merges neighbouring runs: the second is reversed, then numbers at falling distances compared.
    """
    *batch, N, L = y.shape
    size = 1 << (N - 1).bit_length()
    y = jnp.concatenate([y, jnp.full((*batch, size - N, L), jnp.inf, y.dtype)], axis=-2)
    run = 1
    while run < size:
        for half in (run >> i for i in range(run.bit_length())):
            a, b = jnp.moveaxis(y.reshape(*batch, -1, 2, half, L), -3, 0)
            turn = (lambda c: jnp.flip(c, -2)) if half == run else (lambda c: c)
            b = turn(b)
            y = jnp.stack([jnp.minimum(a, b), turn(jnp.maximum(a, b))], axis=-3)
        run *= 2
    return y.reshape(*batch, size, L)[..., :N, :]


def message_distances(
    x: jax.Array, m: jax.Array, projections: jax.Array, names: Sequence[MessageDistance] = DISTANCES
) -> jax.Array:
    r"""The four distances of summaries x to the reference m.

    $$d_1 = \mathrm{mean}|x - m|,\quad d_2 = \frac{\|x - m\|}{\|m\| + 10^{-8}},\quad
      d_3 = \mathrm{mean}\,\mathbb{1}[\mathrm{sign}\,x \ne \mathrm{sign}\,m],\quad d_4: \text{sliced Wasserstein}.$$

    Args:
      x: summaries (..., N, D).
      m: the reference (N, D).
      projections: of `sliced_wasserstein`, (D, L).
      names: which of `DISTANCES` to compute.

    Returns:
      (..., 4) in the order of `DISTANCES`; NaN where one is not asked for.

    Example:
      >>> x, m = jnp.array([[1.0, 2.0], [3.0, -4.0]]), jnp.array([[1.0, -2.0], [3.0, -4.0]])
      >>> [round(float(d), 4) for d in message_distances(x, m, jnp.eye(2))]
      [1.0, 0.7303, 0.25, 1.0]

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel]; the normaliser of the second distance
    is this library's choice.
    """
    reference = m[(None,) * (x.ndim - 2)]
    difference, axes = x - reference, (-2, -1)
    distances = {
        "absolute": lambda: jnp.mean(jnp.abs(difference), axis=axes),
        "euclidean": lambda: jnp.sqrt(jnp.sum(difference**2, axis=axes)) / (jnp.sqrt(jnp.sum(m**2)) + _EPS),
        "sign": lambda: jnp.mean((jnp.sign(x) != jnp.sign(reference)).astype(x.dtype), axis=axes),
        "wasserstein": lambda: sliced_wasserstein(x, m, projections),
    }
    missing = jnp.full(x.shape[:-2], jnp.nan, x.dtype)
    return jnp.stack([distances[name]() if name in names else missing for name in DISTANCES], axis=-1)


def tukey_fence(samples: jax.Array, factor: jax.typing.ArrayLike = 1.5) -> jax.Array:
    r"""The upper fence $\tau = Q_3 + c\,(Q_3 - Q_1)$ of the samples along the first axis; NaN are no samples.

    Args:
      samples: (n, ...), the quartiles are interpolated linearly.
      factor: c, a number or (...).

    Returns:
      (...); NaN where there is no sample.

    Example:
      >>> float(tukey_fence(jnp.arange(1.0, 10.0)))
      13.0

    Source: Tukey (1977) [tukey1977exploratory]; Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    q1, q3 = jnp.nanquantile(samples, jnp.array([0.25, 0.75], samples.dtype), axis=0)
    return q3 + factor * (q3 - q1)
