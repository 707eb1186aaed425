r"""RANP: what each neuron of a network is worth before it is trained, and what its layer costs.

Symbols as in the paper: layers $l = 1..K$ (convolutions, transposed convolutions, linear layers); neuron $u$ of layer
$l$ is an output channel with its weights and bias $\theta \in u$; gates $c_\theta = 1$ with
$\partial L/\partial c_\theta = \theta\,\partial L/\partial\theta$; importance $s_u^l$; $\tau_l$ what layer $l$ costs.

Scores are dictionaries, name of the layer -> [width]. What follows the gradients is host arithmetic on a few thousand
numbers in float64.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.pruning.scores import gate_gradient
from jaxlib_methods.pruning.wiring import Wiring
from jaxlib_methods.typing import AxisName, GateGradients, LossFn, NeuronReduction, PyTree

__all__ = [
    "balance_layers",
    "neuron_importance",
    "resource_weights",
    "reweight_layers",
]

Scores = Mapping[str, Any]  # name of the layer -> [width]


def neuron_importance(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    wiring: Wiring,
    *,
    gradients: GateGradients = "mpmg",
    reduction: NeuronReduction = "sum",
    num_samples: int | None = None,
    axis_name: AxisName | None = None,
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
      reduction: "sum" (with the bias), "mean" (the bias counts as one more parameter) or "max" (without the bias).
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
    checks.one_of(GateGradients, gradients=gradients)
    checks.one_of(NeuronReduction, reduction=reduction)
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
            gates += [g[layer.bias][None]] if layer.bias in g and reduction != "max" else []
            A = jnp.concatenate(gates)
            A = jnp.abs(A) if gradients == "mpmg" else A
            # A sum over the neuron may come before the mean over samples, a maximum may not.
            found[layer.name] = {"sum": jnp.sum, "mean": jnp.mean}[reduction](A, axis=0) if reduction != "max" else A
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
    reduced = {name: jnp.max(A, axis=0) if reduction == "max" else A for name, A in total.items()}
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
    checks.not_negative(strength=strength, remedy="0 leaves the scores as they are")
    if set(scores) != set(resources):
        raise ValueError(f"scores and resources are of different layers: {sorted(set(scores) ^ set(resources))}")
    r = resource_weights(resources)
    return {name: np.asarray(s, np.float64) * (1 + strength * r[name]) for name, s in scores.items()}
