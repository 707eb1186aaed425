"""Exact selection by counting, in plain `jax.numpy`: a few fused reads of the scores instead of a sort.

Floats are mapped to integers that order alike (`ordered_bits`), and the cut is searched among those: one pass counts
the keys at or above WAYS - 1 candidates in a single variadic reduction, and keeps the interval that the cut lies in.
p passes shrink an interval of width W to W / WAYS^p, so float32 needs at most 11 of them after the one that finds
minimum and maximum, usually fewer: the search ends as soon as a candidate cuts off exactly kappa scores. Only where
equal scores straddle the cut does the same search run again, over the flat indices of those ties.

All that is formed from the scores are sums over whole leaves. They partition under any sharding without moving a score,
and inside `shard_map` they need one psum of WAYS - 1 integers per pass. The masks are the only arrays of the scores'
size that are written.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# A pass over 1e8 float32 on two x86 cores: 2 to 7 candidates cost the same 12-15 ms, because memory is the limit; 11
# cost 23 ms, 15 cost 33 ms. One costs 117 ms: XLA's CPU backend vectorises the variadic reduction, not the plain one.
WAYS = 8


class Interval(NamedTuple):
    """Keys between which the cut lies, for each group of leaves that is cut on its own."""

    low: jax.Array  # [groups] key; at least `target` keys are >= low
    high: jax.Array  # [groups] key; fewer than `target` keys are > high, or none where target is 0
    at_least: jax.Array  # [groups] count of the keys >= low
    above: jax.Array  # [groups] count of the keys > high


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Where the leaves lie: their groups and, inside `shard_map`, the parts of them that this device holds."""

    groups: tuple[int, ...]  # the group of every leaf
    num_groups: int
    axes: tuple[tuple[tuple[str, ...], ...], ...]  # mesh axes of every dimension of every leaf; all () outside
    local: tuple[tuple[int, ...], ...]  # shapes on this device

    def reduce(self, rows: Sequence[jax.Array], combine: Any, collective: Any, start: Any) -> jax.Array:
        """Combines rows [k], one per leaf, within every group and over the devices that share a leaf: [groups, k]."""
        by_axes: dict[tuple[str, ...], list[list[jax.Array]]] = {}
        for row, group, axes in zip(rows, self.groups, self.axes, strict=True):
            names = tuple(sorted({name for per_dimension in axes for name in per_dimension}))
            by_axes.setdefault(names, [[] for _ in range(self.num_groups)])[group].append(row)
        neutral = jnp.full(rows[0].shape, start, rows[0].dtype)  # not full_like, which would vary over mesh axes
        totals = []
        for names, members in by_axes.items():
            total = jnp.stack([_fold(combine, [neutral, *group]) for group in members])
            totals.append(collective(total, names) if names else total)
        return _fold(combine, totals)

    def sum(self, rows: Sequence[jax.Array]) -> jax.Array:
        return self.reduce(rows, jnp.add, lax.psum, 0)

    def shape(self, leaf: int) -> tuple[int, ...]:
        """The whole leaf's shape."""
        counts = [math.prod(map(lax.axis_size, names)) for names in self.axes[leaf]]
        return tuple(size * count for size, count in zip(self.local[leaf], counts, strict=True))

    def sizes(self) -> list[int]:
        """Number of entries of every whole leaf."""
        return [math.prod(self.shape(leaf)) for leaf in range(len(self.local))]

    def flat_index(self, leaf: int, one: jax.Array) -> jax.Array:
        """Row-major index in the whole leaf of every entry on this device, as multiples of `one` (the integer 1)."""
        shape, local, dtype = self.shape(leaf), self.local[leaf], one.dtype
        index = jnp.zeros(local, dtype)
        for d, names in enumerate(self.axes[leaf]):
            here = lax.broadcasted_iota(dtype, local, d)
            if names:
                here = here + lax.axis_index(names).astype(dtype) * jnp.asarray(local[d], dtype)
            index = index + here * (one * math.prod(shape[d + 1 :]))
        return index


def ordered_bits(x: jax.Array) -> jax.Array:
    """Signed integers of the floats' width that compare as the floats do: -0 = +0, and NaNs beyond the infinities.

    Args:
      x: float16, bfloat16, float32 or float64.

    Returns:
      int16, int32 or int64 of the same shape. A positive NaN lies above +inf, a negative one below -inf.

    Example:
      >>> [hex(key) for key in ordered_bits(jnp.array([-1.0, -0.0, 0.0, 1e-45, 1.0])).tolist()]
      ['-0x3f800000', '0x0', '0x0', '0x1', '0x3f800000']
    """
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"int{jnp.finfo(x.dtype).bits}"))
    return jnp.where(bits < 0, jnp.iinfo(bits.dtype).min - bits, bits)  # sign and magnitude -> two's complement


def count_at_least(keys: jax.Array, candidates: jax.Array, dtype: Any) -> jax.Array:
    """Counts the keys >= each of k candidates in one read.

    Args:
      keys: integers of any shape.
      candidates: [k] of the same dtype.
      dtype: of the counts.

    Returns:
      [k] counts.

    Example:
      >>> count_at_least(jnp.array([[1, 2], [3, 4]]), jnp.array([2, 4]), jnp.int32)
      Array([3, 1], dtype=int32)
    """
    k = candidates.shape[0]
    reached = tuple((keys >= candidates[i]).astype(dtype) for i in range(k))
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
    return jnp.stack(lax.reduce(reached, (jnp.zeros((), dtype),) * k, add, tuple(range(keys.ndim))))


def search(
    key_of: Callable[[int, Any], jax.Array],
    operands: Sequence[Any],
    leaves: Leaves,
    start: Interval,
    targets: jax.Array,
) -> Interval:
    """Shrinks the interval of every group until `low` cuts off exactly `target` keys, or is the only key left in it.

    Args:
      key_of: (number of the leaf, its operands) -> its keys, signed integers; recomputed in every pass.
      operands: for every leaf, all that its keys are made from.
      leaves: their groups and shards.
      start: an interval with the invariants of `Interval`.
      targets: [groups] counts.

    Returns:
      The last interval: at_least == target, or low == high with above < target < at_least (ties).
    """

    def unsettled(interval: Interval) -> jax.Array:
        return jnp.any((interval.low < interval.high) & (interval.at_least != targets))

    def narrow(interval: Interval) -> Interval:
        low, high, at_least, above = (field[:, None] for field in interval)
        candidates = _candidates(low, high)
        rows = []
        for leaf, group in enumerate(leaves.groups):
            operand, wanted = _unhoisted(operands[leaf], candidates[group])
            rows.append(count_at_least(key_of(leaf, operand), wanted, targets.dtype))
        counts = leaves.sum(rows)
        enough = counts >= targets[:, None]  # True up to some candidate, False after it
        return Interval(
            low=jnp.where(enough, candidates, low).max(axis=1),
            high=jnp.where(enough, high, candidates - 1).min(axis=1),
            at_least=jnp.where(enough, counts, at_least).min(axis=1),
            above=jnp.where(enough, above, counts).max(axis=1),
        )

    return lax.while_loop(unsettled, narrow, start)


def keep_largest(scores: Sequence[jax.Array], kappas: jax.Array, leaves: Leaves) -> tuple[list[jax.Array], jax.Array]:
    """Masks of the kappas[g] largest scores of each group g of leaves, the lower flat index first among equals.

    Args:
      scores: floats of one dtype, at least one leaf.
      kappas: [groups] counts of a signed dtype that holds the number of all scores + 1.
      leaves: groups and shards of the scores.

    Returns:
      (one boolean mask per leaf, whether any score is NaN).
    """
    dtype = kappas.dtype
    sizes = leaves.sizes()
    starts = [sum(sizes[:leaf]) for leaf in range(len(scores))]
    total = sum(sizes)
    in_group = [sum(s for s, g in zip(sizes, leaves.groups, strict=True) if g == n) for n in range(leaves.num_groups)]
    everything = jnp.asarray(in_group, dtype)
    none = jnp.zeros_like(everything)
    kappas = jnp.clip(kappas, 0, everything)

    low, high = _extremes([ordered_bits(score) for score in scores], leaves)
    infinity = ordered_bits(jnp.asarray(jnp.inf, scores[0].dtype))
    has_nan = jnp.any((high > infinity) | (low < -infinity))
    cut = search(lambda _, score: ordered_bits(score), scores, leaves, Interval(low, high, everything, none), kappas)

    def rank(leaf: int, operand: tuple[jax.Array, jax.Array]) -> jax.Array:
        """total - flat index for the ties at the cut, 0 elsewhere: the second key, which no two ties share."""
        score, one = operand
        behind = (total - starts[leaf]) * one - leaves.flat_index(leaf, one)
        return jnp.where(ordered_bits(score) == cut.low[leaves.groups[leaf]], behind, jnp.zeros((), dtype))

    def last_rank() -> jax.Array:
        beyond = jnp.full_like(everything, total + 1)  # a group without split starts settled: an interval of one key
        start = Interval(jnp.where(split, none, beyond), beyond, jnp.where(split, everything, none), none)
        operands = [(score, jnp.ones((), dtype)) for score in scores]
        return search(rank, operands, leaves, start, jnp.where(split, kappas - cut.above, none)).low

    split = cut.at_least != kappas
    last = jnp.where(split, lax.cond(jnp.any(split), last_rank, lambda: none), none)

    masks = []
    for leaf, group in enumerate(leaves.groups):
        operand, lowest = _unhoisted((scores[leaf], jnp.ones((), dtype)), (cut.low[group], last[group]))
        key = ordered_bits(operand[0])
        masks.append((key > lowest[0]) | ((key == lowest[0]) & (rank(leaf, operand) >= lowest[1])))
    return masks, has_nan


def _unhoisted(operand: Any, variable: Any) -> Any:
    """Makes `operand` depend on `variable`, so that what follows is computed after it, and in a loop in every round.

    XLA would otherwise compute keys and indices once and write them to memory for all their uses, which takes more time
    than the search and twice the memory of the scores. One call per leaf, since inside `shard_map` the results vary
    over all mesh axes that any argument varies over.
    """
    return lax.optimization_barrier((operand, variable))


def _candidates(low: jax.Array, high: jax.Array) -> jax.Array:
    """[groups, WAYS - 1] ascending keys that divide the intervals [groups, 1] evenly, none beyond `high`."""
    unsigned = jnp.dtype(f"uint{jnp.iinfo(low.dtype).bits}")  # the width of an interval overflows the signed type
    first = lax.bitcast_convert_type(low, unsigned)
    width = lax.bitcast_convert_type(high, unsigned) - first
    steps = jnp.arange(1, WAYS, dtype=unsigned)[None, :]
    return lax.bitcast_convert_type(first + jnp.minimum(steps * (width // WAYS + 1), width), low.dtype)


def _extremes(keys: Sequence[jax.Array], leaves: Leaves) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest key of every group, in one read."""
    limits = jnp.iinfo(keys[0].dtype)
    start = (jnp.asarray(limits.max, limits.dtype), jnp.asarray(limits.min, limits.dtype))
    both = lambda a, b: (lax.min(a[0], b[0]), lax.max(a[1], b[1]))
    found = [lax.reduce((key, key), start, both, tuple(range(key.ndim))) for key in keys]
    low = leaves.reduce([smallest[None] for smallest, _ in found], jnp.minimum, lax.pmin, limits.max)
    high = leaves.reduce([largest[None] for _, largest in found], jnp.maximum, lax.pmax, limits.min)
    return low[:, 0], high[:, 0]


def _fold(combine: Any, values: Sequence[jax.Array]) -> jax.Array:
    result = values[0]
    for value in values[1:]:
        result = combine(result, value)
    return result
