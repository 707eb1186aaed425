r"""Scores of connections: how much is lost without them. The larger, the longer a connection is kept.

Symbols as in the papers: parameters $w$, gates $c$, loss $L(c \odot w; D_b)$ on the mini-batch $D_b$. With gates on all
parameters, $\partial L/\partial c_j$ at $c = 1$ is $w_j\,\partial L/\partial w_j$, so no gate variable is needed.
"""

import jax
import jax.numpy as jnp

from jaxlib_methods._core.dtypes import common_compute_dtype
from jaxlib_methods.typing import ApplyFn, AxisName, LossFn, PyTree

__all__ = [
    "connection_sensitivity",
    "gate_gradient",
    "grasp",
    "magnitude",
    "random",
    "synflow",
]


def gate_gradient(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> PyTree:
    r"""The signed derivative by the gates, $g_j = w_j\,\partial L/\partial w_j$.

    It equals $\partial L(c \odot w)/\partial c_j$ at $c = 1$, the first-order form of $L(w) - L((1 - e_j) \odot w)$. In
    a network of ReLU, dense and convolution layers without biases its sum over a layer is the same for every layer.

    Args:
      loss_fn: `(params, batch) -> loss []`, the mean over the batch.
      params: pytree of floating-point arrays; `None` leaves are no candidates.
      batch: pytree of arrays with a common first axis.
      num_microbatches: the batch is cut into that many equal parts, scored one after the other; the signed gradients
        are averaged, so the result is that of the whole batch at a fraction of the memory.
      axis_name: inside `jax.shard_map`, the mesh axes over which the batch is spread; the signed gradients are
        averaged over them.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: for an empty batch, parts of unequal size, and (outside a trace) a loss that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.array([1.0, -2.0, 0.5]), jnp.array([[3.0, 1.0, -4.0]])
      >>> gate_gradient(lambda w, x: jnp.mean((x @ w) ** 2) / 2, w, x)
      Array([-3.,  2.,  2.], dtype=float32)

    Source: Lee, Ajanthan, Torr (ICLR 2019), arXiv:1810.02340, section 4 [lee2019snip].
    """
    _check_batch(batch, num_microbatches)
    # Inside shard_map a gradient by replicated parameters would already be summed over the devices.
    local = params if axis_name is None else jax.tree.map(lambda p: jax.lax.pcast(p, axis_name, to="varying"), params)
    value_and_grad = jax.value_and_grad(loss_fn)
    if num_microbatches == 1:
        loss, grads = value_and_grad(local, batch)
    else:
        parts = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), batch)
        first, rest = jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)
        add = lambda total, part: (jax.tree.map(jnp.add, total, value_and_grad(local, part)), None)
        total, _ = jax.lax.scan(add, value_and_grad(local, first), rest)  # one copy of the gradients at a time
        loss, grads = jax.tree.map(lambda x: x / num_microbatches, total)
    if axis_name is not None:
        loss, grads = jax.lax.pmean((loss, grads), axis_name)
    _check_finite("the loss", loss)
    return jax.tree.map(jnp.multiply, params, grads)


def connection_sensitivity(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    *,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> PyTree:
    r"""SNIP's score, the normalised size of the gate gradient: $s_j = |g_j| / \sum_i |g_i|$.

    The sum runs over the whole tree; it changes no order and makes scores comparable between networks. Micro-batches
    and devices average the signed $g$ before the absolute value is taken. The authors score a fresh network
    (variance-scaling weights, zero biases) on one mini-batch of the training set, without augmentation and weight
    decay, with batch norm in evaluation mode, and then train from another draw of the weights. Their later studies
    score the whole training set, in parts of 100, and train the weights that were scored.

    Args:
      loss_fn: `(params, batch) -> loss []`, the mean over the batch.
      params: pytree of floating-point arrays; `None` leaves are no candidates, see `mark_prunable`.
      batch: pytree of arrays with a common first axis; 100 examples suffice.
      num_microbatches: parts in which the batch is scored, see `gate_gradient`.
      axis_name: mesh axes over which the batch is spread, see `gate_gradient`.

    Returns:
      A tree like `params` of non-negative scores that sum to 1; all 0 where every gradient is 0.

    Raises:
      ValueError: for an empty batch, parts of unequal size, and (outside a trace) a loss that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.array([1.0, -2.0, 0.5]), jnp.array([[3.0, 1.0, -4.0]])
      >>> scores = connection_sensitivity(lambda w, x: jnp.mean((x @ w) ** 2) / 2, w, x)
      >>> [round(7 * float(score)) for score in scores]
      [3, 2, 2]

    Source: Lee, Ajanthan, Torr (ICLR 2019), arXiv:1810.02340, section 4 [lee2019snip].
    """
    g = gate_gradient(loss_fn, params, batch, num_microbatches=num_microbatches, axis_name=axis_name)
    scores = jax.tree.map(jnp.abs, g)
    leaves = jax.tree.leaves(scores)
    wide = common_compute_dtype(leaves)
    total = sum((jnp.sum(s, dtype=wide) for s in leaves), start=jnp.zeros((), wide))
    total = jnp.where(total > 0, total, jnp.ones_like(total))
    return jax.tree.map(lambda s: (s.astype(total.dtype) / total).astype(s.dtype), scores)


def magnitude(params: PyTree) -> PyTree:
    r"""The size of a weight, $|w_j|$.

    Args:
      params: pytree of floating-point arrays.

    Returns:
      A tree like `params` of non-negative scores.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude({"w": jnp.array([-2.0, 1.0])})
      {'w': Array([2., 1.], dtype=float32)}

    Source: Han, Pool, Tran, Dally (NeurIPS 2015), arXiv:1506.02626 [han2015learning].
    """
    return jax.tree.map(jnp.abs, params)


def random(params: PyTree, *, key: jax.Array) -> PyTree:
    """Independent uniform scores in [0, 1): the baseline that any score has to beat.

    Args:
      params: pytree of arrays; only shapes are read.
      key: typed key.

    Returns:
      A tree like `params` of float32 scores.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> random({"w": jnp.zeros((2, 3))}, key=jax.random.key(0))["w"].shape
      (2, 3)
    """
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    scores = [jax.random.uniform(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(treedef, scores)


def grasp(loss_fn: LossFn, params: PyTree, batch: PyTree) -> PyTree:
    r"""GraSP's score, how much the gradient flow needs a weight: $w_j\,(H g)_j$ with $g = \nabla L$.

    To first order, removing $w_j$ changes $\|g\|^2$ by $-2 w_j (H g)_j$. The paper removes the largest
    $S = -w \odot Hg$; here the sign is turned, so that as everywhere the largest scores are kept. Scores are signed.

    Args:
      loss_fn: `(params, batch) -> loss []`. The authors divide the logits by 200 in it.
      params: pytree of floating-point arrays; `None` leaves are no candidates.
      batch: pytree of arrays with a common first axis; the authors take 25 examples of each class.

    Returns:
      A tree like `params` of signed scores.

    Raises:
      ValueError: for an empty batch and (outside a trace) a gradient flow that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> w, x = jnp.array([1.0, 1.0]), jnp.array([[1.0, 0.0]])
      >>> grasp(lambda w, x: jnp.mean((x @ w) ** 2) / 2, w, x)
      Array([1., 0.], dtype=float32)

    Source: Wang, Zhang, Grosse (ICLR 2020), arXiv:2002.07376 [wang2020picking].
    """
    _check_batch(batch, 1)
    gradient = lambda p: jax.grad(loss_fn)(p, batch)
    g = gradient(params)
    _, hg = jax.jvp(gradient, (params,), (g,))
    scores = jax.tree.map(jnp.multiply, params, hg)
    _check_finite("a score", sum((jnp.sum(s) for s in jax.tree.leaves(scores)), start=jnp.zeros(())))
    return scores


def synflow(apply_fn: ApplyFn, params: PyTree, example: PyTree) -> PyTree:
    r"""SynFlow's score, a weight's share in the flow through the absolute network: $|w_j|\,\partial R/\partial |w_j|$.

    $R = \mathbb{1}^\top f(|w|, \mathbb{1})$ with the network $f$ of absolute weights and an input of ones; no data is
    read. Use it with `iterative_prune`, as the paper does (100 cuts, exponential): in one cut it removes whole layers.
    $R$ is a product over layers; where it overflows in float32 (deep and wide networks), score in float64.

    Args:
      apply_fn: `(params, inputs) -> outputs`, with batch norm in evaluation mode.
      params: pytree of floating-point arrays; `None` leaves are no candidates.
      example: pytree of arrays with the shapes of one input batch, e.g. (1, H, W, C); values are not read.

    Returns:
      A tree like `params` of non-negative scores.

    Raises:
      ValueError: (outside a trace) if the flow is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> synflow(lambda w, x: x @ w, jnp.array([[1.0], [-2.0]]), jnp.zeros((1, 2))).tolist()
      [[1.0], [2.0]]

    Source: Tanaka, Kunin, Yamins, Ganguli (NeurIPS 2020), arXiv:2006.05467 [tanaka2020pruning].
    """
    ones = jax.tree.map(jnp.ones_like, example)
    absolute = jax.tree.map(jnp.abs, params)
    flow, grads = jax.value_and_grad(lambda p: jnp.sum(apply_fn(p, ones)))(absolute)
    _check_finite("the synaptic flow", flow)
    return jax.tree.map(jnp.multiply, absolute, grads)


def _check_batch(batch: PyTree, num_microbatches: int) -> None:
    sizes = {x.shape[0] if x.ndim else None for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(f"the arrays of batch need one common first axis, got the sizes {sorted(map(str, sizes))}")
    size = sizes.pop()
    if size == 0:
        raise ValueError("batch is empty; score at least one example, the paper takes 100")
    if num_microbatches < 1 or size % num_microbatches:
        raise ValueError(
            f"num_microbatches must divide the batch, got {num_microbatches} for {size} examples; "
            "drop the last examples or choose a divisor"
        )


def _check_finite(what: str, value: jax.Array) -> None:
    if not isinstance(value, jax.core.Tracer) and not jnp.isfinite(value):
        raise ValueError(f"{what} is {float(value)}; look at the inputs, the labels and the scale of the weights")
