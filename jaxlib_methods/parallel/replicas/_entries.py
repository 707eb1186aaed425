"""Chosen entries of the arrays of a tree, gathered into one vector and written back."""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxlib_methods.typing import PyTree

SMALL = 1 << 16  # entries of an array that is worth an operation of its own


def gather(tree: PyTree, S: list[jax.Array]) -> jax.Array:
    """The chosen entries of all arrays in one vector, float32; zero at empty places."""
    leaves, chosen = jax.tree.leaves(tree), {}
    for group in _groups(leaves):
        flat, index = _flat(leaves, S, group)
        values = flat.at[index].get(mode="fill", fill_value=0).astype(jnp.float32)
        chosen |= dict(zip(group, jnp.split(values, _ends(S[i].size for i in group)), strict=True))
    return jnp.concatenate([chosen[i] for i in range(len(leaves))])


def scatter(tree: PyTree, S: list[jax.Array], values: jax.Array, wanted: jax.Array) -> PyTree:
    """The arrays with the chosen entries replaced, if it is wanted."""
    leaves, structure = jax.tree.flatten(tree)
    parts, written = jnp.split(values, _ends(s.size for s in S)), {}
    for group in _groups(leaves):
        flat, index = _flat(leaves, S, group)
        new = jnp.concatenate([parts[i] for i in group]).astype(flat.dtype)
        flat = flat.at[jnp.where(wanted, index, flat.size)].set(new, mode="drop", unique_indices=False)
        pieces = jnp.split(flat, _ends(leaves[i].size for i in group))
        written |= {i: piece.reshape(leaves[i].shape) for i, piece in zip(group, pieces, strict=True)}
    return structure.unflatten([written[i] for i in range(len(leaves))])


def _groups(leaves: list[jax.Array]) -> list[list[int]]:
    """Large arrays are written in place, each on its own; the small ones of a type are one vector and one operation."""
    small: dict[str, list[int]] = {}
    groups = []
    for i, leaf in enumerate(leaves):
        if leaf.size < SMALL:
            small.setdefault(leaf.dtype.name, []).append(i)
        else:
            groups.append([i])
    return [*small.values(), *groups]


def _flat(leaves: list[jax.Array], S: list[jax.Array], group: list[int]) -> tuple[jax.Array, jax.Array]:
    """The arrays of a group as one, and the chosen entries in it; behind its end where a place is empty."""
    flat = jnp.concatenate([leaves[i].ravel() for i in group])
    starts = [0, *_ends(leaves[i].size for i in group)]
    index = [jnp.where(S[i] < leaves[i].size, S[i] + start, flat.size) for i, start in zip(group, starts, strict=True)]
    return flat, jnp.concatenate(index)


def _ends(sizes: Iterable[int]) -> list[int]:
    """Where one part ends and the next begins."""
    return list(itertools.accumulate(sizes))[:-1]
