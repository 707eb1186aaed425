"""NuMuon: Muon's step with a budget on its nuclear norm, so that it is made of the top singular dyads of the momentum.

Symbols, for a matrix parameter W (fan_in x fan_out) at step t, d = min(fan_in, fan_out):
  M    <- beta M + (1 - beta) G                                                       momentum
  k     = min(d, max(1, ceil(r(t) d)))                                                budget, r a rank schedule
  D     = U_k V_k^T = argmax <M, D> subject to ||D||_2 <= 1, ||D||_* <= k             from M = U diag(sigma) V^T
  W    <- (1 - lr wd) W - lr s D                                                      s from the shape of W
With a fractional budget tau, k < tau < k + 1, D = U_k V_k^T + (tau - k) u_{k+1} v_{k+1}^T. With r = 1 D is the polar
factor, approximated by Newton-Schulz as in Muon. The singular values themselves are never used.

How the rank anneals in one compiled program: shapes are static, so the decomposition is compiled for a few ranks, the
`rank_buckets`, and a `lax.switch` takes the smallest one that holds r(t); the dyads beyond k are then masked. The step
has exactly k dyads and costs what the bucket's rank costs. Compile time and code size grow with the number of buckets.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods.optimizers._matrix_stacks import (
    Stack,
    distributed,
    equal_shapes,
    place,
    resolve,
    sharded_like,
    stacks_of,
    whole,
)
from jaxlib_methods.optimizers.block_krylov import BlockKrylovConfig, svd_of_tall
from jaxlib_methods.optimizers.nuclear_norm import NewtonSchulzConfig, newton_schulz as polar_factor, spend
from jaxlib_methods.optimizers.schedules import ROUND_OFF, check_fraction, dyads
from jaxlib_methods.typing import PyTree, ShapeScaling

__all__ = ["AdamConfig", "NuMuonState", "numuon", "scale_by_numuon"]

RankSchedule = Callable[[jax.Array], jax.Array]

RANK_BUCKETS = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
DECOMPOSITION, NEWTON_SCHULZ = BlockKrylovConfig(), NewtonSchulzConfig()
ADAM_PATHS = (r"embed", r"(^|/)(wte|wpe|lm_head|head|unembed)(/|$)")


class NuMuonState(NamedTuple):
    """State of `scale_by_numuon`."""

    count: jax.Array  # int32 (): steps taken; the rank schedule is evaluated at it
    mu: PyTree  # momentum, like the parameters, in momentum_dtype
    bases: PyTree  # warm starts: one float32 or float64 (matrices, n, columns) for each shape (m, n); None without


def scale_by_numuon(
    rank_schedule: float | int | RankSchedule,
    *,
    key: jax.Array,
    momentum: jax.typing.ArrayLike = 0.95,
    momentum_dtype: jax.typing.DTypeLike | None = None,
    nesterov: bool = False,
    fractional: bool = False,
    newton_schulz: NewtonSchulzConfig = NEWTON_SCHULZ,
    decomposition: BlockKrylovConfig = DECOMPOSITION,
    weight_dimension_numbers: PyTree | Callable[[PyTree], PyTree] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis_name: str = "data",
) -> optax.GradientTransformationExtraArgs:
    """NuMuon's direction: the top singular dyads of the momentum, all with weight 1.

    Matrices of equal shape, up to transposition, are decomposed together. The only randomness is the block that the
    Krylov iteration starts from; it follows from `key` and the step, so that all replicas of data-parallel training
    take the same step. Memory: the momentum, and for the warm start of each matrix d times the largest rank with an
    inexact decomposition (below d / iterations).

    Args:
      rank_schedule: r, the share of the d = min(fan_in, fan_out) dyads in a step: a number in (0, 1], or a function of
        the step such as `cosine_rank_schedule`. r = 1 is Muon: Newton-Schulz, without a decomposition.
      key: typed key of the start blocks.
      momentum: beta, the decay of the moving average M.
      momentum_dtype: type of M; None: that of the parameters.
      nesterov: decompose (1 - beta) G + beta M instead of M. NuMuon does not, Muon does.
      fractional: take the budget tau = max(1, r d) as it is, instead of rounding it up to k.
      newton_schulz: for r = 1, see `NewtonSchulzConfig`. Static.
      decomposition: for r < 1, see `BlockKrylovConfig`. Static.
      weight_dimension_numbers: as in `optax.contrib.muon`: which axes of a parameter are inputs and outputs, a
        `MuonDimensionNumbers` for all, a tree of them or a function of the parameters; the other axes are a batch.
        None: every parameter is a matrix (inputs, outputs).
      mesh: distribute the matrices over this mesh's `axis_name` and gather the steps; None: every device computes all.
      axis_name: of that mesh.

    Returns:
      An optax transformation with `NuMuonState`. Its updates point along the momentum: scale them by a negative rate.

    Raises:
      ValueError: a fraction outside (0, 1], buckets that do not increase, an axis that the mesh does not have; on init,
        a parameter that is not a matrix.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> rule = scale_by_numuon(0.5, key=jax.random.key(0))
      >>> W = jnp.diag(jnp.array([10.0, 5.0, 2.0, 1.0]))
      >>> updates, state = rule.update(W, rule.init(W), W)
      >>> (jnp.diagonal(updates).round(3) + 0.0).tolist()
      [1.0, 1.0, 0.0, 0.0]

    Source: Dolatabadi et al. (2026), arXiv:2603.03597 [dolatabadi2026numuon]; Jordan et al. (2024) [jordan2024muon].
    """
    schedule, buckets = _ranks(rank_schedule, decomposition.rank_buckets)
    if mesh is not None and axis_name not in mesh.shape:
        raise ValueError(f"axis_name must be one of the mesh's axes {tuple(mesh.shape)}, got {axis_name!r}")
    shares = 1 if mesh is None else int(mesh.shape[axis_name])

    def padded(batch: int) -> int:
        return -(-batch // shares) * shares

    def basis_width(n: int) -> int:
        """Columns of the warm start: the largest rank that needs one."""
        ranks = [int(dyads(bucket, n)) for bucket in buckets]
        return max((K for K in ranks if not decomposition.is_exact(n, K)), default=0) if decomposition.warm_start else 0

    def init(params: PyTree) -> NuMuonState:
        mu = optax.tree.zeros_like(params, dtype=momentum_dtype)
        leaves = jax.tree.leaves(mu)
        if not leaves:  # optax.tree_utils.tree_map_params asks which parts of a state are like params
            return NuMuonState(jnp.zeros([], jnp.int32), mu, jnp.zeros([]))
        stacks = stacks_of(params, weight_dimension_numbers)
        bases: list[jax.Array | None] = []
        for i, ((_, n, dtype), members) in enumerate(equal_shapes(leaves, stacks).items()):
            batch = padded(sum(stacks[j].batch for j in members))
            noise = jax.random.normal(jax.random.fold_in(key, i), (batch, n, basis_width(n)), dtype)
            bases.append(place(noise, mesh, axis_name) if noise.size else None)
        return NuMuonState(jnp.zeros([], jnp.int32), mu, tuple(bases))

    def full_rank(X: jax.Array, basis: jax.Array | None, noise: None, r: jax.Array) -> tuple[jax.Array, Any]:
        del noise, r
        return polar_factor(X, newton_schulz), basis

    def low_rank(
        K: int, X: jax.Array, basis: jax.Array | None, noise: jax.Array | None, r: jax.Array
    ) -> tuple[jax.Array, Any]:
        B = noise
        if noise is not None and basis is not None:
            B = jnp.concatenate([basis[..., :K], noise], axis=-1)
        U, _, V = svd_of_tall(X, K, B, decomposition)
        n = X.shape[-1]
        budget = jnp.maximum(r * n, 1) if fractional else dyads(r, n)
        D = spend(budget.astype(X.dtype), U, V)
        if basis is not None:
            kept = min(K, basis.shape[-1])
            basis = jnp.concatenate([V[..., :kept], basis[..., kept:]], axis=-1)
        return D, basis

    def step_of(bucket: float | None) -> Callable:
        """The steps of all groups, with the ranks of one bucket (None: full rank)."""

        def steps(Xs: list[jax.Array], bases: tuple, r: jax.Array, key: jax.Array) -> tuple[list[jax.Array], tuple]:
            results = []
            for i, (X, basis) in enumerate(zip(Xs, bases, strict=True)):
                n = X.shape[-1]
                noise, one_group = None, full_rank
                if bucket is not None:
                    K = dyads(bucket, n)
                    one_group = functools.partial(low_rank, K)
                    if not decomposition.is_exact(n, K):
                        columns = decomposition.width(n, K) - (0 if basis is None else K)
                        noise = jax.random.normal(jax.random.fold_in(key, i), (X.shape[0], n, columns), X.dtype)
                results.append(distributed(one_group, mesh, axis_name)(X, basis, noise, r))
            return [D for D, _ in results], tuple(basis for _, basis in results)

        return steps

    branches = [step_of(bucket) for bucket in buckets]
    if not buckets or buckets[-1] == 1:
        branches.append(step_of(None))

    def update(
        updates: PyTree, state: NuMuonState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, NuMuonState]:
        del params, extra_args
        grads, structure = jax.tree.flatten(updates)
        if not grads:
            return updates, state._replace(count=optax.safe_increment(state.count))
        stacks = stacks_of(updates, weight_dimension_numbers)
        moments = [_ema(g, m, momentum) for g, m in zip(grads, jax.tree.leaves(state.mu), strict=True)]
        looked_ahead = [_ema(g, m, momentum) if nesterov else m for g, m in zip(grads, moments, strict=True)]
        groups = equal_shapes(jax.tree.leaves(state.mu), stacks)
        Xs = []
        for (_, _, dtype), members in groups.items():
            X = jnp.concatenate([stacks[j].pack(whole(looked_ahead[j])).astype(dtype) for j in members])
            missing = padded(X.shape[0]) - X.shape[0]
            Xs.append(jnp.concatenate([X, *[X[:1]] * missing]) if missing else X)

        r = jnp.asarray(schedule(state.count), jnp.float32)
        bucket = jnp.searchsorted(jnp.asarray(buckets, jnp.float32), r - ROUND_OFF)
        bucket = jnp.where(r >= 1, len(branches) - 1, jnp.minimum(bucket, len(branches) - 1))
        step_key = jax.random.fold_in(key, state.count)
        Ds, bases = jax.lax.switch(bucket, branches, Xs, state.bases, r, step_key)

        directions: list[Any] = [None] * len(grads)
        for D, members in zip(Ds, groups.values(), strict=True):
            offset = 0
            for j in members:
                mine = D[offset : offset + stacks[j].batch]
                offset += stacks[j].batch
                directions[j] = sharded_like(stacks[j].unpack(mine), looked_ahead[j]).astype(grads[j].dtype)
        mu = structure.unflatten(
            [m.astype(old.dtype) for m, old in zip(moments, jax.tree.leaves(state.mu), strict=True)]
        )
        return structure.unflatten(directions), NuMuonState(optax.safe_increment(state.count), mu, bases)

    return optax.GradientTransformationExtraArgs(init, update)


def _ranks(
    rank_schedule: float | int | RankSchedule, rank_buckets: Sequence[float] | None
) -> tuple[RankSchedule, tuple[float, ...]]:
    """The schedule, and the ranks below full rank to compile."""
    if callable(rank_schedule):
        buckets = RANK_BUCKETS if rank_buckets is None else tuple(rank_buckets)
        buckets = tuple(check_fraction(f"rank_buckets[{i}]", bucket) for i, bucket in enumerate(buckets))
        if not buckets or any(b <= a for a, b in itertools.pairwise(buckets)):
            raise ValueError(f"rank_buckets must be increasing fractions, at least one, got {buckets}")
        return rank_schedule, buckets
    r = check_fraction("rank_schedule", rank_schedule)
    if rank_buckets is not None:
        raise ValueError(f"rank_buckets are for schedules; a constant rank, {r}, is its own bucket")
    return lambda count: jnp.full_like(count, r, dtype=jnp.float32), () if r == 1 else (r,)


def _ema(new: jax.Array, old: jax.Array, momentum: jax.typing.ArrayLike) -> jax.Array:
    dtype = compute_dtype(old.dtype)
    beta = jnp.asarray(momentum, dtype)
    return beta * old.astype(dtype) + (1 - beta) * new.astype(dtype)


def _scale_by_shape(
    shape_scaling: ShapeScaling | float, dimension_numbers: PyTree | Callable | None
) -> optax.GradientTransformation:
    def scale(stack: Stack) -> float:
        ratio = stack.fan_out / stack.fan_in
        if shape_scaling == "width":
            return math.sqrt(max(1.0, ratio))
        if shape_scaling == "spectral":
            return math.sqrt(ratio)
        return (0.2 if shape_scaling == "rms" else shape_scaling) * math.sqrt(max(stack.fan_in, stack.fan_out))

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        scales = map(scale, stacks_of(updates, dimension_numbers))
        return structure.unflatten([s * leaf for s, leaf in zip(scales, leaves, strict=True)]), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@dataclasses.dataclass(frozen=True)
class AdamConfig:
    """Which parameters AdamW takes beside NuMuon, and how.

    Args:
      b1, b2, eps, eps_root, weight_decay: as in `optax.adamw`.
      learning_rate: None: that of the matrices.
      paths: regular expressions (`re.search`) on the paths of parameters that AdamW takes whatever their shape. Of the
        default, an expression may match nothing; of your own, each must match a parameter.

    Example:
      >>> AdamConfig(b2=0.95).b1
      0.9
    """

    b1: jax.typing.ArrayLike = 0.9
    b2: jax.typing.ArrayLike = 0.999
    eps: jax.typing.ArrayLike = 1e-8
    eps_root: jax.typing.ArrayLike = 0.0
    weight_decay: jax.typing.ArrayLike = 0.0
    learning_rate: optax.ScalarOrSchedule | None = None
    paths: Sequence[str] = ADAM_PATHS


ADAM = AdamConfig()


def numuon(
    learning_rate: optax.ScalarOrSchedule,
    rank_schedule: float | int | RankSchedule,
    *,
    key: jax.Array,
    momentum: jax.typing.ArrayLike = 0.95,
    momentum_dtype: jax.typing.DTypeLike | None = None,
    nesterov: bool = False,
    fractional: bool = False,
    weight_decay: jax.typing.ArrayLike = 0.1,
    weight_decay_mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    shape_scaling: ShapeScaling | float = "width",
    adam: AdamConfig = ADAM,
    newton_schulz: NewtonSchulzConfig = NEWTON_SCHULZ,
    decomposition: BlockKrylovConfig = DECOMPOSITION,
    weight_dimension_numbers: PyTree | Callable[[PyTree], PyTree] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    axis_name: str = "data",
) -> optax.GradientTransformationExtraArgs:
    """NuMuon for the hidden matrices of a network, and AdamW for its embeddings, its head, its vectors and scalars.

    W <- (1 - lr wd) W - lr s D for the matrices. The defaults are NuMuon's: weight decay 0.1, no Nesterov (neither in
    AdamW), embeddings and head left out.

    Args:
      learning_rate: a number or a schedule.
      rank_schedule: share r of the dyads in a step, as the arguments not listed here, as in `scale_by_numuon`. r = 1 is
        Muon.
      key: typed key of the start blocks.
      momentum: beta, the decay of the moving average of the gradients.
      momentum_dtype: type of both optimizers' momentum.
      nesterov: as in `scale_by_numuon`.
      fractional: as in `scale_by_numuon`.
      weight_decay: of the matrices, multiplied by the learning rate.
      weight_decay_mask: as in `optax.add_decayed_weights`.
      shape_scaling: s: "width" sqrt(max(1, fan_out / fan_in)), "spectral" sqrt(fan_out / fan_in), or "rms"
        0.2 sqrt(max(fan_in, fan_out)), which gives a full-rank update AdamW's usual root mean square; a number takes
        the place of this 0.2, as `consistent_rms` does in optax.
      adam: see `AdamConfig`.
      newton_schulz: as in `scale_by_numuon`.
      decomposition: as in `scale_by_numuon`.
      weight_dimension_numbers: as in `scale_by_numuon`; parameters with None go to AdamW. By default those go there
        that do not have two axes.
      mesh: as in `scale_by_numuon`.
      axis_name: as in `scale_by_numuon`.

    Returns:
      The optimizer; `update` needs the parameters, as AdamW does.

    Raises:
      ValueError: what `scale_by_numuon` refuses, an unknown scaling; on init, an expression of `adam.paths` that
        matches no parameter.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlib_methods.optimizers.schedules import cosine_rank_schedule
      >>> params = {"embed": jnp.ones((8, 4)), "mlp": jnp.eye(4), "bias": jnp.zeros(4)}
      >>> tx = numuon(0.1, cosine_rank_schedule(100, 1.0, 0.25), key=jax.random.key(0), weight_decay=0.0)
      >>> with jax.numpy_dtype_promotion("standard"):  # optax's AdamW needs it
      ...     updates, state = tx.update(params, tx.init(params), params)
      >>> [round(float(u), 3) for u in jnp.diagonal(updates["mlp"])]  # Newton-Schulz gives 0.765 of the identity
      [-0.077, -0.077, -0.077, -0.077]
      >>> [round(float(u), 3) for u in updates["embed"][0]]
      [-0.1, -0.1, -0.1, -0.1]

    Source: Dolatabadi et al. (2026), arXiv:2603.03597 [dolatabadi2026numuon]; scalings: Jordan et al. (2024)
    [jordan2024muon], Liu et al. (2025), arXiv:2502.16982 [liu2025muon].
    """
    if isinstance(shape_scaling, str):
        checks.one_of(ShapeScaling, shape_scaling=shape_scaling)

    def labels(params: PyTree) -> PyTree:
        may_miss = adam.paths is ADAM_PATHS or not jax.tree.leaves(params)
        by_path = trees.mask_tree(params, *adam.paths, allow_unmatched=may_miss)
        if weight_dimension_numbers is None:
            is_matrix = jax.tree.map(lambda leaf: leaf.ndim == 2, params)
        else:
            is_matrix = jax.tree.map(lambda box: box.spec is not None, resolve(weight_dimension_numbers, params))
        return jax.tree.map(lambda adam, matrix: "numuon" if matrix and not adam else "adam", by_path, is_matrix)

    rule = scale_by_numuon(
        rank_schedule,
        key=key,
        momentum=momentum,
        momentum_dtype=momentum_dtype,
        nesterov=nesterov,
        fractional=fractional,
        newton_schulz=newton_schulz,
        decomposition=decomposition,
        weight_dimension_numbers=weight_dimension_numbers,
        mesh=mesh,
        axis_name=axis_name,
    )
    adamw = optax.adamw(
        learning_rate if adam.learning_rate is None else adam.learning_rate,
        b1=adam.b1,
        b2=adam.b2,
        eps=adam.eps,
        eps_root=adam.eps_root,
        weight_decay=adam.weight_decay,
        mu_dtype=momentum_dtype,
    )
    matrices = optax.chain(
        rule,
        _scale_by_shape(shape_scaling, weight_dimension_numbers),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition({"numuon": matrices, "adam": adamw}, labels)
