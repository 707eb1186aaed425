r"""RANP: which neurons of a network are worth keeping before it is trained, given what their layers cost.

Symbols as in the paper: layers $l = 1..K$ (convolutions, transposed convolutions, linear layers); neuron $u$ of layer
$l$ is an output channel with its weights and bias $\theta \in u$; gates $c_\theta = 1$ with
$\partial L/\partial c_\theta = \theta\,\partial L/\partial\theta$; importance $s_u^l$; $\tau_l$ what layer $l$ costs.

Scores are dictionaries, name of the layer -> [width]. What follows the gradients is host arithmetic on a few thousand
numbers in float64.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods.pruning._scores import gate_gradient
from jaxlib_methods.pruning._wiring import Wiring

PyTree = Any
Scores = Mapping[str, Any]  # name of the layer -> [width]


def neuron_importance(
    loss_fn: Callable[..., jax.Array],
    params: PyTree,
    batch: PyTree,
    wiring: Wiring,
    *,
    gradients: str = "mpmg",
    reduce: str = "sum",
    num_samples: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> dict[str, jax.Array]:
    r"""Importance of every neuron from the gradients of the gates on its weights and bias.

    Over samples $t$ (the paper's are single examples) and the parameters of a neuron,

    $s_u^l = \big|\mathrm{reduce}_{\theta \in u} A_\theta\big|$, with $A_\theta = \mathrm{mean}_t |g_\theta^{(t)}|$
    ("mpmg") or $A_\theta = \mathrm{mean}_t\, g_\theta^{(t)}$ ("mnmg"), $g_\theta = \theta\,\partial L/\partial\theta$.

    The sum of "mnmg" is the gradient of one gate for the whole neuron. A normalisation by batch statistics right after
    the layer makes it zero but for round-off: use it with frozen statistics or without normalisation.

    Args:
      loss_fn: `(params, batch) -> loss []`, the mean over the batch; batch norm by batch statistics as in the paper.
      params: pytree of parameters whose paths are those of the wiring, such as `nnx.state(model, nnx.Param)`.
      batch: pytree of arrays with a common first axis.
      wiring: of the network.
      gradients: "mpmg" (size of the gradients of many gates) or "mnmg" (signed).
      reduce: "sum" (with the bias), "mean" (the bias counts as one more parameter) or "max" (without the bias).
      num_samples: equal parts of the batch, one gradient for each; None: one for each example.
      axis_name: inside `jax.shard_map`, the mesh axes over which the batch is spread.

    Returns:
      Name of the layer -> importance [width].

    Raises:
      ValueError: for an unknown option, a batch that cannot be divided, parameters that are not the wiring's, and
        (outside a trace) a loss that is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxlib_methods.pruning import trace_wiring
      >>> net = nnx.Sequential(nnx.Linear(1, 2, use_bias=False, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
      >>> graph, params = nnx.split(net)
      >>> x = jnp.array([[1.0], [-1.0]])
      >>> importance = neuron_importance(lambda p, x: jnp.mean(nnx.merge(graph, p)(x)), params, x, trace_wiring(net, x))
      >>> {name: s.shape for name, s in importance.items()}
      {'layers/0': (2,), 'layers/1': (1,)}

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    if gradients not in ("mpmg", "mnmg"):
        raise ValueError(f'gradients must be "mpmg" or "mnmg", got {gradients!r}')
    if reduce not in ("sum", "mean", "max"):
        raise ValueError(f'reduce must be "sum", "mean" or "max", got {reduce!r}')
    names = jax.tree.leaves(trees.path_names(params))
    missing = {layer.kernel for layer in wiring.layers} - set(names)
    if missing:
        raise ValueError(f"params lacks {sorted(missing)}; give nnx.state(model, nnx.Param) of the traced model")
    sizes = {x.shape[0] for x in jax.tree.leaves(batch)}
    size = sizes.pop() if len(sizes) == 1 else 0
    count = size if num_samples is None else num_samples
    if not 0 < count <= size or size % count:
        raise ValueError(f"num_samples must divide the batch, got {count} for the sizes {sorted({size, *sizes})}")

    local = params if axis_name is None else jax.tree.map(lambda p: jax.lax.pcast(p, axis_name, to="varying"), params)

    def of_sample(sample: PyTree) -> dict[str, Any]:
        g = dict(zip(names, jax.tree.leaves(gate_gradient(loss_fn, local, sample)), strict=True))
        found = {}
        for layer in wiring.layers:
            gates = [jnp.moveaxis(g[layer.kernel], layer.axis, -1).reshape(-1, layer.width)]
            gates += [g[layer.bias][None]] if layer.bias in g and reduce != "max" else []
            A = jnp.concatenate(gates)
            A = jnp.abs(A) if gradients == "mpmg" else A
            # A sum over the neuron may come before the mean over samples, a maximum may not.
            found[layer.name] = {"sum": jnp.sum, "mean": jnp.mean}[reduce](A, axis=0) if reduce != "max" else A
        return found

    parts = jax.tree.map(lambda x: x.reshape(count, size // count, *x.shape[1:]), batch)
    shapes = jax.eval_shape(of_sample, jax.tree.map(lambda x: x[0], parts))
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    if axis_name is not None:
        total = jax.lax.pcast(total, axis_name, to="varying")
    add = lambda total, sample: (jax.tree.map(jnp.add, total, of_sample(sample)), None)
    total, _ = jax.lax.scan(add, total, parts)
    if axis_name is not None:
        total = jax.lax.pmean(total, axis_name)
    reduced = {name: jnp.max(A, axis=0) if reduce == "max" else A for name, A in total.items()}
    return {name: jnp.abs(A) / count for name, A in reduced.items()}


def balance_layers(scores: Scores) -> dict[str, np.ndarray]:
    r"""Gives all layers the same mean score, that of the layer with the largest: $s_u^l \max_k \bar s_k / \bar s_l$.

    Args:
      scores: name of the layer -> [width].

    Returns:
      The same in float64.

    Raises:
      ValueError: names a layer whose scores are all zero, or not finite.

    Example:
      >>> {name: s.tolist() for name, s in balance_layers({"a": [1.0, 3.0], "b": [10.0, 30.0]}).items()}
      {'a': [10.0, 30.0], 'b': [10.0, 30.0]}

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    wide = {name: np.asarray(s, np.float64) for name, s in scores.items()}
    means = {name: float(s.mean()) for name, s in wide.items()}
    for name, mean in means.items():
        if not (math.isfinite(mean) and mean > 0):
            raise ValueError(f"layer {name!r} has the mean score {mean}; no gradient reaches it, or one is not finite")
    return {name: s * (max(means.values()) / means[name]) for name, s in wide.items()}


def resource_weights(resources: Mapping[str, float | int]) -> dict[str, float]:
    r"""How cheap each layer is: $r = \mathrm{softmax}_l(-\tau_l / \max_k \tau_k)$.

    The largest weight is at most e times the smallest.

    Args:
      resources: name of the layer -> what it costs, $\tau_l \ge 0$: FLOPs (RANP-f) or elements of the output (RANP-m)
        in the full network, `{layer.name: layer.flops for layer in wiring.layers}`.

    Returns:
      Name of the layer -> weight; they sum to 1.

    Raises:
      ValueError: for a negative cost, or none above 0.

    Example:
      >>> {name: round(r, 3) for name, r in resource_weights({"a": 1, "b": 4}).items()}
      {'a': 0.679, 'b': 0.321}

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    tau = np.array(list(resources.values()), np.float64)
    if not tau.size or tau.min() < 0 or not 0 < tau.max() < np.inf:
        raise ValueError(f"resources must be non-negative and not all zero, got {dict(resources)}")
    weights = np.exp(-tau / tau.max())
    return dict(zip(resources, (weights / weights.sum()).tolist(), strict=True))


def reweight_layers(
    scores: Scores, resources: Mapping[str, float | int], strength: float | int
) -> dict[str, np.ndarray]:
    r"""Favours the neurons of cheap layers: $s_u^l (1 + \lambda r_l)$, with $r$ from `resource_weights`.

    Args:
      scores: name of the layer -> [width], balanced by `balance_layers`.
      resources: name of the layer -> what it costs in the full network.
      strength: $\lambda$; the paper's is 11 (ShapeNet), 15 (BraTS) and 80 (UCF101).

    Returns:
      Name of the layer -> scores [width] in float64.

    Raises:
      ValueError: for a negative strength, or resources of other layers than the scores'.

    Example:
      >>> balanced = {"a": [10.0, 30.0], "b": [10.0, 30.0]}
      >>> {name: s.round(1).tolist() for name, s in reweight_layers(balanced, {"a": 1, "b": 4}, 11.0).items()}
      {'a': [84.7, 254.1], 'b': [45.3, 135.9]}

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    if not strength >= 0:
        raise ValueError(f"strength must be at least 0, got {strength}; 0 leaves the scores as they are")
    if set(scores) != set(resources):
        raise ValueError(f"scores and resources are of different layers: {sorted(set(scores) ^ set(resources))}")
    r = resource_weights(resources)
    return {name: np.asarray(s, np.float64) * (1 + strength * r[name]) for name, s in scores.items()}


def keep_neurons(scores: Scores, sparsity: float | int, *, scope: str = "global") -> dict[str, np.ndarray]:
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
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must lie in [0, 1], got {sparsity}; 0.78 removes 78 of 100 neurons")
    if scope not in ("global", "per_layer"):
        raise ValueError(f'scope must be "global" or "per_layer", got {scope!r}')
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
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if not feasible(0.0):
        raise ValueError("sparsity 0 is not feasible: a layer is empty before anything is removed")
    low, high = 0.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
    return low


def clean_up_neurons(
    kept: Mapping[str, np.ndarray], wiring: Wiring, scores: Scores, *, ties: str = "max", multiple: int = 1
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
    if ties not in ("max", "min", "union"):
        raise ValueError(f'ties must be "max", "min" or "union", got {ties!r}')
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1, got {multiple}")
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
