"""Trees of different stages in one layout: what all share stays as it is, the rest lies in a flat buffer per dtype.

In one SPMD program every device holds arrays of the same shapes. Here a leaf that every stage has at the same path in
the same shape and dtype (the blocks, counters) stays a leaf; what only some have (the embedding, the head and their
moments) is flattened into one buffer per dtype, as long as the largest stage needs. So the first and the last stage
take max(|embed|, |head|) together and not their sum, and no device holds both.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.typing import PyTree

__all__ = [
    "Packed",
]


class Packed(NamedTuple):
    """The tree of any one stage, in the layout that all stages share."""

    common: tuple[jax.Array, ...]  # the leaves that every stage has
    rest: dict[str, jax.Array]  # per dtype [size]: all other leaves, one after the other, then zeros


class _Leaf(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    key_impl: Any  # of typed PRNG keys, which are packed as their words; else None


class Packing:
    """Packs and unpacks the trees of the kinds of stages; `kind` indexes the trees that it was built from.

    Args:
      trees: one per kind of stage, of arrays or `jax.ShapeDtypeStruct`s.
    """

    def __init__(self, trees: Sequence[PyTree]):
        flat = [jax.tree_util.tree_flatten_with_path(tree) for tree in trees]
        self._structures = [structure for _, structure in flat]
        kinds = [{path: _describe(leaf) for path, leaf in leaves} for leaves, _ in flat]
        shared = lambda path: all(kind.get(path) == kinds[0][path] for kind in kinds)
        self._common = [path for path in kinds[0] if shared(path)]
        self._kinds = kinds
        self._rest = []
        sizes: dict[str, int] = {}
        for kind in kinds:
            by_dtype: dict[str, list[Any]] = {}
            for path, leaf in kind.items():
                if path not in set(self._common):
                    by_dtype.setdefault(jnp.dtype(leaf.dtype).name, []).append(path)
            self._rest.append(by_dtype)
            for name, paths in by_dtype.items():
                sizes[name] = max(sizes.get(name, 0), sum(math.prod(kind[path].shape) for path in paths))
        self._sizes = dict(sorted(sizes.items()))

    @property
    def shapes(self) -> Packed:
        """The packed layout as `jax.ShapeDtypeStruct`s."""
        struct = jax.ShapeDtypeStruct
        common = tuple(struct(self._kinds[0][path].shape, self._kinds[0][path].dtype) for path in self._common)
        return Packed(common, {name: struct((size,), jnp.dtype(name)) for name, size in self._sizes.items()})

    def pack(self, kind: int, tree: PyTree) -> Packed:
        """The tree of a stage of that kind in the common layout."""
        leaves = dict(jax.tree_util.tree_flatten_with_path(tree)[0])
        if jax.tree.structure(tree) != self._structures[kind]:
            raise ValueError(
                f"the tree of a stage must have the structure {self._structures[kind]}, got {jax.tree.structure(tree)}"
            )
        for path, leaf in leaves.items():
            if _describe(leaf)[:2] != self._kinds[kind][path][:2]:
                want = self._kinds[kind][path]
                raise ValueError(
                    f"the leaf {jax.tree_util.keystr(path)} of a stage must be {want.dtype}{list(want.shape)}, got "
                    f"{leaf.dtype}{list(leaf.shape)}"
                )
        rest = {}
        for name, size in self._sizes.items():
            parts = [words(leaves[path]).reshape(-1) for path in self._rest[kind].get(name, [])]
            filled = sum(part.size for part in parts)
            rest[name] = jnp.concatenate([*parts, jnp.zeros(size - filled, jnp.dtype(name))])
        return Packed(tuple(words(leaves[path]) for path in self._common), rest)

    def unpack(self, kind: int, packed: Packed) -> PyTree:
        """The tree of a stage of that kind."""
        leaves = dict(zip(self._common, packed.common, strict=True))
        for name, paths in self._rest[kind].items():
            start = 0
            for path in paths:
                shape = self._kinds[kind][path].shape
                stop = start + math.prod(shape)
                leaves[path] = packed.rest[name][start:stop].reshape(shape)
                start = stop
        for path, leaf in self._kinds[kind].items():
            if leaf.key_impl is not None:
                leaves[path] = jax.random.wrap_key_data(leaves[path], impl=leaf.key_impl)
        return self._structures[kind].unflatten([leaves[path] for path in self._kinds[kind]])


def _describe(leaf: Any) -> _Leaf:
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _Leaf(tuple(leaf.shape), leaf.dtype, None)
    impl = []
    words = jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)) or jax.random.key_data(key), leaf)
    return _Leaf(words.shape, words.dtype, impl[0])


def words(leaf: Any) -> jax.Array:
    """An array, or the words of typed PRNG keys."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(leaf)
