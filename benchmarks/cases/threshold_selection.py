"""Masks of the kappa largest scores of a network, against masks by sorting, top-k and NumPy's partition.

All implementations give the same masks (`error` 0): the largest scores of all layers jointly, ties to the lower flat
index. The peers need one flat vector and are given the time to concatenate the layers, as a pruner on them would have
to; `keep_largest` counts the layers where they lie. The model of the necessary traffic is one read of the float32
scores and one write of the masks. The aim is `ratios["jax argsort"]` >= 5 at 1e8 scores. The case with ties cuts among
equal scores, so that the second search, over indices, runs. jaxpruner is not on the package index: put a checkout of
google-research/jaxpruner and its `ml_collections` on PYTHONPATH.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Case, Implementation, Options, Record, Skip, measure, peer
from jaxlib_methods.kernels import ArgSpec
from jaxlib_methods.kernels.threshold import ARG_SPECS, keep_largest

HEADLINES = (
    (
        "lenet_300_100 m=266610 sparsity=0.95",
        "keep_largest",
        ("jax argsort", "jax top_k", "numpy partition", "jaxpruner"),
    ),
    ("vgg_d m=15245130 sparsity=0.95", "keep_largest", ("jax argsort", "jax top_k", "numpy partition")),
    ("vgg_d m=15245130 sparsity=0.95 ties", "keep_largest", ("jax argsort", "jax top_k", "numpy partition")),
    ("resnet50 m=25503912 sparsity=0.9", "keep_largest", ("jax argsort", "jax top_k", "numpy partition")),
    ("one_array_1e8 m=100000000 sparsity=0.95", "keep_largest", ("jax argsort", "jax top_k", "numpy partition"), 5),
)
Tree = dict[str, jax.Array]


def run(options: Options) -> Iterator[Record]:
    """Yields one case per workload, and VGG-D's once more with ties; --quick leaves out what is large."""
    for spec in ARG_SPECS:
        size, sparsity = _size(spec), _sparsity(spec)
        if options.quick and size > 10**7:
            continue
        for ties in (False, True) if spec.name == "vgg_d" else (False,):
            name = f"{spec.name} m={size} sparsity={sparsity:g}" + (" ties" if ties else "")
            if options.selects(name):
                yield from measure(_case(spec, name, ties), options)


def _case(spec: ArgSpec, name: str, ties: bool) -> Case:
    scores = _scores(spec, ties)
    host = {key: np.asarray(leaf) for key, leaf in scores.items()}
    size, kappa = _size(spec), spec.args["num_keep"]
    bind = lambda function: jax.jit(functools.partial(function, kappa=kappa))
    return Case(
        benchmark="threshold_selection",
        name=name,
        implementations={
            "keep_largest": Implementation(jax.jit(keep_largest), (scores, jnp.int32(kappa))),
            "jax argsort": Implementation(bind(_by_argsort), (scores,)),
            "jax top_k": Implementation(bind(_by_top_k), (scores,)),
            "numpy partition": Implementation(functools.partial(_by_partition, kappa=kappa), (host,)),
            "jaxpruner": Skip("the same full argsort, and minutes a call")
            if size > 10**7
            else peer(
                "jaxpruner.mask_calculator",
                lambda module: Implementation(_jaxpruner(module, _sparsity(spec)), (scores,)),
            ),
        },
        reference="jax argsort",
        bytes=5 * size,
        min_rounds=3 if size > 10**7 else 7,
        warm_up=1,
    )


def _size(spec: ArgSpec) -> int:
    return sum(leaf.size for leaf in spec.args["scores"].values())


def _sparsity(spec: ArgSpec) -> float:
    return round(1 - spec.args["num_keep"] / _size(spec), 4)


def _scores(spec: ArgSpec, ties: bool) -> Tree:
    """Products of two normal variables, as |w * dL/dw| looks; biases are 0. With ties, only a hundred values."""
    scores = {}
    for index, (name, like) in enumerate(sorted(spec.args["scores"].items())):
        rng = np.random.default_rng(index)
        if name.endswith("bias"):
            leaf = np.zeros(like.shape, np.float32)
        elif ties:
            leaf = rng.integers(0, 100, like.shape).astype(np.float32)
        else:
            leaf = np.abs(rng.standard_normal(like.shape, np.float32) * rng.standard_normal(like.shape, np.float32))
        scores[name] = jnp.asarray(leaf)
    return scores


def _flat(scores: Tree) -> Any:
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(scores)])


def _like(scores: Tree, mask: Any) -> Tree:
    leaves, structure = jax.tree.flatten(scores)
    ends = np.cumsum([leaf.size for leaf in leaves])
    return structure.unflatten(
        [mask[end - leaf.size : end].reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    )


def _by_argsort(scores: Tree, kappa: int) -> Tree:
    flat = _flat(scores)
    kept = jnp.argsort(-flat, stable=True)[:kappa]
    return _like(scores, jnp.zeros(flat.size, bool).at[kept].set(True))


def _by_top_k(scores: Tree, kappa: int) -> Tree:
    flat = _flat(scores)
    return _like(scores, jnp.zeros(flat.size, bool).at[jax.lax.top_k(flat, kappa)[1]].set(True))


def _by_partition(scores: dict[str, np.ndarray], kappa: int) -> Tree:
    flat = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(scores)])
    threshold = np.partition(flat, flat.size - kappa)[flat.size - kappa]
    mask = flat > threshold
    mask[np.flatnonzero(flat == threshold)[: kappa - np.count_nonzero(mask)]] = True
    return _like(scores, mask)


def _jaxpruner(mask_calculator: Any, sparsity: float) -> Any:
    """Its top-k on the concatenated scores; it rounds the number to keep in float32, which may show as an `error`."""
    return jax.jit(lambda scores: _like(scores, mask_calculator.topk_mask_calculator(_flat(scores), sparsity)))
