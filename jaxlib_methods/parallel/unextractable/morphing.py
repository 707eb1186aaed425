r"""Unextractable models: random invertible transforms, folded into both sides of the boundaries between stages.

Row vectors, y = x W. The function $g(X) = \Phi(X U) V$ of a stage has entry matrices U and exit matrices V. At a
boundary, the sender draws T, and both sides forget it after

$$V_i \leftarrow V_i T, \qquad U_{i+1} \leftarrow T^{-1} U_{i+1}.$$

The network computes what it did, while stages that were seen at different times no longer fit together. What a model
needs besides (skip matrices, norms without gain) is in `gpt` and `gpt_coordinates`; here are the transforms, the map of
any tree of parameters and of the optimizer's first moments, and what an attacker can do. All runs on the host,
between steps, in float64.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.parallel.unextractable.transforms import Transform
from jaxlib_methods.typing import MorphPrecision, PyTree

__all__ = [
    "Sides",
    "cast_like",
    "master_copy",
    "morph",
]

Rules = Sequence[tuple[str, tuple[Hashable, Hashable]]]  # (regex, Sides)


class Sides(NamedTuple):
    """Which boundaries a parameter touches: W <- T_left^-1 W T_right.

    Args:
      left: name of the transform at the boundary that its rows (axis -2) come from; None: none.
      right: name of that which its columns (axis -1) go to; a vector, such as a bias, has this side alone.

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """

    left: Hashable | None = None
    right: Hashable | None = None


def morph(
    params: PyTree, transforms: Mapping[Hashable, Transform], rules: Rules, *, precision: MorphPrecision = "float64"
) -> PyTree:
    r"""Folds transforms into parameters, $W \leftarrow T_\mathrm{left}^{-1} W T_\mathrm{right}$.

    Axis -2 is the left side and axis -1 the right one, so that the kernel of a convolution (..., in, out) is
    transformed at every tap. A transform (*batch, d, d) belongs to stacked layers (*batch, ...).

    Rounding: the errors of a chain of transforms add up, by `rounding_bound` at most. For parameters in half precision
    keep a `master_copy`, fold into that, and serve `cast_like(master, params)`: what is rounded after each fold is lost
    after some.

    Args:
      params: any tree of arrays, on the host or on devices. On devices each process folds what it holds; the last two
        axes of a parameter with a rule must not be split.
      transforms: by name; a name that the rules have and this has not is an identity, which drops a boundary.
      rules: (regex, `Sides`) by parameter path, as in `trees.label_tree`; a parameter without a rule stays as it is.
      precision: "float64" folds in it and rounds once, to the parameter's dtype; "parameter" rounds the transforms to
        that dtype first and accumulates in float32, as accelerators do.

    Returns:
      A tree like `params`: dtypes, shardings, and NumPy where it was NumPy.

    Raises:
      ValueError: for a rule that matches nothing, a transform that no rule names, and sizes that do not fit.

    Example:
      >>> from jaxlib_methods.parallel.unextractable import draw_transform
      >>> T = draw_transform(3, key=jax.random.key(0))
      >>> params = {"V": np.ones((2, 3)), "U": np.ones((3, 4))}
      >>> new = morph(params, {"b": T}, [("V", Sides(right="b")), ("U", Sides(left="b"))])
      >>> bool(np.allclose(new["V"] @ new["U"], params["V"] @ params["U"]))
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    checks.one_of(MorphPrecision, precision=precision)
    weight = lambda T: (T.inverse, T.matrix)
    leaves, structure = jax.tree.flatten(params)
    sides, names = sides_of(params, transforms, rules), jax.tree.leaves(trees.path_names(params))
    new = [
        fold(name, leaf, factors_of(side, transforms, weight), precision)
        for name, leaf, side in zip(names, leaves, sides, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def sides_of(params: PyTree, transforms: Mapping[Hashable, Transform], rules: Rules) -> list[Sides]:
    named = {name for _, side in rules for name in side}
    if unknown := [name for name in transforms if name not in named]:
        raise ValueError(f"no rule names the transforms {unknown}; the rules name {sorted(map(str, named - {None}))}")
    labels = trees.label_tree(params, rules, default=Sides())
    return [Sides(*side) for side in jax.tree.structure(params).flatten_up_to(labels)]


def factors_of(side: Sides, transforms: Mapping[Hashable, Transform], pair: Callable) -> tuple:
    left, right = (transforms.get(name) for name in side)
    return None if left is None else pair(left)[0], None if right is None else pair(right)[1]


def fold(name: str, leaf: Any, factors: tuple, precision: str) -> Any:
    """L W R of one parameter; on devices, part by part."""
    if all(factor is None for factor in factors):
        return leaf
    _check_sizes(name, np.shape(leaf), factors)
    if not isinstance(leaf, jax.Array):
        return _product(np.asarray(leaf), factors, precision, ())
    parts, arrays = {}, []
    for shard in leaf.addressable_shards:
        if shard.data.shape[-2:] != leaf.shape[-2:]:
            raise ValueError(
                f"{name!r} is split along its last two axes, {leaf.sharding}; gather it before the transform"
            )
        where = str(shard.index)
        if where not in parts:
            parts[where] = _product(np.asarray(shard.data), factors, precision, shard.index)
        arrays.append(jax.device_put(parts[where], shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _check_sizes(name: str, shape: tuple[int, ...], factors: tuple) -> None:
    for factor, axis in zip(factors, (-2, -1), strict=True):
        if factor is None:
            continue
        vector = len(shape) == factor.ndim - 1 and axis == -1
        batch = factor.shape[:-2]
        if len(shape) < factor.ndim - vector or shape[axis] != factor.shape[-1] or shape[: len(batch)] != batch:
            raise ValueError(f"a transform {factor.shape} does not fit axis {axis} of {name!r} with shape {shape}")


def _product(W: np.ndarray, factors: tuple, precision: str, index: tuple) -> np.ndarray:
    def factor(T: np.ndarray) -> np.ndarray:
        T = T[tuple(index[: T.ndim - 2])]
        T = T if precision == "float64" else T.astype(W.dtype).astype(compute)
        return T.reshape(*T.shape[:-2], *(1,) * (len(shape) - T.ndim), *T.shape[-2:])

    compute = np.float64 if precision == "float64" or W.dtype == np.float64 else np.float32
    left, right = factors
    vector = right is not None and W.ndim == right.ndim - 1
    X = (W[..., None, :] if vector else W).astype(compute)
    shape = X.shape
    X = X if left is None else factor(left) @ X
    X = X if right is None else X @ factor(right)
    return (X[..., 0, :] if vector else X).astype(W.dtype)


def master_copy(params: PyTree) -> PyTree:
    """The parameters in float64 on the host: what `morph` folds into when they are served in a lower precision.

    Args:
      params: any tree of floating arrays.

    Returns:
      A tree of NumPy arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> master_copy({"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype
      dtype('float64')

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)


def cast_like(master: PyTree, params: PyTree) -> PyTree:
    """The master copy in the dtypes, and on the devices, of the parameters.

    Args:
      master: of `master_copy`, with transforms folded in.
      params: what it serves as.

    Returns:
      A tree like `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> cast_like(master_copy(params), params)["w"].dtype.name
      'bfloat16'

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """

    def cast(new: np.ndarray, leaf: Any) -> Any:
        new = new.astype(leaf.dtype)
        return jax.device_put(new, leaf.sharding) if isinstance(leaf, jax.Array) else new

    return jax.tree.map(cast, master, params)
