"""Grid MRFs as plain arrays: E(x) = sum_i theta_i(x_i) + sum_(ij) w_ij V(x_i, x_j), x_i the label of pixel i.

Directions d and d^1 are opposite; even ones point down, or right along a row. `DIRECTIONS[d]` is the step (row, column)
from the sending to the receiving pixel. Weights of direction d are stored at the receiving pixel.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods.kernels.scanline import Pairwise
from jaxlib_methods.kernels.scanline.api import MAX_LABELS
from jaxlib_methods.kernels.scanline.pairwise import base_cost

__all__ = [
    "DIRECTIONS",
    "GridMRF",
    "both_directions",
    "energy",
]

# fmt: off
DIRECTIONS = (
    (0, 1), (0, -1), (1, 0), (-1, 0),
    (1, 1), (-1, -1), (1, -1), (-1, 1),
    (1, 2), (-1, -2), (2, 1), (-2, -1), (2, -1), (-2, 1), (1, -2), (-1, 2),
)
# fmt: on


class GridMRF(NamedTuple):
    """A pairwise MRF on an image grid, or a batch of them with one V.

    Attributes:
      unaries: (B, H, W, L) or (H, W, L) costs theta, float32 or float64; results have or lack the batch axis alike.
      pairwise: V, from `potts`, `truncated_linear`, ..., `table`. For an asymmetric table the first label is that of
        the pixel above, or left in the same row.
      edge_weights: (D, B, H, W) or (D, H, W) for at least the D directions in use, or None for 1. w[d] and w[d^1]
        describe the same edges from both ends: `both_directions` makes them from one.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlib_methods import message_passing as mp
      >>> mrf = mp.GridMRF(jnp.zeros((2, 3, 4)), mp.potentials.potts(1.0))
      >>> float(mp.energy(mrf, jnp.array([[0, 0, 1], [0, 0, 0]])))
      2.0

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """

    unaries: Any
    pairwise: Pairwise
    edge_weights: Any = None


def both_directions(weights: Sequence[jax.Array] | jax.Array) -> jax.Array:
    """Edge weights for all directions from those of the even ones.

    Args:
      weights: D/2 arrays (B, H, W) or (H, W) for directions 0, 2, 4, ..., each stored at the receiving pixel:
        weights[0][i, j] belongs to the edge from (i, j - 1) to (i, j), weights[1][i, j] to the one from (i - 1, j).
        Values without an edge do not matter.

    Returns:
      (D, B, H, W) or (D, H, W), zero where a pixel has no such neighbour.

    Raises:
      ValueError: if there are not 2, 4 or 8 arrays of the same shape.

    Example:
      >>> right, down = jnp.array([[9.0, 1.0, 2.0]]), jnp.zeros((1, 3))
      >>> both_directions([right, down])[:2]
      Array([[[0., 1., 2.]],
      <BLANKLINE>
             [[1., 2., 0.]]], dtype=float32)
    """
    if len(weights) not in (2, 4, 8) or len({w.shape for w in weights}) != 1:
        raise ValueError(f"weights must be 2, 4 or 8 arrays of one shape, got shapes {[w.shape for w in weights]}")
    result = []
    for k, w in enumerate(weights):
        received = jnp.where(has_sender(w.shape, DIRECTIONS[2 * k]), w, jnp.zeros_like(w))
        result += [received, shift_grid(received, DIRECTIONS[2 * k + 1])]
    return jnp.stack(result)


def energy(mrf: GridMRF, labels: jax.Array, *, connectivity: int = 4, dtype: Any = None) -> jax.Array:
    """E(x) on the 4-, 8- or 16-connected grid.

    The paper reports the 4-connected energy whatever the number of message directions; so does this by default.

    Args:
      mrf: the problem.
      labels: (B, H, W) or (H, W) integer labelling.
      connectivity: 4, 8 or 16; with edge weights there must be as many directions.
      dtype: of the sum, by default that of the unaries. Float32 holds whole numbers only up to 2^24: beyond, ask for
        float64 (which needs `jax.enable_x64`).

    Returns:
      (B,) energies, or a scalar without a batch axis.

    Raises:
      ValueError: if shapes or the connectivity do not fit.

    Example:
      >>> from jaxlib_methods import message_passing as mp
      >>> mrf = mp.GridMRF(jnp.zeros((2, 2, 3)), mp.potentials.potts(1.0))
      >>> energy(mrf, jnp.array([[0, 1], [2, 0]]), connectivity=8)
      Array(5., dtype=float32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    check(mrf, connectivity)
    if labels.shape != mrf.unaries.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers of {mrf.unaries.shape[:-1]}, got {labels.shape} of {labels.dtype}")
    dtype = jnp.dtype(mrf.unaries.dtype if dtype is None else dtype)
    return _energy(*mrf, labels.astype(jnp.int32), connectivity, dtype)


def grid_energy(
    unaries: jax.Array, pairwise: Pairwise, weights: jax.Array | None, labels: jax.Array, connectivity: int, dtype: Any
) -> jax.Array:
    """`energy` without its checks, for int32 labels."""
    chosen = jnp.take_along_axis(unaries, labels[..., None], axis=-1)[..., 0].astype(dtype)
    # Row by row, then over the rows: partial sums of like size lose least.
    total = chosen.sum(-1).sum(-1)
    for d in range(0, connectivity, 2):
        sender = shift_grid(labels, DIRECTIONS[d])
        cost = jnp.asarray(pairwise.weight).astype(dtype) * base_cost(pairwise, sender, labels, dtype)
        if weights is not None:
            cost = cost * weights[d].astype(dtype)
        cost = jnp.where(has_sender(labels.shape, DIRECTIONS[d]), cost, jnp.zeros_like(cost))
        total = total + cost.sum(-1).sum(-1)
    return total


_energy = jax.jit(grid_energy, static_argnums=(4, 5))


def check(mrf: GridMRF, num_directions: int) -> None:
    """Refuses what cannot be solved: static facts always, values where they are known (not under `jit`)."""
    unaries, pairwise, weights = mrf
    if unaries.ndim not in (3, 4) or unaries.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"unaries must be (B, H, W, L) or (H, W, L) of float32 or float64, got {unaries.shape} of {unaries.dtype}"
        )
    *_, height, width, num_labels = unaries.shape
    if num_labels > MAX_LABELS:
        raise ValueError(f"at most {MAX_LABELS} labels are supported (indices are uint16), got {num_labels}")
    if num_labels < 2:
        raise ValueError(f"unaries need at least two labels, got shape {unaries.shape}")
    checks.one_of((4, 8, 16), num_directions=num_directions)
    for d in range(num_directions):
        if abs(DIRECTIONS[d][0]) >= height or abs(DIRECTIONS[d][1]) >= width:
            raise ValueError(
                f"direction {d} steps by {DIRECTIONS[d]} (rows, columns), which leaves no edge in a grid of "
                f"{height} rows and {width} columns; use fewer directions or a larger grid"
            )
    if pairwise.kind == "table" and pairwise.table.shape != (num_labels, num_labels):
        raise ValueError(f"the table of V must be {(num_labels, num_labels)}, got {pairwise.table.shape}")
    if weights is not None:
        if weights.ndim != unaries.ndim or weights.shape[0] < num_directions or weights.shape[1:] != unaries.shape[:-1]:
            expected = (num_directions, *unaries.shape[:-1])
            raise ValueError(f"edge_weights must be {expected} for {num_directions} directions, got {weights.shape}")
        if weights.dtype != unaries.dtype:
            raise ValueError(f"edge_weights must be {unaries.dtype} like the unaries, got {weights.dtype}")
    with jax.ensure_compile_time_eval():  # unaries that a traced function closes over are values all the same
        _check_values(mrf)


def _check_values(mrf: GridMRF) -> None:
    unaries, pairwise, weights = mrf
    if not isinstance(unaries, jax.core.Tracer) and bool(_has_nan(unaries)):
        raise ValueError("unaries contain NaN; forbid a label by a large finite cost instead")
    if weights is not None and not isinstance(weights, jax.core.Tracer):
        low = float(_lowest(weights))
        if np.isnan(low):
            raise ValueError("edge_weights contain NaN; 0 removes an edge")
        if low < 0 and (pairwise.semimetric or pairwise.kind == "toeplitz"):
            raise ValueError(
                f"edge_weights must be non-negative for this V, got {low}; "
                "only a `table(..., semimetric=False)` takes negative ones"
            )
    if pairwise.kind == "toeplitz" and not isinstance(pairwise.profile, jax.core.Tracer):
        profile = np.asarray(pairwise.profile)
        if len(profile) < unaries.shape[-1] and not profile[-1] >= profile.max():
            raise ValueError(
                f"the last entry of a truncated profile must be its largest, got {profile}; "
                f"give all {unaries.shape[-1]} distances instead"
            )


@jax.jit
def _has_nan(x: jax.Array) -> jax.Array:
    return jnp.isnan(x.min())  # a minimum hands NaN on, and reads faster than a comparison per entry


@jax.jit
def _lowest(x: jax.Array) -> jax.Array:
    return x.min()


def has_sender(shape: tuple[int, ...], step: tuple[int, int]) -> np.ndarray:
    """(..., H, W): whether the pixel at minus the step lies inside the image."""
    row, column = np.arange(shape[-2]) - step[0], np.arange(shape[-1]) - step[1]
    inside = ((row >= 0) & (row < shape[-2]))[:, None] & ((column >= 0) & (column < shape[-1]))
    return np.broadcast_to(inside, shape)


def shift_grid(x: jax.Array, step: tuple[int, int]) -> jax.Array:
    """y(i) = x(i - step) over the last two axes, zero outside."""
    pads = [(0, 0, 0)] * (x.ndim - 2) + [(s, -s, 0) for s in step]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), pads)
