r"""Approximate dynamical isometry: how far masked weights are from orthogonal, and their repair without data.

Symbols as in the paper: layer $l$ has the matrix $C_l \in \mathbb{R}^{n \times k}$ (fan-in x outputs) and the mask
$M_l$.
"""

import collections
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.pruning.masks import apply_masks
from jaxlib_methods.typing import IsometryObjective, PyTree

__all__ = [
    "IsometryResult",
    "isometry_loss",
    "repair_isometry",
]


class IsometryResult(NamedTuple):
    """What `repair_isometry` returns.

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """

    params: PyTree  # like the parameters given; pruned entries are exactly 0
    losses: jax.Array  # float [num_steps + 1]: F before each step and after the last


def isometry_loss(params: PyTree, masks: PyTree | None = None) -> jax.Array:
    r"""The distance from isometry, $F = \sum_l \|(M_l \odot C_l)^\top (M_l \odot C_l) - I\|_F$.

    The norms are not squared. $F$ cannot fall below $\sqrt{k - n}$ for a layer with more outputs than inputs, nor below
    the root of the number of columns that have lost all entries. Its gradient
    $2 M \odot C(C^\top C - I)/\|C^\top C - I\|_F$ is taken as 0 at an exact isometry.

    Args:
      params: pytree of arrays; those with at least two axes count, as matrices of shape (fan-in, outputs).
      masks: as for `apply_masks`; None: nothing is pruned.

    Returns:
      F, a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
      >>> masks = {"kernel": jnp.eye(3).astype(bool).at[1, 1].set(False), "bias": None}
      >>> float(isometry_loss(params)), float(isometry_loss(params, masks))
      (0.0, 1.0)

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """
    masked = params if masks is None else apply_masks(params, masks)
    norms = [_residual(_as_matrix(leaf))[1] for leaf in jax.tree.leaves(masked) if leaf.ndim >= 2]
    return jnp.asarray(sum(norms, start=0.0))


def repair_isometry(
    params: PyTree,
    masks: PyTree,
    *,
    num_steps: int = 10_000,
    learning_rate: float | int | Callable[[jax.Array], jax.Array] = 0.1,
    objective: IsometryObjective = "frobenius",
) -> IsometryResult:
    r"""Moves the surviving weights towards isometry, by gradient descent on `isometry_loss`, without data.

    Layers do not share variables, so all descend at once: those of equal shape are stacked and the whole descent is
    one compiled loop. A step costs $4 n k \min(n, k)$ operations per layer.

    With the default, the paper's, the gradient has a norm of about 2 however close a solution is, so that a constant
    learning rate ends in an oscillation about it. `objective="squared"` descends on $\frac14\|\cdot\|_F^2$ instead,
    whose gradient vanishes at the solution and which converges; a schedule for `learning_rate` is the other remedy.

    Args:
      params: pytree of floating-point arrays; those with at least two axes are repaired, in float32 at least.
      masks: as for `apply_masks`.
      num_steps: static.
      learning_rate: a number, or a schedule of the step.
      objective: "frobenius" (the paper's, not squared) or "squared".

    Returns:
      `IsometryResult`: the parameters, pruned entries 0, and F by step, in the paper's form for either objective.

    Raises:
      ValueError: for an unknown objective, a negative number of steps, or masks that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> W = jax.random.normal(jax.random.key(0), (20, 5)) / 4
      >>> masks = jax.random.bernoulli(jax.random.key(1), 0.5, W.shape)
      >>> _, losses = repair_isometry(W, masks, num_steps=200, objective="squared")
      >>> bool(losses[-1] < 1e-3 * losses[0])
      True

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307; the squared objective is this
    library's [lee2020signal].
    """
    checks.one_of(IsometryObjective, objective=objective)
    checks.not_negative(num_steps=num_steps)
    masked = apply_masks(params, masks)
    everything = partial(jax.tree.map, lambda leaf: jnp.ones(leaf.shape, bool))
    keep = jax.tree.map(
        lambda mask, subtree: everything(subtree) if mask is None else mask, masks, masked, is_leaf=lambda m: m is None
    )
    leaves, structure = jax.tree.flatten(masked)
    keep = structure.flatten_up_to(keep)
    buckets = collections.defaultdict(list)  # (n, k) -> the positions of its layers
    for i, leaf in enumerate(leaves):
        if leaf.ndim >= 2:
            buckets[_as_matrix(leaf).shape].append(i)
    stack = lambda members, of: jnp.stack([_as_matrix(of[i]) for i in members])
    schedule = learning_rate if callable(learning_rate) else None
    repaired, losses = _descend(
        [stack(members, leaves) for members in buckets.values()],
        [stack(members, keep) for members in buckets.values()],
        0.0 if schedule else learning_rate,
        schedule=schedule,
        num_steps=num_steps,
        squared=objective == "squared",
    )
    for members, matrices in zip(buckets.values(), repaired, strict=True):
        for i, matrix in zip(members, matrices, strict=True):
            leaves[i] = matrix.reshape(leaves[i].shape).astype(leaves[i].dtype)
    return IsometryResult(jax.tree.unflatten(structure, leaves), losses)


@partial(jax.jit, static_argnames=("schedule", "num_steps", "squared"))
def _descend(
    stacks: list[jax.Array],
    masks: list[jax.Array],
    learning_rate: jax.typing.ArrayLike,
    *,
    schedule: Callable[[jax.Array], jax.Array] | None,
    num_steps: int,
    squared: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """Descends from matrices [layers, n, k], one array for each shape."""
    masks = [mask.astype(C.dtype) for mask, C in zip(masks, stacks, strict=True)]
    total = lambda norms: jnp.asarray(sum((jnp.sum(norm) for norm in norms), start=0.0))

    def step(stacks: list[jax.Array], t: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        rate = learning_rate if schedule is None else schedule(t)
        moved, norms = [], []
        for C, M in zip(stacks, masks, strict=True):
            gradient, norm = jax.vmap(partial(_gradient, squared=squared))(C)
            moved.append(C - jnp.asarray(rate, C.dtype) * M * gradient)
            norms.append(norm)
        return moved, total(norms)

    stacks, losses = jax.lax.scan(step, stacks, jnp.arange(num_steps, dtype=jnp.int32))
    last = total([jax.vmap(_residual)(C)[1] for C in stacks])
    return stacks, jnp.append(losses, last)


def _gradient(C: jax.Array, *, squared: bool) -> tuple[jax.Array, jax.Array]:
    """The gradient by C of ||C^T C - I||_F (0 where that is 0) or of its square / 4, and the norm."""
    R, norm = _residual(C)
    slope = matmul(R, C) if C.shape[0] < C.shape[1] else matmul(C, R)
    if squared:
        return slope, norm
    return slope * jnp.where(norm > 0, 2 / jnp.where(norm > 0, norm, 1), 0), norm


def _residual(C: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""R and $\|C^\top C - I\|_F$: R is $C^\top C - I$, or $C C^\top - I$ for a wide matrix, where it is smaller.

    The identities $C(C^\top C - I) = (C C^\top - I)C$ and $\|C^\top C - I\|^2 = \|C C^\top - I\|^2 + k - n$ make the
    two the same descent.
    """
    n, k = C.shape
    R = matmul(C, C.T) if n < k else matmul(C.T, C)
    R = R - jnp.eye(min(n, k), dtype=C.dtype)
    square = jnp.sum(R * R) + max(k - n, 0)
    positive = square > 0
    return R, jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _as_matrix(W: jax.Array) -> jax.Array:
    """(fan-in, outputs), in float32 at least; masks stay boolean."""
    W = W.reshape(-1, W.shape[-1])
    return W if W.dtype == bool else W.astype(jnp.promote_types(W.dtype, jnp.float32))
