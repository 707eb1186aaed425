r"""Pruning = a score x a scope x a schedule, giving masks; optax transformations that train under them.

    scores = connection_sensitivity(loss_fn, params, batch)          # SNIP; or magnitude, random, grasp, synflow
    masks = prune_masks(scores, sparsity=0.98)                        # once, over all layers jointly
    masks = iterative_prune(score_fn, params, sparsity=0.98)          # or in many small cuts
    params, _ = repair_isometry(params, masks)                        # what is left propagates signals; needs no data
    optimizer = pruned(optax.sgd(0.1, 0.9), masks)

Structured pruning (RANP) removes whole neurons and returns a smaller dense network:

    wiring = trace_wiring(model, example)                              # which channels stand or fall together
    scores = balance_layers(neuron_importance(loss_fn, params, batch, wiring))
    scores = reweight_layers(scores, {layer.name: layer.flops for layer in wiring.layers}, strength=11)
    kept = clean_up_neurons(keep_neurons(scores, sparsity=0.78), wiring, scores)
    smaller = redraw_weights(remove_neurons(model, kept, wiring), key=key)

A `None` in a tree of scores or masks means that the parameter is never pruned; `prunable` says which are candidates.
"""

from jaxlib_methods.pruning._initializers import (
    orthogonal_convolution as orthogonal_convolution,
    reinitialize as reinitialize,
)
from jaxlib_methods.pruning._isometry import (
    RepairedIsometry as RepairedIsometry,
    isometry_loss as isometry_loss,
    repair_isometry as repair_isometry,
)
from jaxlib_methods.pruning._masks import (
    MaskState as MaskState,
    PrunedState as PrunedState,
    Sparsity as Sparsity,
    apply_masks as apply_masks,
    format_sparsity as format_sparsity,
    mask_updates as mask_updates,
    pack_masks as pack_masks,
    pruned as pruned,
    summarize_sparsity as summarize_sparsity,
    unpack_masks as unpack_masks,
)
from jaxlib_methods.pruning._neurons import (
    balance_layers as balance_layers,
    clean_up_neurons as clean_up_neurons,
    empty_layers as empty_layers,
    keep_neurons as keep_neurons,
    max_sparsity as max_sparsity,
    neuron_importance as neuron_importance,
    resource_weights as resource_weights,
    reweight_layers as reweight_layers,
)
from jaxlib_methods.pruning._removal import (
    neuron_masks as neuron_masks,
    redraw_weights as redraw_weights,
    remove_neurons as remove_neurons,
)
from jaxlib_methods.pruning._scores import (
    connection_sensitivity as connection_sensitivity,
    gate_gradient as gate_gradient,
    grasp as grasp,
    magnitude as magnitude,
    random as random,
    synflow as synflow,
)
from jaxlib_methods.pruning._selection import (
    iterative_prune as iterative_prune,
    prunable as prunable,
    prune_masks as prune_masks,
)
from jaxlib_methods.pruning._signal_propagation import (
    LayerSensitivity as LayerSensitivity,
    Spectrum as Spectrum,
    jacobian_singular_values as jacobian_singular_values,
    layer_sensitivity as layer_sensitivity,
    summarize_spectrum as summarize_spectrum,
    uniform_cross_entropy as uniform_cross_entropy,
    weight_singular_values as weight_singular_values,
)
from jaxlib_methods.pruning._wiring import (
    Cost as Cost,
    Layer as Layer,
    Wiring as Wiring,
    network_costs as network_costs,
    trace_wiring as trace_wiring,
)

__all__ = [
    "Cost",
    "Layer",
    "LayerSensitivity",
    "MaskState",
    "PrunedState",
    "RepairedIsometry",
    "Sparsity",
    "Spectrum",
    "Wiring",
    "apply_masks",
    "balance_layers",
    "clean_up_neurons",
    "connection_sensitivity",
    "empty_layers",
    "format_sparsity",
    "gate_gradient",
    "grasp",
    "isometry_loss",
    "iterative_prune",
    "jacobian_singular_values",
    "keep_neurons",
    "layer_sensitivity",
    "magnitude",
    "mask_updates",
    "max_sparsity",
    "network_costs",
    "neuron_importance",
    "neuron_masks",
    "orthogonal_convolution",
    "pack_masks",
    "prunable",
    "prune_masks",
    "pruned",
    "random",
    "redraw_weights",
    "reinitialize",
    "remove_neurons",
    "repair_isometry",
    "resource_weights",
    "reweight_layers",
    "summarize_sparsity",
    "summarize_spectrum",
    "synflow",
    "trace_wiring",
    "uniform_cross_entropy",
    "unpack_masks",
    "weight_singular_values",
]
