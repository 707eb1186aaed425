"""Which weights may take which values: label sets by path, and what is read from a network that follows them."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.quantization._projection_maps import LIFTED
from jaxlib_methods.quantization.labels import BINARY, Labels, as_labels, look_up, nearest_index
from jaxlib_methods.typing import PyTree, WeightProjection

__all__ = ["Lattice", "assert_quantized", "label_share"]


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
    projection: WeightProjection = "softmax"

    def __post_init__(self):
        checks.one_of(WeightProjection, projection=self.projection)
        sets = lambda labels: None if labels is None else as_labels(labels)
        object.__setattr__(self, "labels", sets(self.labels))
        object.__setattr__(self, "rules", tuple((regex, sets(labels)) for regex, labels in self.rules))

    @property
    def lifted(self) -> bool:
        """Whether a quantized weight has one auxiliary variable per label instead of one."""
        return self.projection in LIFTED


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


# ------------------------------------------------------------------------------------------------------- leaf by leaf


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


def quantized_leaves(lattice: Lattice, tree: PyTree) -> Iterator[tuple[Labels | None, str, Any]]:
    """(label set, path, leaf) of every leaf."""
    return zip(label_sets(lattice, tree), _paths(tree), jax.tree.leaves(tree), strict=True)
