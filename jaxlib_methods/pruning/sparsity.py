"""How much of a network is left: counts by leaf, of masks or of parameters."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods import trees
from jaxlib_methods.typing import PyTree

__all__ = [
    "Sparsity",
    "format_sparsity",
    "summarize_sparsity",
]


class Sparsity(NamedTuple):
    """One row of `summarize_sparsity`."""

    path: str  # of the leaf; "total" in the last row
    shape: tuple[int, ...]  # () in the last row
    kept: int
    total: int

    @property
    def sparsity(self) -> float:
        """Share of entries removed, in [0, 1]."""
        return 1.0 - self.kept / self.total if self.total else 0.0


def summarize_sparsity(tree: PyTree) -> list[Sparsity]:
    """Counts what is kept in every leaf and in all of them.

    Args:
      tree: masks (True is kept) or parameters (what is not 0 is kept); `None` leaves are left out.

    Returns:
      One row per leaf in the order of `jax.tree.leaves`, and a last row with the path "total". Print them with
      `format_sparsity`.

    Example:
      >>> import jax.numpy as jnp
      >>> for row in summarize_sparsity({"bias": jnp.zeros(2), "kernel": jnp.eye(2)}):
      ...     print(row.path, row.kept, row.total, row.sparsity)
      bias 0 2 1.0
      kernel 2 4 0.5
      total 2 6 0.6666666666666667

    """
    leaves = jax.tree.leaves(tree)
    kept = jax.device_get([jnp.count_nonzero(leaf) for leaf in leaves])
    names = jax.tree.leaves(trees.path_names(tree))
    rows = [
        Sparsity(name, tuple(leaf.shape), int(count), math.prod(leaf.shape))
        for name, leaf, count in zip(names, leaves, kept, strict=True)
    ]
    return [*rows, Sparsity("total", (), sum(row.kept for row in rows), sum(row.total for row in rows))]


def format_sparsity(rows: list[Sparsity]) -> str:
    """A plain-text table of `summarize_sparsity`.

    Args:
      rows: what `summarize_sparsity` returned.

    Returns:
      Lines with the columns path, shape, kept, total and sparsity.

    Example:
      >>> import jax.numpy as jnp
      >>> print(format_sparsity(summarize_sparsity({"w": jnp.eye(2)})))
      path   shape  kept  total  sparsity
      w      2x2       2      4     50.0%
      total            2      4     50.0%

    """
    cells = [("path", "shape", "kept", "total", "sparsity")]
    for row in rows:
        shape = "x".join(map(str, row.shape))
        cells.append((row.path, shape, f"{row.kept:,}", f"{row.total:,}", f"{100 * row.sparsity:.1f}%"))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    align = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    lines = ("  ".join(a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)
