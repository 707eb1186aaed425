"""Pairwise costs V(mu, lam) as a pytree: static structure, array values.

Two `Pairwise` of the same `kind`, `truncation`, radius and `semimetric` share one compiled program whatever their
arrays hold.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.typing import PairwiseKind


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("weight", "profile", "table"),
    meta_fields=("kind", "truncation", "semimetric"),
)
@dataclasses.dataclass(frozen=True)
class Pairwise:
    """V(mu, lam) = weight * base(mu, lam), mu the label of the sending pixel and lam that of the receiving one.

    | kind | base(mu, lam) |
    | --- | --- |
    | `"potts"` | 1 where mu != lam |
    | `"truncated_linear"` | min(abs(mu - lam), truncation) |
    | `"toeplitz"` | profile[min(abs(mu - lam), R)], R = len(profile) - 1, the largest entry last unless R >= L - 1 |
    | `"table"` | table[mu, lam] |

    Attributes:
      kind: as in the table; static.
      weight: scalar array; non-negative for `"potts"` and `"truncated_linear"`.
      profile: (R + 1,) array for `"toeplitz"`, else None. R is static through the shape.
      table: (L, L) array for `"table"`, else None.
      truncation: the T of `"truncated_linear"`, a positive int, else 0; static.
      semimetric: promise that V >= 0 with a zero diagonal and edge weights >= 0. Then the minimum of an outgoing
        message is that of the incoming costs and a sweep that starts from zeros sends a zero first message; static.

    Example:
      >>> potts = Pairwise("potts", jnp.float32(2.0), semimetric=True)
      >>> dense(potts, 3)
      Array([[0., 2., 2.],
             [2., 0., 2.],
             [2., 2., 0.]], dtype=float32)
    """

    kind: PairwiseKind
    weight: Any
    profile: Any = None
    table: Any = None
    truncation: int = 0
    semimetric: bool = False

    def __post_init__(self) -> None:
        checks.one_of(PairwiseKind, kind=self.kind)
        if self.kind == "truncated_linear" and self.truncation < 1:
            raise ValueError(
                f"truncation must be a positive int, got {self.truncation}; a fractional one is a 'toeplitz' profile"
            )


def base_cost(pairwise: Pairwise, mu: jax.Array, lam: jax.Array, dtype: Any) -> jax.Array:
    """base(mu, lam) for int32 label arrays of the same shape, without `weight`, in `dtype`.

    Example:
      >>> base_cost(Pairwise("truncated_linear", 1.0, truncation=2), jnp.array([0, 5]), jnp.array([1, 1]), jnp.float32)
      Array([1., 2.], dtype=float32)
    """
    if pairwise.kind == "table":
        return jnp.asarray(pairwise.table).astype(dtype)[mu, lam]
    distance = jnp.abs(mu - lam)
    if pairwise.kind == "potts":
        return (distance > 0).astype(dtype)
    if pairwise.kind == "truncated_linear":
        return jnp.minimum(distance, pairwise.truncation).astype(dtype)
    profile = jnp.asarray(pairwise.profile).astype(dtype)
    return profile[jnp.minimum(distance, profile.shape[0] - 1)]


def dense(pairwise: Pairwise, num_labels: int, dtype: Any = None) -> jax.Array:
    """The (L, L) table of V, rows the sending label. `dtype` defaults to that of `weight`.

    Example:
      >>> dense(Pairwise("truncated_linear", jnp.float32(3.0), truncation=1), 2)
      Array([[0., 3.],
             [3., 0.]], dtype=float32)
    """
    weight = jnp.asarray(pairwise.weight)
    dtype = weight.dtype if dtype is None else dtype
    label = jnp.arange(num_labels, dtype=jnp.int32)
    mu, lam = jnp.meshgrid(label, label, indexing="ij")
    return weight.astype(dtype) * base_cost(pairwise, mu, lam, dtype)


def transpose(pairwise: Pairwise) -> Pairwise:
    """The pairwise cost seen from the other end of the edge: V(lam, mu). Only a table can be asymmetric.

    Example:
      >>> transpose(Pairwise("table", 1.0, table=jnp.array([[0.0, 1.0], [2.0, 0.0]]))).table
      Array([[0., 2.],
             [1., 0.]], dtype=float32)
    """
    return dataclasses.replace(pairwise, table=pairwise.table.T) if pairwise.kind == "table" else pairwise
