"""GeoPrecGD: gradient descent on the reduced objective F in the metric of the graph of the reduction mapping Psi.

  R   = DPhi^T DPhi = I + DPsi^T DPsi                 pullback metric
  x1 <- x1 - eta R(x1)^{-1} grad F(x1),  eta = 1 / beta_F

beta_F and mu_F are the extreme eigenvalues of Hess F v = lambda R v; `reduced_curvature` measures them.

R z = b, by `solver`:
  cg          conjugate gradients on R v = v + DPsi^T (DPsi v), from the previous z times the number that minimises
              the error in the norm of R. This start is never worse than zero, and every iterate has b^T z >= 0: the
              step descends however few iterations there are.
  woodbury    R^{-1} = I - DPsi^T (I + DPsi DPsi^T)^{-1} DPsi. Stores DPsi (n2 x n1): for n2 < n1.
  projection  R^{-1} = I - Pi / 2 for an orthogonal projection, DPsi = Pi = Pi^T = Pi^2.
  None        woodbury where n2 < n1 and DPsi costs no more passes through Psi than cg may take (one of reverse mode
              for each of its n2 rows, against two an iteration); cg otherwise.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import common_compute_dtype
from jaxlib_methods.optimizers.reduction import (
    Mapping,
    check_cg,
    check_floating,
    check_output,
    check_same,
    conjugate_gradients,
    inner,
    linearize,
    total,
)
from jaxlib_methods.trees import path_names
from jaxlib_methods.typing import PyTree, ReductionSolver

__all__ = [
    "PullbackMetricState",
    "geoprec_gd",
    "pullback_metric",
    "scale_by_pullback_metric",
]


def pullback_metric(mapping: Mapping, x1: PyTree) -> Callable[[PyTree], PyTree]:
    """The pullback metric R(x1) = I + DPsi^T DPsi as a linear operator; Psi is linearised once.

    Args:
      mapping: the reduction mapping x1 -> x2.
      x1: the point, floating arrays.

    Returns:
      `v -> R v`, for v with the structure of x1: one forward and one reverse pass through the linearised Psi.

    Raises:
      ValueError: if x1 or Psi(x1) hold anything but floating arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> R = pullback_metric(lambda x: {"sum": x["a"].sum() + x["b"]}, {"a": jnp.zeros(2), "b": jnp.zeros(())})
      >>> v = R({"a": jnp.array([1.0, 0.0]), "b": jnp.array(0.0)})
      >>> v["a"].tolist(), float(v["b"])
      ([2.0, 1.0], 1.0)

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428 [markou2025sharper].
    """
    _, jvp, vjp = linearize(mapping, x1)
    return lambda v: jax.tree.map(jnp.add, v, vjp(jvp(v)))


class PullbackMetricState(NamedTuple):
    """State of `scale_by_pullback_metric`.

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428 [markou2025sharper].
    """

    z: PyTree  # like params, float32 or wider: the last R^{-1} grad F, where conjugate gradients start


def scale_by_pullback_metric(
    mapping: Mapping, *, solver: ReductionSolver | None = None, tolerance: float = 1e-6, max_iterations: int = 10
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the gradient of F by R(x1)^{-1} = (I + DPsi^T DPsi)^{-1}: the gradient in the metric of the graph.

    Psi is linearised once a step, at `params`, by reverse mode alone (a Psi with a custom VJP will do); the state holds
    n1 numbers of at least float32. A gradient that is not finite gives such an update, and the next step recovers.

    Args:
      mapping: the reduction mapping x1 -> x2, the same as in F.
      solver: "cg", "woodbury", "projection" (Psi must be one: checked on init), or None to choose between the first
        two by size (module docstring).
      tolerance: relative residual at which conjugate gradients stop.
      max_iterations: of conjugate gradients. As many as R has distinct eigenvalues are enough: two for a projection.

    Returns:
      A transformation whose `update` needs `params`, x1 (any pytree).

    Raises:
      ValueError: an unknown solver; tolerance or max_iterations not positive; on init, x1 or Psi(x1) that are not
        finite (where they are concrete) or not floating, and a "projection" that is none; on update, no params or
        gradients of another structure.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_pullback_metric(lambda x1: 2 * x1)  # R = 1 + 4
      >>> x1 = jnp.array([1.0, -1.0])
      >>> rule.update(jnp.array([5.0, 10.0]), rule.init(x1), x1)[0].tolist()
      [1.0, 2.0]

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428 [markou2025sharper].
    """
    if solver is not None:
        checks.one_of(ReductionSolver, solver=solver)
    check_cg(tolerance, max_iterations)

    def init(params: PyTree) -> PullbackMetricState:
        if jax.tree.leaves(params):
            _check_mapping(mapping, params, solver)
        return PullbackMetricState(jax.tree.map(lambda p: jnp.zeros_like(p, common_compute_dtype(params)), params))

    # A system solved in bfloat16 is not solved: one type for the whole solve, at least float32.
    def update(
        updates: PyTree, state: PullbackMetricState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PullbackMetricState]:
        if params is None:
            raise ValueError("the pullback metric is that of mapping at params: call update(gradients, state, params)")
        check_same(updates, params, "the gradient", "params", "differentiate F with respect to x1, and only that")
        if not jax.tree.leaves(params):
            return updates, state
        x2, jvp, vjp = linearize(mapping, params)
        dtype = common_compute_dtype(params)
        widen = functools.partial(_cast, dtype=dtype)
        b = widen(updates)
        # Tangents have the types of x1, what is summed and solved is wide.
        forward = lambda v: jvp(jax.tree.map(lambda a, p: a.astype(p.dtype), v, params))
        n1, n2 = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, x2))
        chosen = solver or ("woodbury" if n2 < n1 and n2 <= 2 * max_iterations else "cg")
        if chosen == "projection":
            z = jax.tree.map(lambda v, Pv: v - Pv / 2, b, widen(forward(b)))
        elif chosen == "woodbury":
            z = _woodbury(lambda w: widen(vjp(w)), x2, b)
        else:
            R = lambda v: jax.tree.map(jnp.add, v, widen(vjp(forward(v))))
            z = conjugate_gradients(R, b, state.z, tolerance=tolerance, max_iterations=max_iterations)
        usable = jnp.isfinite(inner(z, z))
        kept = jax.tree.map(lambda v: jnp.where(usable, v, 0), z)
        return jax.tree.map(lambda v, g: v.astype(g.dtype), z, updates), PullbackMetricState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def geoprec_gd(
    learning_rate: optax.ScalarOrSchedule,
    mapping: Mapping,
    *,
    solver: ReductionSolver | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 10,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GeoPrecGD, x1 <- x1 - eta R(x1)^{-1} grad F(x1): gradient descent on F in the pullback metric.

    With eta = 1 / beta_F the error falls as exp(-t / kappa_F), kappa_F = beta_F / mu_F (Corollary 3). It is gradient
    descent where Psi is constant, and Gauss-Newton where f = ||x - b||^2 / 2 and eta = 1; for other f it is not
    Newton's method, which would weigh DPhi with Hess f.

    Args:
      learning_rate: eta, a number or a schedule; 1 / beta_F from `reduced_curvature` is the theory's.
      mapping: the reduction mapping x1 -> x2, the same as in F.
      solver: "cg", "woodbury", "projection", or None to choose; see `scale_by_pullback_metric`.
      tolerance: relative residual at which conjugate gradients stop.
      max_iterations: of conjugate gradients.
      weight_decay: decoupled, on x1 alone, times the learning rate; a number or a schedule. The paper has none.
      mask: what is decayed, as in `optax.add_decayed_weights`.

    Returns:
      The optimizer; `update` needs `params`.

    Raises:
      ValueError: see `scale_by_pullback_metric`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxlib_methods.optimizers import reduced_objective
      >>> f, psi = lambda x1, x2: x1**2 + 2 * (x2 - x1) ** 2, lambda x1: x1
      >>> tx, x1 = geoprec_gd(1.0, psi), jnp.array(1.0)  # the first example of the paper: one step is enough
      >>> updates, _ = tx.update(jax.grad(reduced_objective(f, psi))(x1), tx.init(x1), x1)
      >>> float(optax.apply_updates(x1, updates))
      0.0

    Source: Markou, Ajanthan, Gould (NeurIPS 2025), arXiv:2506.08428 [markou2025sharper].
    """
    rule = scale_by_pullback_metric(mapping, solver=solver, tolerance=tolerance, max_iterations=max_iterations)
    return optax.chain(rule, optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate))


def _woodbury(vjp: Callable[[PyTree], PyTree], x2: PyTree, b: PyTree) -> PyTree:
    """b - DPsi^T (I + DPsi DPsi^T)^{-1} DPsi b, the n2 rows of DPsi formed together."""
    leaves, structure = jax.tree.flatten(x2)
    sizes = [leaf.size for leaf in leaves]
    n2 = sum(sizes)
    unit = jnp.split(jnp.eye(n2), np.cumsum(sizes)[:-1], axis=1)
    rows = [e.reshape(n2, *leaf.shape).astype(leaf.dtype) for e, leaf in zip(unit, leaves, strict=True)]
    dot = functools.partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(b)]
    explicit = any(AxisType.Explicit in mesh.axis_types for mesh in meshes)
    gather = functools.partial(dot, out_sharding=PartitionSpec() if explicit else None)
    J = jax.vmap(vjp)(structure.unflatten(rows))  # every leaf (n2, *shape)
    axes = lambda j: tuple(range(1, j.ndim))
    JJt = total(jax.tree.map(lambda j: gather(j, j, axes=(axes(j), axes(j))), J))
    Jb = total(jax.tree.map(lambda j, v: gather(j, v, axes=v.ndim), J, b))
    w = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(jnp.eye(n2, dtype=JJt.dtype) + JJt), Jb)
    return jax.tree.map(lambda j, v: v - dot(w, j, axes=1), J, b)


def _cast(tree: PyTree, dtype: jax.typing.DTypeLike) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _check_mapping(mapping: Mapping, x1: PyTree, solver: ReductionSolver | None) -> None:
    """What can be known of Psi before the first step; values only where they are not traced."""
    check_floating(x1, "x1")
    concrete = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x1))
    x2 = mapping(x1) if concrete else jax.eval_shape(mapping, x1)
    check_output(x2)
    if solver == "projection":
        check_same(
            x2, x1, "mapping(x1)", "x1", "a projection maps a space to itself; use solver='cg' for other mappings"
        )
    if not concrete:
        return
    for name, tree in (("x1", x1), ("mapping(x1)", x2)):
        for path, leaf in zip(jax.tree.leaves(path_names(tree)), jax.tree.leaves(tree), strict=True):
            if not bool(jnp.all(jnp.isfinite(leaf))):
                where = f" at {path!r}" if path else ""
                raise ValueError(f"{name} is not finite{where}; start where mapping is defined and smooth")
    if solver == "projection":
        _check_projection(mapping, x1)


def _check_projection(mapping: Mapping, x1: PyTree) -> None:
    """DPsi v = DPsi^T v = DPsi DPsi v for one random v, which holds for all v almost surely."""
    rng = np.random.default_rng(0)
    x1 = _cast(x1, common_compute_dtype(x1))
    v = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), x1)
    _, jvp, vjp = linearize(mapping, x1)
    Pv = jvp(v)
    tolerance = math.sqrt(float(jnp.finfo(common_compute_dtype(x1)).eps))
    for name, other in (("symmetric", vjp(v)), ("idempotent", jvp(Pv))):
        gap = jax.tree.map(jnp.subtract, other, Pv)
        error = math.sqrt(float(inner(gap, gap)) / float(inner(v, v)))
        if error > tolerance:
            raise ValueError(
                f"solver='projection' needs DPsi to be an orthogonal projection, and it is not {name} (relative error "
                f"{error:.1e}); use solver='cg', which is exact after two iterations where DPsi is one up to a factor"
            )
