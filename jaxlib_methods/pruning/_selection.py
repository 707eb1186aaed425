r"""From scores to masks: which parameters are candidates, how many are kept, in one cut or in many."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.kernels import threshold
from jaxlib_methods.pruning.masks import apply_masks
from jaxlib_methods.typing import PruningPolicy, PruningSchedule, PruningScope, PyTree

_NORMALISATION = re.compile(r"(^|[/_])(bn|batch_?norm|layer_?norm|group_?norm|rms_?norm|norm)[^/]*/", re.IGNORECASE)


def mark_prunable(params: PyTree, policy: PruningPolicy = "snip") -> PyTree:
    """Which parameters are candidates: the stated answer to what happens with biases and batch norm.

    * "snip" is what the authors' code does: weights and biases have gates, the scale and shift of normalisation
      layers have none. Zero biases have the score 0, so all of them are pruned and stay 0, and they count in the
      denominator of the sparsity. A parameter belongs to a normalisation layer if a sibling is called "scale" or an
      enclosing module's name starts with bn, batch_norm, layer_norm, group_norm, rms_norm or norm.
    * "weights" gates arrays of two and more dimensions alone; biases and normalisation are always trained.

    Args:
      params: any pytree of arrays.
      policy: "snip" or "weights".

    Returns:
      A tree of Python bools for `trees.partition`.

    Raises:
      ValueError: for an unknown policy.

    Example:
      >>> import jax.numpy as jnp
      >>> dense, bn = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}, {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
      >>> mark_prunable({"dense1": dense, "bn1": bn})
      {'bn1': {'bias': False, 'scale': False}, 'dense1': {'bias': True, 'kernel': True}}
      >>> mark_prunable({"dense1": dense, "bn1": bn}, policy="weights")
      {'bn1': {'bias': False, 'scale': False}, 'dense1': {'bias': False, 'kernel': True}}

    Source: Lee, Ajanthan, Torr (ICLR 2019), arXiv:1810.02340, and the authors' code [lee2019snip].
    """
    checks.one_of(PruningPolicy, policy=policy)
    if policy == "weights":
        return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)
    names = trees.path_names(params)
    scaled = {name.rpartition("/")[0] for name in jax.tree.leaves(names) if name.rpartition("/")[2] == "scale"}
    gated = lambda name: name.rpartition("/")[0] not in scaled and not _NORMALISATION.search(name)
    return jax.tree.map(gated, names)


def prune_masks(
    scores: PyTree, sparsity: float, *, scope: PruningScope = "global", specs: PyTree | None = None
) -> PyTree:
    r"""Keeps exactly $\kappa = \mathrm{round}(m\,(1 - s))$ of $m$ scores, the largest; ties go to the lower flat index.

    Args:
      scores: pytree of floating-point arrays, `None` where a parameter is never pruned. Any sharding; nothing is
        sorted, see `jaxlib_methods.kernels.threshold`.
      sparsity: share $s$ to remove, in [0, 1).
      scope: "global" ranks all leaves jointly, "per_layer" keeps the same share of every leaf.
      specs: inside `jax.shard_map` only: the `PartitionSpec`s of the scores, as in its `in_specs`; the masks are then
        this device's part of those of the whole network.

    Returns:
      A tree like `scores` of boolean masks, True where kept.

    Raises:
      ValueError: for a sparsity outside [0, 1), an unknown scope, and (outside a trace) NaN scores.

    Example:
      >>> import jax.numpy as jnp
      >>> prune_masks({"a": jnp.array([3.0, 2.0]), "b": jnp.array([2.0, 1.0])}, sparsity=0.5)
      {'a': Array([ True,  True], dtype=bool), 'b': Array([False, False], dtype=bool)}

    Source: Lee, Ajanthan, Torr (ICLR 2019), arXiv:1810.02340, Algorithm 1 [lee2019snip].
    """
    _check_sparsity(sparsity)
    checks.one_of(PruningScope, scope=scope)
    sizes = threshold.num_scores(scores, specs=specs)
    return threshold.keep_largest(scores, _kept(sizes, 1 - sparsity, scope), specs=specs)


def iterative_prune(
    score_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    sparsity: float,
    *,
    num_steps: int = 100,
    schedule: PruningSchedule = "exponential",
    scope: PruningScope = "global",
) -> PyTree:
    r"""Scores and cuts in turn, in one compiled loop; what is cut once stays cut.

    After cut $t$ of $T$ the share kept is $(1 - s)^{t/T}$ ("exponential") or $1 - s\,t/T$ ("linear").

    Args:
      score_fn: `params -> scores`, called with the parameters masked so far; `None` where a parameter is never pruned.
      params: pytree of arrays.
      sparsity: share removed in the end, in [0, 1).
      num_steps: number of cuts $T$; static.
      schedule: "exponential" or "linear".
      scope: as in `prune_masks`.

    Returns:
      A tree of boolean masks like the scores.

    Raises:
      ValueError: for a sparsity outside [0, 1), fewer than one step, an unknown schedule or scope, and (outside a
        trace) scores that are not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.array([1.0, 4.0, 2.0, 3.0])}
      >>> masks = iterative_prune(lambda p: jax.tree.map(jnp.abs, p), params, sparsity=0.5, num_steps=3)
      >>> masks["w"].tolist()
      [False, True, False, True]

    Source: Tanaka, Kunin, Yamins, Ganguli (NeurIPS 2020), arXiv:2006.05467, Algorithm 1 [tanaka2020pruning].
    """
    _check_sparsity(sparsity)
    checks.at_least(1, num_steps=num_steps)
    checks.one_of(PruningSchedule, schedule=schedule)
    checks.one_of(PruningScope, scope=scope)
    progress = np.arange(1, num_steps + 1) / num_steps
    shares = (1 - sparsity) ** progress if schedule == "exponential" else 1 - sparsity * progress

    @jax.jit
    def run(params: PyTree) -> tuple[PyTree, jax.Array]:
        shapes = jax.eval_shape(score_fn, params)
        sizes = threshold.num_scores(shapes)
        counts = jax.tree.map(lambda *kept: jnp.asarray(kept), *[_kept(sizes, share, scope) for share in shares])

        def cut(t: jax.Array, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
            masks, first_bad = carry
            scores = score_fn(apply_masks(params, masks))
            finite = jnp.stack([jnp.isfinite(s).all() for s in jax.tree.leaves(scores)] or [jnp.array(True)]).all()
            first_bad = jnp.where(finite, first_bad, jnp.minimum(first_bad, t))
            scores = jax.tree.map(lambda s, mask: jnp.where(mask, s, jnp.full_like(s, -jnp.inf)), scores, masks)
            return threshold.keep_largest(scores, jax.tree.map(lambda kept: kept[t], counts)), first_bad

        everything = jax.tree.map(lambda s: jnp.ones(s.shape, bool), shapes)
        return jax.lax.fori_loop(0, num_steps, cut, (everything, jnp.int32(num_steps)))

    masks, first_bad = run(params)
    if not isinstance(first_bad, jax.core.Tracer) and first_bad < num_steps:
        raise ValueError(
            f"score_fn returned a score that is not finite before cut {int(first_bad) + 1} of {num_steps}; "
            "look at the scale of the parameters, or score in float64"
        )
    return masks


def _kept(sizes: PyTree, share: float, scope: PruningScope) -> PyTree:
    """How many to keep: one integer, or a tree of one for each leaf."""
    if scope == "global":
        return round(sum(jax.tree.leaves(sizes)) * float(share))
    return jax.tree.map(lambda size: round(size * float(share)), sizes)


def _check_sparsity(sparsity: float) -> None:
    checks.within("[0, 1)", sparsity=sparsity, remedy="0.98 removes 98 of 100 connections")
