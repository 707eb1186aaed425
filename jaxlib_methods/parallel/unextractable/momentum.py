"""What an optimizer remembers of gradients, under transforms of the parameters."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods.parallel.unextractable.morphing import Rules, factors_of, fold, sides_of
from jaxlib_methods.parallel.unextractable.transforms import Transform, transpose
from jaxlib_methods.typing import PyTree, SecondMoments

__all__ = [
    "transform_momentum",
]


FIRST_MOMENTS = ("mu", "m", "trace", "momentum", "moment")  # fields of optax's and this library's optimizer states


def transform_momentum(
    opt_state: PyTree,
    params: PyTree,
    transforms: Mapping[Hashable, Transform],
    rules: Rules,
    *,
    first_moments: Sequence[str] = FIRST_MOMENTS,
    second_moments: SecondMoments = "error",
) -> PyTree:
    r"""Maps what an optimizer remembers of gradients, $G \leftarrow T_\mathrm{left}^\top G\, T_\mathrm{right}^{-\top}$.

    SGD, momentum and Muon then go on as if nothing had happened, if the transforms are orthogonal; for others, the step
    is a valid one of another network. Squared gradients cannot be mapped, because their signs are lost; sums over a row
    that is transformed on the right, as in `optimizers.row_shared_adamw`, need not be, and stay.

    Args:
      opt_state: of optax or of this library. A tree in it that has the paths and shapes of the parameters, below a
        field called as one of `first_moments`, is mapped.
      params: the parameters; only their structure and shapes matter.
      transforms: as for `morph`.
      rules: as for `morph`.
      first_moments: names of fields.
      second_moments: what to do with other such trees where a rule applies: "error", "keep" or "reset" to zero.

    Returns:
      A tree like `opt_state`.

    Raises:
      ValueError: as `morph`, and for squared gradients of a parameter with a rule.

    Example:
      >>> import optax, jax.numpy as jnp
      >>> from jaxlib_methods.parallel.unextractable import Sides, draw_transform
      >>> params, T = {"V": jnp.ones((2, 3))}, draw_transform(3, key=jax.random.key(0))
      >>> tx = optax.trace(0.9)
      >>> _, state = tx.update(params, tx.init(params))
      >>> state = transform_momentum(state, params, {"b": T}, [("V", Sides(right="b"))])
      >>> bool(np.allclose(state.trace["V"], np.ones((2, 3)) @ T.matrix, atol=1e-6))
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    checks.one_of(SecondMoments, second_moments=second_moments)
    gradient = lambda T: (transpose(T.matrix), transpose(T.inverse))
    by_path = {
        tuple(path): (np.shape(leaf), side)
        for (path, leaf), side in zip(
            jax.tree.flatten_with_path(params)[0], sides_of(params, transforms, rules), strict=True
        )
    }
    new, (leaves, structure) = [], jax.tree.flatten_with_path(opt_state)
    for path, leaf in leaves:
        split = _of_parameter(tuple(path), np.shape(leaf), by_path)
        factors = factors_of(by_path[tuple(path[split:])][1], transforms, gradient) if split else (None, None)
        if all(factor is None for factor in factors):
            new.append(leaf)
        elif not set(first_moments).isdisjoint(name for entry in path[:split] for name in _names(entry)):
            new.append(fold(jax.tree_util.keystr(path), leaf, factors, "float64"))
        elif second_moments == "error":
            raise ValueError(
                f"{jax.tree_util.keystr(path)} of the optimizer state is no first moment, and a transform applies to "
                "its parameter; use SGD, momentum or Muon there, second_moments='keep' or 'reset', or name its field "
                "in first_moments if it is one"
            )
        else:
            new.append(leaf if second_moments == "keep" else leaf * 0)
    return jax.tree.unflatten(structure, new)


def _of_parameter(path: tuple, shape: tuple[int, ...], by_path: dict) -> int | None:
    """Where the path of a parameter begins within a path of the optimizer state, if it ends in one."""
    for start in range(1, len(path) + 1):
        if path[start:] in by_path and by_path[path[start:]][0] == shape:
            return start
    return None


def _names(entry: Any) -> list[str]:
    """What an entry of a path is called; the keys of a snapshot are whole paths."""
    return str(getattr(entry, "name", getattr(entry, "key", ""))).split("/")
