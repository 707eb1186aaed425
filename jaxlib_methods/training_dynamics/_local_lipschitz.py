r"""The local Lipschitz constant of the gradient along one step of training, from gradients over a whole data set."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxlib_methods.typing import LossFn, PyTree

STEP_FRACTIONS = (
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
)  # where the paper takes the gradient


def local_lipschitz(
    gradient_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    next_params: PyTree,
    *,
    fractions: Sequence[float] = STEP_FRACTIONS,
) -> jax.Array:
    r"""How fast the gradient changes on the way from one iterate to the next.

    $L = \max_\gamma \|g(w + \gamma d) - g(w)\|_2 / \|\gamma d\|_2$ with $d = w' - w$, over all parameters together. For
    a quadratic it is $\|A d\|/\|d\|$ at every $\gamma$. Matrix products run in the highest precision, because close
    gradients are subtracted.

    Args:
      gradient_fn: `params -> gradient`, of the whole training set, e.g. `mean_gradient` with its data bound.
      params: $w$, before a step of the optimizer.
      next_params: $w'$, after it.
      fractions: points in (0, 1].

    Returns:
      L, a scalar; 0 where the step is 0.

    Raises:
      ValueError: without fractions, or with one outside (0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> A = jnp.diag(jnp.array([1.0, 3.0]))
      >>> round(float(local_lipschitz(lambda w: A @ w, jnp.zeros(2), jnp.array([0.0, 2.0]))), 4)
      3.0

    Source: Lee, Ajanthan, Torr, Jaggi (ICLR 2021), arXiv:2003.11316, after Santurkar et al. (2018)
    [lee2021understanding, santurkar2018how].
    """
    if not fractions or not all(0 < gamma <= 1 for gamma in fractions):
        raise ValueError(f"fractions must lie in (0, 1], got {tuple(fractions)}")
    norm = lambda tree: jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
    d = jax.tree.map(jnp.subtract, next_params, params)
    length = norm(d)
    with jax.default_matmul_precision("highest"):
        g = gradient_fn(params)

        def ratio(gamma: jax.Array) -> jax.Array:
            there = gradient_fn(jax.tree.map(lambda w, d: w + gamma.astype(d.dtype) * d, params, d))
            step = gamma.astype(length.dtype) * length
            change = norm(jax.tree.map(jnp.subtract, there, g))
            return jnp.where(step > 0, change / jnp.where(step > 0, step, 1), 0)

        return jnp.max(jax.lax.map(ratio, jnp.asarray(fractions)))


def mean_gradient(loss_fn: LossFn, params: PyTree, data: PyTree, *, chunk_size: int = 1000) -> PyTree:
    """The gradient of the mean loss over a whole data set, a chunk at a time, each weighted by its examples.

    Args:
      loss_fn: `(params, batch) -> loss []`, the mean over the batch.
      params: pytree of floating-point arrays.
      data: pytree of arrays with a common first axis.
      chunk_size: examples whose activations are held at once; the last chunk may be smaller.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: for data without examples, or a chunk size below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> float(mean_gradient(lambda w, x: jnp.mean(w * x), jnp.float32(1), jnp.arange(5.0), chunk_size=2))
      2.0

    Source: Lee, Ajanthan, Torr, Jaggi (ICLR 2021), arXiv:2003.11316 [lee2021understanding].
    """
    size = len(jax.tree.leaves(data)[0])
    if size < 1 or chunk_size < 1:
        raise ValueError(f"data must hold examples and chunk_size be at least 1, got {size} and {chunk_size}")
    whole = size // chunk_size
    weighted = lambda batch, count: jax.tree.map(lambda g: g * (count / size), jax.grad(loss_fn)(params, batch))
    total = jax.tree.map(jnp.zeros_like, params)
    if whole:
        chunks = jax.tree.map(lambda x: x[: whole * chunk_size].reshape(whole, chunk_size, *x.shape[1:]), data)
        add = lambda total, batch: (jax.tree.map(jnp.add, total, weighted(batch, chunk_size)), None)
        total, _ = jax.lax.scan(add, total, chunks)
    if rest := size - whole * chunk_size:
        last = weighted(jax.tree.map(lambda x: x[-rest:], data), rest)
        total = jax.tree.map(jnp.add, total, last)
    return total
