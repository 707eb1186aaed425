"""Names, labels, masks and partitions of any pytree, chosen by regular expressions on parameter paths.

One vocabulary for every container: plain dicts, linen variables, `nnx.State` and nnx modules, equinox modules, tuples,
lists, NamedTuples, a bare array (its path is ""), and `None` leaves, which stay `None`. A path joins the keys from the
root with "/", as in "conv1/kernel". The boxes that flax puts around an array (`nnx.Variable`, linen's partitioning
metadata) are not part of the path, so one rule serves the linen and the nnx version of a model.
"""

import collections
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from jaxlib_methods.typing import PyTree

__all__ = [
    "combine",
    "find_states",
    "label_tree",
    "mask_tree",
    "match_counts",
    "partition",
    "path_names",
]

_SHOWN = 5  # paths printed in an error


def path_names(tree: PyTree) -> PyTree:
    """Returns a tree of the same structure whose leaves are their own paths, "a/b/c".

    Args:
      tree: any pytree; `None` leaves stay `None`, a bare array has the path "".

    Returns:
      A tree with the structure of `tree` and a string at every leaf.

    Example:
      >>> path_names({"conv1": {"kernel": 1.0, "bias": None}, "heads": (2.0, 3.0)})
      {'conv1': {'bias': None, 'kernel': 'conv1/kernel'}, 'heads': ('heads/0', 'heads/1')}
    """
    return jax.tree.unflatten(jax.tree.structure(tree), _paths(tree))


def label_tree(
    tree: PyTree,
    rules: Sequence[tuple[str, Hashable]],
    *,
    default: Hashable | None = None,
    allow_unmatched: bool = False,
) -> PyTree:
    r"""Labels every leaf by the first rule whose regular expression is found in its path.

    A rule (regex, label) matches a leaf when `re.search(regex, path)` succeeds: anywhere in the path, so that "kernel"
    matches "conv1/kernel" and "kernel_norm/scale"; anchor with ^ and $ to be stricter. Rules are tried in order and the
    first match wins. `optax.partition` takes the result as `param_labels`, or better `lambda params: label_tree(params,
    rules)`: optax calls labels that are callable, which trees of nnx and equinox modules may be.

    Args:
      tree: any pytree.
      rules: (regex, label) pairs, in order of precedence.
      default: label of the leaves that no rule matches; with `None` every leaf must be matched by a rule.
      allow_unmatched: whether a rule may label no leaf at all; by default that is an error, because it is
        almost always a typing mistake.

    Returns:
      A tree with the structure of `tree` and a label at every leaf.

    Raises:
      ValueError: for a rule that labels nothing, and for a leaf without a label.

    Example:
      >>> params = {"conv": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0}}
      >>> label_tree(params, [("^head/", "fast"), ("kernel$", "slow")], default="frozen")
      {'conv': {'bias': 'frozen', 'kernel': 'slow'}, 'head': {'kernel': 'fast'}}
    """
    paths, winners = _winners(tree, [regex for regex, _ in rules])
    if not allow_unmatched:
        _check_every_rule_used([regex for regex, _ in rules], paths, winners)
    homeless = [path for path, winner in zip(paths, winners, strict=True) if winner is None]
    if default is None and homeless:
        raise ValueError(
            f"no rule matches {_shown(homeless)}; add a rule such as ('.*', label) at the end, or pass default="
        )
    labels = [default if winner is None else rules[winner][1] for winner in winners]
    return jax.tree.unflatten(jax.tree.structure(tree), labels)


def mask_tree(tree: PyTree, *patterns: str, allow_unmatched: bool = False) -> PyTree:
    """Returns a tree of Python bools: True where any of the regular expressions is found in the leaf's path.

    Args:
      tree: any pytree.
      *patterns: regular expressions with the semantics of `re.search`.
      allow_unmatched: whether a pattern may match no leaf; by default that is an error.

    Returns:
      A tree with the structure of `tree` and a bool at every leaf, as `optax.masked` takes it.

    Raises:
      ValueError: for a pattern that matches nothing.

    Example:
      >>> mask_tree({"conv": {"kernel": 1.0, "bias": 2.0}, "bn": {"scale": 3.0}}, "kernel$", "^bn/")
      {'bn': {'scale': True}, 'conv': {'bias': False, 'kernel': True}}
    """
    paths = _paths(tree)
    compiled = [_compile(pattern) for pattern in patterns]
    for regex in compiled:
        if not allow_unmatched and not any(map(regex.search, paths)):
            raise ValueError(
                f"pattern {regex.pattern!r} matches no leaf of {_shown(paths)}; pass allow_unmatched=True if it may"
            )
    mask = [any(regex.search(path) for regex in compiled) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(tree), mask)


def match_counts(tree: PyTree, rules: Sequence[tuple[str, Hashable]]) -> dict[str, int]:
    """Counts how many leaves each rule of `label_tree` labels, to see what a list of rules really does.

    Args:
      tree: any pytree.
      rules: (regex, label) pairs, in order of precedence.

    Returns:
      The number of leaves by regular expression, in the order of the rules; under "" the leaves that no rule matches.

    Example:
      >>> match_counts({"conv": {"kernel": 1.0, "bias": 2.0}}, [("kernel", "slow"), ("conv", "fast"), ("bn", "fast")])
      {'kernel': 1, 'conv': 1, 'bn': 0, '': 0}
    """
    _, winners = _winners(tree, [regex for regex, _ in rules])
    counts = collections.Counter(winners)
    by_rule = dict.fromkeys([regex for regex, _ in rules], 0)
    for index, (regex, _) in enumerate(rules):
        by_rule[regex] += counts[index]
    return by_rule | {"": counts[None]}


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree in two of the same structure, with `None` where the other one holds the leaf.

    Args:
      tree: any pytree.
      mask: a tree of bools with the structure of `tree` or of its upper part (a prefix), such as `mask_tree` makes.

    Returns:
      (the leaves where the mask is True, the leaves where it is False).

    Raises:
      ValueError: if a leaf of the mask is not a single bool.

    Example:
      >>> params = {"kernel": 1.0, "bias": 2.0}
      >>> partition(params, {"kernel": True, "bias": False})
      ({'bias': None, 'kernel': 1.0}, {'bias': 2.0, 'kernel': None})
    """
    for path, leaf in zip(_paths(mask), jax.tree.leaves(mask), strict=True):
        if not isinstance(leaf, bool):
            raise ValueError(f"mask must hold Python bools, got {leaf!r} at {path!r}; build it with mask_tree")
    keep = lambda chosen: lambda m, subtree: subtree if m is chosen else jax.tree.map(lambda _: None, subtree)
    return jax.tree.map(keep(True), mask, tree), jax.tree.map(keep(False), mask, tree)


def combine(*trees: PyTree) -> PyTree:
    """Puts trees with `None` holes together again: at every leaf the one value that is not `None`.

    Args:
      *trees: trees of the same structure, such as `partition` returns; a leaf that is `None` in all of them stays so.

    Returns:
      One tree of that structure.

    Raises:
      ValueError: if two trees hold a value at the same leaf, or no tree is given.

    Example:
      >>> combine({"kernel": 1.0, "bias": None}, {"kernel": None, "bias": 2.0})
      {'bias': 2.0, 'kernel': 1.0}
    """
    if not trees:
        raise ValueError("combine needs at least one tree")

    def only_value(*leaves: Any) -> Any:
        held = [leaf for leaf in leaves if leaf is not None]
        if len(held) > 1:
            raise ValueError(f"combine found {len(held)} values for one leaf: {held[0]!r} and {held[1]!r}")
        return held[0] if held else None

    return jax.tree.map(only_value, *trees, is_leaf=lambda node: node is None)


def find_states(opt_state: PyTree, cls: type) -> list[Any]:
    """Finds the states of one kind inside a deep optimizer state, for reading counters and masks.

    Args:
      opt_state: the state of any optax transformation, however nested.
      cls: the class looked for, for example `optax.ScaleByAdamState`.

    Returns:
      The outermost instances of `cls`, in the order of the transformations; empty if there are none.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> opt_state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(jnp.zeros(3))
      >>> [int(state.count) for state in find_states(opt_state, optax.ScaleByAdamState)]
      [0]
    """
    is_wanted = lambda node: isinstance(node, cls)
    return [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_wanted) if is_wanted(leaf)]


def _paths(tree: PyTree) -> list[str]:
    """The path of every leaf, in the order of `jax.tree.leaves`."""
    paths = []
    for prefix, node in jax.tree.leaves_with_path(tree, is_leaf=_is_flax_box):
        skipped = 1 if _is_flax_box(node) else 0
        for suffix, _ in jax.tree.leaves_with_path(node):
            paths.append(jax.tree_util.keystr((*prefix, *suffix[skipped:]), simple=True, separator="/"))
    return paths


def _is_flax_box(node: Any) -> bool:
    """Whether flax wraps an array in `node`; asked by name, because this module works without flax."""
    return any(
        base.__name__ in ("Variable", "AxisMetadata") and base.__module__.startswith("flax.")
        for base in type(node).__mro__
    )


def _compile(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def _winners(tree: PyTree, patterns: Sequence[str]) -> tuple[list[str], list[int | None]]:
    """The path of every leaf, and the index of the first pattern found in it (None where there is none)."""
    searches: list[Callable] = [_compile(pattern).search for pattern in patterns]
    paths = _paths(tree)
    return paths, [next((i for i, search in enumerate(searches) if search(path)), None) for path in paths]


def _check_every_rule_used(patterns: Sequence[str], paths: list[str], winners: list[int | None]) -> None:
    for index in sorted(set(range(len(patterns))) - set(winners)):
        matching = [path for path in paths if re.search(patterns[index], path)]
        reason = (
            f"matches only leaves that earlier rules take, {_shown(matching)}"
            if matching
            else f"matches no leaf of {_shown(paths)}"
        )
        raise ValueError(f"rule {index}, {patterns[index]!r}, {reason}; pass allow_unmatched=True if it may")


def _shown(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(map(repr, paths[:_SHOWN])) + more if paths else "an empty tree"
