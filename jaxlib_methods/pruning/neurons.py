r"""RANP: which neurons of a network are kept, and how a choice is made consistent with the network's wiring.

Scores and masks are dictionaries, name of the layer -> [width]; `pruning.neuron_scores` makes the former. All of it is
host arithmetic on a few thousand numbers in float64.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxlib_methods._core import checks
from jaxlib_methods.pruning.wiring import Wiring
from jaxlib_methods.typing import ChannelTies, PruningScope

__all__ = [
    "clean_up_neurons",
    "empty_layers",
    "keep_neurons",
    "max_sparsity",
]

Scores = Mapping[str, Any]  # name of the layer -> [width]


def keep_neurons(scores: Scores, sparsity: float | int, *, scope: PruningScope = "global") -> dict[str, np.ndarray]:
    r"""Keeps the neurons whose score reaches the $n$-th largest, $n = \lfloor N (1 - \kappa) \rfloor$ of $N$.

    Ties keep more than $n$. The last layer takes part as well; that it is kept whole is the clean-up's work.

    Args:
      scores: name of the layer -> [width].
      sparsity: share $\kappa$ of neurons to remove, in [0, 1].
      scope: "global", or "per_layer": the best $\lceil n_l (1 - \kappa) \rceil$ of the $n_l$ neurons of each layer.

    Returns:
      Name of the layer -> bool [width], True where kept. Pass it to `clean_up_neurons`.

    Raises:
      ValueError: for a sparsity outside [0, 1], an unknown scope, or scores that are not finite.

    Example:
      >>> kept = keep_neurons({"a": [84.7, 254.1], "b": [45.3, 135.9]}, 0.5)
      >>> {name: mask.tolist() for name, mask in kept.items()}
      {'a': [False, True], 'b': [False, True]}

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    checks.within("[0, 1]", sparsity=sparsity, remedy="0.78 removes 78 of 100 neurons")
    checks.one_of(PruningScope, scope=scope)
    wide = {name: np.asarray(s, np.float64) for name, s in scores.items()}
    for name, s in wide.items():
        if not np.isfinite(s).all():
            raise ValueError(f"layer {name!r} has scores that are not finite")
    everything = np.sort(np.concatenate(list(wide.values())))[::-1]
    if scope == "global":
        n = int(len(everything) * (1 - sparsity))
        threshold = everything[n - 1] if n else np.inf
        return {name: s >= threshold for name, s in wide.items()}
    # A product such as 10 x (1 - 0.9) is 0.99..., and one must not lose or gain a neuron by it.
    count = lambda s: math.ceil(round(len(s) * (1 - sparsity), 9))
    rank = lambda s: np.argsort(np.argsort(-s, kind="stable"), kind="stable")
    return {name: rank(s) < count(s) for name, s in wide.items()}


def max_sparsity(feasible: Callable[[float], bool], *, tolerance: float = 1e-4) -> float:
    r"""The largest feasible sparsity, by bisection on [0, 1].

    Args:
      feasible: whether a sparsity leaves no layer empty, such as
        `lambda s: not empty_layers(clean_up_neurons(keep_neurons(scores, s), wiring, scores))`; it must hold at 0, and
        at every level below one at which it holds.
      tolerance: width of the last interval, above 0.

    Returns:
      A feasible sparsity within `tolerance` of an infeasible one.

    Raises:
      ValueError: if 0 is not feasible, or for a tolerance that is not positive.

    Example:
      >>> round(max_sparsity(lambda sparsity: sparsity <= 0.78), 3)
      0.78

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    checks.positive(tolerance=tolerance)
    if not feasible(0.0):
        raise ValueError("sparsity 0 is not feasible: a layer is empty before anything is removed")
    low, high = 0.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
    return low


def clean_up_neurons(
    kept: Mapping[str, np.ndarray], wiring: Wiring, scores: Scores, *, ties: ChannelTies = "max", multiple: int = 1
) -> dict[str, np.ndarray]:
    r"""Makes masks of neurons consistent with the wiring of the network; a second call changes nothing.

    * Neurons of the network's output (the last layer) are kept.
    * Where layers are tied (added, multiplied), the paper gives them the largest of their widths. Here it is also said
      which channels these are: those with the largest score among the tied neurons, so that weights can be copied.
    * Grouped and depthwise convolutions follow the layer they read, group by group.
    * The inputs of a layer that are fed by removed neurons go with them: a channel has one fate.

    Args:
      kept: name of the layer -> bool [width], as from `keep_neurons`.
      wiring: of the network.
      scores: name of the layer -> [width]; decide between tied channels.
      ties: width of tied layers: "max" or "min" of what they keep, or "union" of the kept channels.
      multiple: round widths up to a multiple of this (8 for tensor cores, 128 for TPU lanes), as far as neurons last.

    Returns:
      Name of the layer -> bool [width]. A layer may be empty: see `empty_layers`.

    Raises:
      ValueError: for an unknown option, or masks and scores of other layers than the wiring's.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from jaxlib_methods.pruning import trace_wiring
      >>> net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
      >>> wiring = trace_wiring(net, jax.ShapeDtypeStruct((1, 3), float))
      >>> scores = {"layers/0": [4.0, 1.0, 3.0, 2.0], "layers/2": [0.0, 0.0]}
      >>> kept = clean_up_neurons(keep_neurons(scores, 0.5), wiring, scores)
      >>> {name: mask.tolist() for name, mask in kept.items()}
      {'layers/0': [True, False, True, True], 'layers/2': [True, True]}

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp], and the authors' code.
    """
    checks.one_of(ChannelTies, ties=ties)
    checks.at_least(1, multiple=multiple)
    for what, given in (("kept", kept), ("scores", scores)):
        widths = {name: len(values) for name, values in given.items()}
        expected = {layer.name: layer.width for layer in wiring.layers}
        if widths != expected:
            raise ValueError(f"{what} has the layers and widths {widths}, the wiring {expected}")

    C, K = wiring.num_channels, len(wiring.layers)
    member, wanted = np.zeros((C, K), bool), np.zeros((C, K), bool)
    best = np.full((C, K), -np.inf)
    for k, layer in enumerate(wiring.layers):
        free = ~layer.fixed
        member[layer.channels[free], k] = True
        np.logical_or.at(wanted, (layer.channels[free], k), np.asarray(kept[layer.name], bool)[free])
        np.maximum.at(best, (layer.channels[free], k), np.asarray(scores[layer.name], np.float64)[free])
    dense = np.array([layer.groups == 1 for layer in wiring.layers])
    decides = np.where((member & dense).any(axis=1, keepdims=True), member & dense, member)
    any_wanted = (wanted & decides).any(axis=1)
    score = np.where(decides, best, -np.inf).max(axis=1, initial=-np.inf)

    alive = np.zeros(C, bool)
    for block in _equal_rows(member):  # channels that the same layers share
        counts = (wanted[block] & decides[block]).sum(axis=0)[decides[block][0]]
        width = {"max": counts.max(), "min": counts.min(), "union": any_wanted[block].sum()}[ties]
        width = min(-(-int(width) // multiple) * multiple, len(block))
        alive[block[np.lexsort((block, -score[block], ~any_wanted[block]))[:width]]] = True
    return {layer.name: layer.fixed | alive[layer.channels] for layer in wiring.layers}


def _equal_rows(member: np.ndarray) -> list[np.ndarray]:
    """Indices of the rows that are alike."""
    if not len(member):
        return []
    of_row = np.unique(member, axis=0, return_inverse=True)[1].reshape(-1)
    return [np.flatnonzero(of_row == i) for i in range(of_row.max() + 1)]


def empty_layers(kept: Mapping[str, np.ndarray]) -> list[str]:
    """Layers of which nothing is left: such a sparsity is not feasible.

    Args:
      kept: name of the layer -> bool [width].

    Returns:
      Their names.

    Example:
      >>> empty_layers({"a": np.array([False, False]), "b": np.array([True, False])})
      ['a']

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    return [name for name, mask in kept.items() if not np.any(mask)]
