"""Which weights may take which values: label sets by path, auxiliary variables, and the quantized network.

    lattice = Lattice(labels=(-1, 1), rules=(("^bn", None), ("^head/", (-1, 0, 1))))
    aux = init_auxiliary(key, params, lattice)      # what the optimizer updates
    weights = project(aux, lattice, beta)           # what the network sees: soft labels
    network = quantize(aux, lattice)                # what is left at the end: every weight is in its label set

`aux`, `weights` and the network have the containers and paths of `params`; where the projection is of the lifted form
a quantized leaf of `aux` has one more axis, the labels, in front.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods.quantization import _projections
from jaxlib_methods.quantization._projections import LIFTED, Labels, as_labels, collapse, look_up, nearest_index
from jaxlib_methods.typing import PyTree

BINARY = (-1.0, 1.0)
TERNARY = (-1.0, 0.0, 1.0)


def symmetric_labels(count: int) -> Labels:
    """The integers around zero: with zero for odd counts, without it for even ones.

    Args:
      count: number of labels, at least 2.

    Returns:
      A label set, ascending.

    Raises:
      ValueError: fewer than two labels.

    Example:
      >>> symmetric_labels(2), symmetric_labels(3), symmetric_labels(4)
      ((-1.0, 1.0), (-1.0, 0.0, 1.0), (-2.0, -1.0, 1.0, 2.0))

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, official code [ajanthan2019proximal].
    """
    if count < 2:
        raise ValueError(f"a label set needs at least two labels, got {count}")
    half = count // 2
    return tuple(float(q) for q in range(-half, half + 1) if q or count % 2)


@dataclasses.dataclass(frozen=True)
class Lattice:
    """Label sets by path rule, and the projection that keeps weights among them.

    Args:
      labels: label set of the leaves that no rule matches: distinct finite numbers, at least two, in any order; `None`
        leaves them out of the quantization.
      rules: (regular expression, label set or `None`), the first one found in a leaf's path wins, as in
        `trees.label_tree`. `None` excludes: such a leaf is an ordinary weight, for example a batch-norm scale or
        the first and the last layer.
      projection: "softmax", "sparsemax" and "argmax" (lifted: an auxiliary variable per label), "tanh" and "round"
        (scalar: one per weight); the methods say which ones they are defined for.

    Raises:
      ValueError: an empty or repeating label set, an unknown projection.

    Example:
      >>> Lattice(rules=(("bn/", None), ("^head/", (-1, 0, 1)))).labels
      (-1.0, 1.0)

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """

    labels: tuple[float | int, ...] | None = BINARY
    rules: tuple[tuple[str, tuple[float | int, ...] | None], ...] = ()
    projection: str = "softmax"

    def __post_init__(self):
        if self.projection not in _projections.JACOBIANS:
            raise ValueError(f"projection must be one of {tuple(_projections.JACOBIANS)}, got {self.projection!r}")
        sets = lambda labels: None if labels is None else as_labels(labels)
        object.__setattr__(self, "labels", sets(self.labels))
        object.__setattr__(self, "rules", tuple((regex, sets(labels)) for regex, labels in self.rules))

    @property
    def lifted(self) -> bool:
        """Whether a quantized weight has one auxiliary variable per label instead of one."""
        return self.projection in LIFTED


# ---------------------------------------------------------------------------------------------------- leaf by leaf


def label_sets(lattice: Lattice, tree: PyTree, *, strict: bool = False) -> list[Labels | None]:
    """The label set of every leaf, in the order of `jax.tree.leaves`; strict: every rule must match a leaf."""
    rules = [(regex, index) for index, (regex, _) in enumerate(lattice.rules)]
    indices = trees.label_tree(tree, rules, default=len(rules), allow_unmatched=not strict)
    sets = [*(labels for _, labels in lattice.rules), lattice.labels]
    return [sets[index] for index in jax.tree.leaves(indices)]


def map_leaves(
    function: Callable[..., jax.Array], lattice: Lattice, tree: PyTree, *rest: PyTree, aux: bool = True
) -> PyTree:
    """Maps function(labels, leaf, *leaves of rest) over the quantized leaves; others keep their last argument.

    Where the first tree is one of auxiliary variables, the leading axis of lifted leaves is checked.
    """
    leaves, structure = jax.tree.flatten(tree)
    columns = [structure.flatten_up_to(other) for other in rest]
    out = []
    for labels, path, leaf, *others in zip(label_sets(lattice, tree), _paths(tree), leaves, *columns, strict=True):
        if labels is None:
            out.append([leaf, *others][-1])
            continue
        if aux and lattice.lifted and (leaf.ndim < 1 or leaf.shape[0] != len(labels)):
            raise ValueError(
                f"auxiliary variables of {path!r} must be [{len(labels)} labels, ...], got shape {leaf.shape}; "
                "build them with init_auxiliary, and exclude what is no weight by a rule (regex, None)"
            )
        out.append(function(labels, *map(jnp.asarray, (leaf, *others))))  # restored checkpoints may hold NumPy arrays
    return structure.unflatten(out)


def _paths(tree: PyTree) -> list[str]:
    return jax.tree.leaves(trees.path_names(tree))


# ------------------------------------------------------------------------------------------------ the public functions


def init_auxiliary(key: jax.Array, params: PyTree, lattice: Lattice) -> PyTree:
    """Draws auxiliary variables for a network: Xavier-uniform for rank 2 and more, N(0, 0.1^2) below.

    In lifted form Xavier's fan-out counts every label, as in the authors' code: sqrt(6 / (fan_in + d fan_out)).

    Args:
      key: typed key.
      params: the network's weights, of which only shapes, dtypes and paths matter; excluded leaves are kept as they
        are. Kernels are (..., fan_in, fan_out).
      lattice: what is quantized, and how.

    Returns:
      A tree like `params`; a quantized leaf of shape s has the shape (d, *s) in lifted form and s in scalar form.

    Raises:
      ValueError: a rule of the lattice that matches no leaf, or integer weights.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((4, 3)), "scale": jnp.ones(3)}
      >>> aux = init_auxiliary(jax.random.key(0), params, Lattice(rules=(("scale", None),)))
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

    return structure.unflatten(list(map(draw, keys, sets, _paths(params), leaves)))


def auxiliary_from(params: PyTree, lattice: Lattice) -> PyTree:
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
      >>> aux = auxiliary_from(jnp.array([0.3, -2.0]), Lattice())
      >>> quantize(aux, Lattice()).tolist()
      [1.0, -1.0]
    """
    label_sets(lattice, params, strict=True)
    distance = lambda labels, w: jnp.stack([-jnp.square(w - w.dtype.type(q)) / 2 for q in labels])
    same = lambda labels, w: w
    return map_leaves(distance if lattice.lifted else same, lattice, params, aux=False)


def primal_of(
    aux: PyTree, lattice: Lattice, beta: jax.Array | float = 1.0, *, jacobian: str = "straight_through"
) -> PyTree:
    """Projects auxiliary variables to the primal ones: rows u on the simplex (lifted), or weights w (scalar).

    Args:
      aux: from `init_auxiliary`.
      lattice: that of `aux`.
      beta: inverse temperature > 0, a scalar; without effect on the projections "argmax" and "round".
      jacobian: of gradients with respect to `aux`; a mode of the projection's own function.

    Returns:
      A tree like `aux`.

    Raises:
      ValueError: unknown Jacobian; `aux` that does not fit the lattice.

    Example:
      >>> import jax.numpy as jnp
      >>> primal_of(jnp.array([[0.1, 0.9], [0.4, 0.2]]), Lattice(projection="argmax")).tolist()
      [[0.0, 1.0], [1.0, 0.0]]

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    return _map_projection(_projections.primal, aux, lattice, beta, jacobian)


def weights_of(primal: PyTree, lattice: Lattice) -> PyTree:
    """The network's weights from the primal variables: w = sum_l q_l u_l in lifted form, w itself in scalar form.

    Args:
      primal: from `primal_of`, or what literal mirror descent updates.
      lattice: its lattice.

    Returns:
      A tree with the shapes of the network's parameters.

    Raises:
      ValueError: `primal` that does not fit the lattice.

    Example:
      >>> import jax.numpy as jnp
      >>> weights_of(jnp.array([[0.25, 1.0], [0.75, 0.0]]), Lattice()).tolist()
      [0.5, -1.0]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return map_leaves(collapse, lattice, primal) if lattice.lifted else primal


def project(
    aux: PyTree, lattice: Lattice, beta: jax.Array | float = 1.0, *, jacobian: str = "straight_through"
) -> PyTree:
    """The network's weights from the auxiliary variables, w = P(beta x) q.

    This package's optimizers take gradients with respect to the primal variables and apply the Jacobian themselves,
    each its own. So differentiate the loss with respect to the result of this function, or with respect to `aux`
    through it, where the default derivative of the projection is the identity; the two are interchangeable.
    With another `jacobian` the gradient in `aux` is complete, for any other optimizer.

    Args:
      aux: from `init_auxiliary`.
      lattice: that of `aux`.
      beta: inverse temperature > 0, a scalar, such as `inverse_temperature(opt_state)`.
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
    return _map_projection(_projections.weights, aux, lattice, beta, jacobian)


def _map_projection(
    function: Callable[..., jax.Array], aux: PyTree, lattice: Lattice, beta: jax.Array | float, jacobian: str
) -> PyTree:
    _projections.check_jacobian(lattice.projection, jacobian)

    def one(labels: Labels, x: jax.Array) -> jax.Array:
        compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        return function(lattice.projection, jacobian, labels, x, jnp.asarray(beta, compute))

    return map_leaves(one, lattice, aux)


def quantize(aux: PyTree, lattice: Lattice, beta: jax.Array | float | None = None) -> PyTree:
    """The quantized network: every weight is its best label, and that it is in its label set is checked.

    Lifted: w = q_l with l = argmax_l x_l, the lower index in a tie. Scalar: the label nearest to x. The latter is the
    limit of infinite beta; with a finite `beta` it is the label nearest to P(beta x), which differs for three labels
    and more.

    Args:
      aux: auxiliary variables, or the primal ones that literal mirror descent updates.
      lattice: theirs.
      beta: project first with this inverse temperature, as the papers do in their last step.

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
    if beta is not None:
        aux = primal_of(aux, lattice, beta)
    network = _best_labels(aux, lattice)
    assert_quantized(network, lattice)
    return network


@functools.partial(jax.jit, static_argnames="lattice")
def _best_labels(aux: PyTree, lattice: Lattice) -> PyTree:
    label = lambda labels, x: look_up(label_index(lattice, labels, x), _order(lattice, labels), x.dtype)
    return map_leaves(label, lattice, aux)


def assert_quantized(params: PyTree, lattice: Lattice) -> None:
    """Raises unless every weight is exactly one of its labels.

    Args:
      params: a network.
      lattice: its label sets; excluded leaves are not looked at.

    Raises:
      ValueError: names the leaf, how many of its entries are no label, and the first of them.

    Example:
      >>> import jax.numpy as jnp
      >>> assert_quantized({"w": jnp.array([1.0, -1.0])}, Lattice())
      >>> assert_quantized({"w": jnp.array([1.0, -0.999])}, Lattice())
      Traceback (most recent call last):
      ...
      ValueError: 1 of 2 weights of 'w' are not in the label set (-1.0, 1.0), the first is -0.999; call quantize
    """
    for labels, path, leaf in quantized_leaves(lattice, params):
        if labels is None or isinstance(leaf, jax.core.Tracer):
            continue
        exact = lambda x: np.asarray(x, leaf.dtype).astype(np.float64)  # bfloat16 has no order in NumPy
        values = exact(leaf)
        bad = ~np.isin(values, exact(labels))
        if bad.any():
            raise ValueError(
                f"{bad.sum()} of {bad.size} weights of {path!r} are not in the label set {labels}, the first is "
                f"{values[bad][0]:.6g}; call quantize"
            )


def label_share(params: PyTree, lattice: Lattice, *, tolerance: float = 1e-3) -> jax.Array:
    """Share of the weights that lie within `tolerance` of a label: how far the annealing has come.

    Args:
      params: projected weights.
      lattice: their label sets; excluded leaves do not count.
      tolerance: distance >= 0.

    Returns:
      A scalar in [0, 1], float32; 1 if nothing is quantized.

    Example:
      >>> import jax.numpy as jnp
      >>> float(label_share(jnp.array([1.0, -0.9995, 0.5, 0.0]), Lattice()))
      0.5
    """
    counts, total = [jnp.zeros((), jnp.float32)], 0
    for labels, w in zip(label_sets(lattice, params), jax.tree.leaves(params), strict=True):
        if labels is not None:
            nearest = look_up(nearest_index(w, labels), sorted(labels), w.dtype)
            counts.append(jnp.sum(jnp.abs(w - nearest) <= tolerance, dtype=jnp.float32))
            total += w.size
    return sum(counts) / total if total else jnp.ones((), jnp.float32)


def label_index(lattice: Lattice, labels: Labels, x: jax.Array) -> jax.Array:
    """Index of the best label, int32: into the labels as given (lifted) or sorted (scalar)."""
    return jnp.argmax(x, axis=0).astype(jnp.int32) if lattice.lifted else nearest_index(x, labels)


def _order(lattice: Lattice, labels: Labels) -> Labels:
    return labels if lattice.lifted else tuple(sorted(labels))


def quantized_leaves(lattice: Lattice, tree: PyTree) -> Iterator[tuple[Labels | None, str, Any]]:
    """(label set, path, leaf) of every leaf."""
    return zip(label_sets(lattice, tree), _paths(tree), jax.tree.leaves(tree), strict=True)
