r"""AdamW that keeps matrices in a subspace: one second moment for each row, and projections onto the subspace.

Symbols: U (d, k) with U^T U = I, P = U U^T; W (f, d) a matrix whose rows must stay in span(U), G_W its gradient. The
elementwise quotient m / sqrt(v) of Adam leaves span(U) even where m and W lie in it; a second moment that is constant
along each row does not:

    m <- b1 m + (1 - b1) G_W P;   r <- b2 r + (1 - b2) mean_j (G_W P)_j^2   (f, 1)
    W <- (1 - eta lambda) W - eta m^ / (sqrt(r^) + eps)

with bias-corrected m^ and r^. In coordinates, W = Z U^T, the same iteration is AdamW on Z with r the moving average of
||G_Z||^2 / d by row: divided by d, not by k.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core import checks
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.optimizers._matrix_stacks import sharded_like, whole
from jaxlib_methods.optimizers._moments import moments
from jaxlib_methods.typing import PyTree

__all__ = [
    "ScaleByRowSharedAdamState",
    "project_rows",
    "row_shared_adamw",
    "scale_by_row_shared_adam",
]

ArrayLike = jax.typing.ArrayLike


class ScaleByRowSharedAdamState(NamedTuple):
    """State of `scale_by_row_shared_adam`."""

    count: jax.Array  # int32 []: steps done
    m: PyTree  # like the parameters, at least float32: average of the gradients
    r: PyTree  # at least float32, (..., 1) where rows share and like the parameters elsewhere: average of the squares


def scale_by_row_shared_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    shared: PyTree | Callable[[PyTree], PyTree] | None = None,
    row_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's direction with one second moment for each row of the chosen leaves, the mean of the row's squares.

    The update of a row is a multiple of its first moment, so that rows of gradients in a subspace move in it. The
    gradients of weights W must be in the subspace too: put `project_rows` before this rule.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      shared: bools with the structure of the parameters, or a function of them that returns such: the leaves whose
        last axis shares; the others get Adam. None: all leaves with two axes or more.
      row_size: what the sum of a row's squares is divided by. None: its length. With the coordinates Z (f, k) of
        matrices of width d, d makes the iteration that of W.

    Returns:
      An optax transformation with `ScaleByRowSharedAdamState`.

    Raises:
      ValueError: for a decay outside of [0, 1), a negative eps and a row_size below 1.

    Example:
      >>> rule, w = scale_by_row_shared_adam(b1=0.0, b2=0.0, eps=0.0), jnp.zeros((1, 2))
      >>> direction, _ = rule.update(jnp.array([[0.6, 0.8]]), rule.init(w))
      >>> [round(float(u), 6) for u in direction[0]]  # Adam's is (1, 1)
      [0.848528, 1.131371]

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260; the mean as the row's statistic is our reading
      [ramasinghe2025protocol].
    """
    checks.within("[0, 1)", b1=b1, b2=b2)
    checks.not_negative(eps=eps)
    checks.at_least(1, row_size=row_size)

    def flags(params: PyTree) -> PyTree:
        if shared is None:
            return jax.tree.map(lambda p: p.ndim >= 2, params)
        return shared(params) if callable(shared) else shared

    def init(params: PyTree) -> ScaleByRowSharedAdamState:
        m = moments(params)
        r = jax.tree.map(lambda shares, m: jnp.zeros_like(_row_sum(m)) if shares else m, flags(params), m)
        return ScaleByRowSharedAdamState(jnp.zeros((), jnp.int32), m, r)

    def update(
        updates: PyTree, state: ScaleByRowSharedAdamState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleByRowSharedAdamState]:
        del params, extra_args
        count = optax.safe_increment(state.count)

        def squares(g: jax.Array, shares: bool) -> jax.Array:
            return _row_sum(jnp.square(g)) / (row_size or g.shape[-1]) if shares else jnp.square(g)

        def average(decay: ArrayLike, old: jax.Array, new: jax.Array) -> jax.Array:
            decay = jnp.asarray(decay, old.dtype)
            return decay * old + (1 - decay) * new

        m = jax.tree.map(lambda m, g: average(b1, m, g.astype(m.dtype)), state.m, updates)
        r = jax.tree.map(
            lambda shares, r, g: average(b2, r, squares(g.astype(r.dtype), shares)), flags(updates), state.r, updates
        )

        def direction(g: jax.Array, m: jax.Array, r: jax.Array) -> jax.Array:
            corrected = lambda decay, x: x / (1 - jnp.asarray(decay, x.dtype) ** count.astype(x.dtype))
            return (corrected(b1, m) / (jnp.sqrt(corrected(b2, r)) + eps)).astype(g.dtype)

        return jax.tree.map(direction, updates, m, r), ScaleByRowSharedAdamState(count, m, r)

    return optax.GradientTransformationExtraArgs(init, update)


def row_shared_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.01,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    shared: PyTree | Callable[[PyTree], PyTree] | None = None,
    row_size: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with one second moment for each row of the chosen leaves.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: the parameters shrink by learning_rate * weight_decay per step.
      mask: which parameters decay, as in `optax.adamw`.
      shared: see `scale_by_row_shared_adam`.
      row_size: see `scale_by_row_shared_adam`.

    Returns:
      The optimizer.

    Raises:
      ValueError: as `scale_by_row_shared_adam`.

    Example:
      >>> w, optimizer = jnp.array([[0.6, 0.8]]), row_shared_adamw(0.1, weight_decay=0.0)
      >>> updates, _ = optimizer.update(w, optimizer.init(w), w)
      >>> round(float(updates[0, 1] / updates[0, 0]), 4)  # parallel to w
      1.3333

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """
    return optax.chain(
        scale_by_row_shared_adam(b1, b2, eps, shared=shared, row_size=row_size),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def project_rows(
    U: jax.Array, constrained: PyTree | Callable[[PyTree], PyTree], *, project_weights: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Rows of the chosen leaves onto span(U), by P = U U^T.

    Before a rule it projects gradients, G <- G P, so that the rule does not see where in a pipeline a boundary cut
    them. As the last link, with `project_weights`, it makes any optimizer keep the weights in the subspace,
    W <- (W + u) P; the moments then still depend on the place of the boundaries.

    Args:
      U: (d, k), orthonormal columns.
      constrained: bools with the structure of the parameters, or a function of them that returns such: which leaves
        (..., d) to project.
      project_weights: project parameters plus updates, and not the updates.

    Returns:
      An optax transformation without state.

    Raises:
      ValueError: by its update, for `project_weights` without parameters.

    Example:
      >>> link = project_rows(jnp.array([[0.6], [0.8]]), True)
      >>> updates, _ = link.update(jnp.array([[1.0, 1.0]]), link.init(jnp.zeros((1, 2))))
      >>> [round(float(u), 3) for u in updates[0]]
      [0.84, 1.12]

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260, official code of the 8B run [ramasinghe2025protocol].
    """

    def onto(W: jax.Array) -> jax.Array:
        basis = U.astype(W.dtype)
        return sharded_like(matmul(matmul(whole(W), basis), basis.T), W)

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        del extra_args
        flags = constrained(updates) if callable(constrained) else constrained
        if not project_weights:
            return jax.tree.map(lambda chosen, u: onto(u) if chosen else u, flags, updates), state
        if params is None:
            raise ValueError("project_rows(project_weights=True) projects parameters; pass params to update")
        next_update = lambda chosen, u, w: onto(w + u.astype(w.dtype)) - w if chosen else u
        return jax.tree.map(next_update, flags, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _row_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1, keepdims=True)
