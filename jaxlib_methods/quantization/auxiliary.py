"""Auxiliary variables: drawn, made from weights, projected to what a network sees, and quantized at the end.

    lattice = Lattice(labels=(-1, 1), rules=(("^bn", None), ("^head/", (-1, 0, 1))))
    aux = init_auxiliary(params, lattice, key=key)          # what the optimizer updates
    weights = project(aux, lattice, inverse_temperature)    # what the network sees: soft labels
    network = quantize(aux, lattice)                        # what is left: every weight is in its label set

`aux`, `weights` and the network have the containers and paths of `params`; where the projection is of the lifted form
a quantized leaf of `aux` has one more axis, the labels, in front.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods.quantization import _projection_maps
from jaxlib_methods.quantization.labels import Labels, look_up, nearest_index
from jaxlib_methods.quantization.lattice import Lattice, assert_quantized, label_sets, map_leaves, quantized_leaves
from jaxlib_methods.typing import ProjectionJacobian, PyTree

__all__ = [
    "auxiliary_to_primal",
    "init_auxiliary",
    "primal_to_weights",
    "project",
    "quantize",
    "weights_to_auxiliary",
]


def init_auxiliary(params: PyTree, lattice: Lattice, *, key: jax.Array) -> PyTree:
    """Draws auxiliary variables for a network: Xavier-uniform for rank 2 and more, N(0, 0.1^2) below.

    In lifted form Xavier's fan-out counts every label, as in the authors' code: sqrt(6 / (fan_in + d fan_out)).

    Args:
      params: the network's weights, of which only shapes, dtypes and paths matter; excluded leaves are kept as they
        are. Kernels are (..., fan_in, fan_out).
      lattice: what is quantized, and how.
      key: typed key.

    Returns:
      A tree like `params`; a quantized leaf of shape s has the shape (d, *s) in lifted form and s in scalar form.

    Raises:
      ValueError: a rule of the lattice that matches no leaf, or integer weights.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((4, 3)), "scale": jnp.ones(3)}
      >>> aux = init_auxiliary(params, Lattice(rules=(("scale", None),)), key=jax.random.key(0))
      >>> aux["kernel"].shape, aux["scale"].tolist()
      ((2, 4, 3), [1.0, 1.0, 1.0])

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, official code [ajanthan2019proximal].
    """
    leaves, structure = jax.tree.flatten(params)
    sets = label_sets(lattice, params, strict=True)
    keys = jax.random.split(key, max(len(leaves), 1))

    def draw(key: jax.Array, labels: Labels | None, path: str, leaf: jax.Array) -> jax.Array:
        if labels is None:
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"only floating-point weights are quantized, {path!r} is {leaf.dtype}; exclude it by a rule"
            )
        d = len(labels) if lattice.lifted else 1
        shape = (d, *leaf.shape) if lattice.lifted else leaf.shape
        if leaf.ndim < 2:
            return leaf.dtype.type(0.1) * jax.random.normal(key, shape, leaf.dtype)
        *window, fan_in, fan_out = leaf.shape
        limit = math.sqrt(6 / (math.prod(window) * (fan_in + d * fan_out)))
        return jax.random.uniform(key, shape, leaf.dtype, -limit, limit)

    return structure.unflatten(list(map(draw, keys, sets, jax.tree.leaves(trees.path_names(params)), leaves)))


def weights_to_auxiliary(params: PyTree, lattice: Lattice) -> PyTree:
    """Auxiliary variables of a network that is trained already: they project to its weights' nearest labels.

    x = w in scalar form; x_l = -(w - q_l)^2 / 2 in lifted form, so that the softmax over {-1, 1} is tanh(beta w).

    Args:
      params: the weights, in the range of their labels to be of use.
      lattice: what is quantized, and how.

    Returns:
      A tree like that of `init_auxiliary`.

    Raises:
      ValueError: a rule of the lattice that matches no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> aux = weights_to_auxiliary(jnp.array([0.3, -2.0]), Lattice())
      >>> quantize(aux, Lattice()).tolist()
      [1.0, -1.0]
    """
    label_sets(lattice, params, strict=True)
    distance = lambda labels, w: jnp.stack([-jnp.square(w - w.dtype.type(q)) / 2 for q in labels])
    same = lambda labels, w: w
    return map_leaves(distance if lattice.lifted else same, lattice, params, aux=False)


def auxiliary_to_primal(
    aux: PyTree,
    lattice: Lattice,
    inverse_temperature: jax.Array | float = 1.0,
    *,
    jacobian: ProjectionJacobian = "straight_through",
) -> PyTree:
    """Projects auxiliary variables to the primal ones: rows u on the simplex (lifted), or weights w (scalar).

    Args:
      aux: from `init_auxiliary`.
      lattice: that of `aux`.
      inverse_temperature: beta > 0, a scalar; without effect on the projections "argmax" and "round".
      jacobian: of gradients with respect to `aux`; a mode of the projection's own function.

    Returns:
      A tree like `aux`.

    Raises:
      ValueError: unknown Jacobian; `aux` that does not fit the lattice.

    Example:
      >>> import jax.numpy as jnp
      >>> auxiliary_to_primal(jnp.array([[0.1, 0.9], [0.4, 0.2]]), Lattice(projection="argmax")).tolist()
      [[0.0, 1.0], [1.0, 0.0]]

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    return _map_projection(_projection_maps.primal, aux, lattice, inverse_temperature, jacobian)


def primal_to_weights(primal: PyTree, lattice: Lattice) -> PyTree:
    """The network's weights from the primal variables: w = sum_l q_l u_l in lifted form, w itself in scalar form.

    Args:
      primal: from `auxiliary_to_primal`, or what literal mirror descent updates.
      lattice: its lattice.

    Returns:
      A tree with the shapes of the network's parameters.

    Raises:
      ValueError: `primal` that does not fit the lattice.

    Example:
      >>> import jax.numpy as jnp
      >>> primal_to_weights(jnp.array([[0.25, 1.0], [0.75, 0.0]]), Lattice()).tolist()
      [0.5, -1.0]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return map_leaves(_projection_maps.collapse, lattice, primal) if lattice.lifted else primal


def project(
    aux: PyTree,
    lattice: Lattice,
    inverse_temperature: jax.Array | float = 1.0,
    *,
    jacobian: ProjectionJacobian = "straight_through",
) -> PyTree:
    """The network's weights from the auxiliary variables, w = P(beta x) q.

    This package's optimizers take gradients with respect to the primal variables and apply the Jacobian themselves,
    each its own. So differentiate the loss with respect to the result of this function, or with respect to `aux`
    through it, where the default derivative of the projection is the identity; the two are interchangeable.
    With another `jacobian` the gradient in `aux` is complete, for any other optimizer.

    Args:
      aux: from `init_auxiliary`.
      lattice: that of `aux`.
      inverse_temperature: beta > 0, a scalar, such as `read_inverse_temperature(opt_state)`.
      jacobian: of gradients with respect to `aux`; a mode of the projection's own function.

    Returns:
      A tree with the shapes of the network's parameters; excluded leaves are passed on.

    Raises:
      ValueError: unknown Jacobian; `aux` that does not fit the lattice.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> aux = {"w": jnp.array([[0.3], [-0.2]]), "scale": jnp.ones(1)}
      >>> lattice = Lattice(rules=(("scale", None),))
      >>> [f"{w:.5f}" for w in project(aux, lattice, 1.5)["w"]]
      ['-0.35836']
      >>> loss = lambda aux: 0.8 * project(aux, lattice, 1.5, jacobian="exact")["w"].sum()
      >>> [f"{g:.5f}" for g in jax.grad(loss)(aux)["w"][:, 0]]
      ['-0.52295', '0.52295']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return _map_projection(_projection_maps.weights, aux, lattice, inverse_temperature, jacobian)


def _map_projection(
    function: Callable[..., jax.Array],
    aux: PyTree,
    lattice: Lattice,
    inverse_temperature: jax.Array | float,
    jacobian: str,
) -> PyTree:
    _projection_maps.check_jacobian(lattice.projection, jacobian)

    def one(labels: Labels, x: jax.Array) -> jax.Array:
        beta = jnp.asarray(inverse_temperature, compute_dtype(x.dtype))
        return function(lattice.projection, jacobian, labels, x, beta)

    return map_leaves(one, lattice, aux)


def quantize(aux: PyTree, lattice: Lattice, inverse_temperature: jax.Array | float | None = None) -> PyTree:
    """The quantized network: every weight is its best label, and that it is in its label set is checked.

    Lifted: w = q_l with l = argmax_l x_l, the lower index in a tie. Scalar: the label nearest to x. The latter is the
    limit of infinite beta; with a finite `inverse_temperature` it is the label nearest to P(beta x), which differs for
    three labels and more.

    Args:
      aux: auxiliary variables, or the primal ones that literal mirror descent updates.
      lattice: theirs.
      inverse_temperature: project first with it, as the papers do in their last step.

    Returns:
      A tree with the shapes of the network's parameters; excluded leaves are passed on.

    Raises:
      ValueError: a variable is not finite, or `aux` does not fit the lattice. Under `jax.jit` values are not looked at.

    Example:
      >>> import jax.numpy as jnp
      >>> quantize(jnp.array([[0.1, 0.9], [0.4, 0.2], [0.3, 0.1]]), Lattice((-1, 0, 1))).tolist()
      [0.0, -1.0]
      >>> quantize(jnp.array([0.4, jnp.nan]), Lattice(projection="tanh"))
      Traceback (most recent call last):
      ...
      ValueError: 1 of 2 auxiliary variables of '' are not finite, the first is nan; lower the learning rate

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, Algorithm 1 [ajanthan2019proximal].
    """
    for labels, path, leaf in quantized_leaves(lattice, aux):
        if labels is not None and not isinstance(leaf, jax.core.Tracer):
            values = np.asarray(leaf, np.float32)
            bad = ~np.isfinite(values)
            if bad.any():
                raise ValueError(
                    f"{bad.sum()} of {bad.size} auxiliary variables of {path!r} are not finite, the first is "
                    f"{values[bad][0]}; lower the learning rate"
                )
    if inverse_temperature is not None:
        aux = auxiliary_to_primal(aux, lattice, inverse_temperature)
    network = _best_labels(aux, lattice)
    assert_quantized(network, lattice)
    return network


@functools.partial(jax.jit, static_argnames="lattice")
def _best_labels(aux: PyTree, lattice: Lattice) -> PyTree:
    def label(labels: Labels, x: jax.Array) -> jax.Array:
        if lattice.lifted:
            return look_up(jnp.argmax(x, axis=0).astype(jnp.int32), labels, x.dtype)
        return look_up(nearest_index(x, labels), sorted(labels), x.dtype)

    return map_leaves(label, lattice, aux)
