r"""Pruning = a score x a scope x a schedule, giving masks; optax transformations that train under them.

    scores = connection_sensitivity(loss_fn, params, batch)          # SNIP; or magnitude, random, grasp, synflow
    masks = prune_masks(scores, sparsity=0.98)                        # once, over all layers jointly
    masks = iterative_prune(score_fn, params, sparsity=0.98)          # or in many small cuts
    params, _ = repair_isometry(params, masks)                        # what is left propagates signals; needs no data
    optimizer = pruned(optax.sgd(0.1, 0.9), masks)

Structured pruning (RANP) removes whole neurons and returns a smaller dense network:

    wiring = trace_wiring(model, example)                              # which channels stand or fall together
    scores = neuron_scores.balance_layers(neuron_importance(loss_fn, params, batch, wiring))
    scores = neuron_scores.reweight_layers(scores, {layer.name: layer.flops for layer in wiring.layers}, strength=11)
    kept = clean_up_neurons(keep_neurons(scores, sparsity=0.78), wiring, scores)
    smaller = removal.redraw_weights(remove_neurons(model, kept, wiring), key=key)

A `None` in a tree of scores or masks means that the parameter is never pruned; `mark_prunable` says what may be.

| method | score | how it cuts |
| --- | --- | --- |
| SNIP | `connection_sensitivity` | `prune_masks`, once; `pruned` trains what is left |
| GraSP | `grasp` | `prune_masks`, once |
| SynFlow | `synflow` | `iterative_prune`, no data |
| magnitude, random | `scores.magnitude`, `scores.random` | either |
| signal propagation | `connection_sensitivity` after `reinitialize` | `prune_masks`, then `repair_isometry` |
| RANP | `neuron_importance` on the network's `trace_wiring` | `keep_neurons`, `clean_up_neurons`, `remove_neurons` |

`masks` and `sparsity` hold what is done with masks, `signal_propagation` and `isometry` the diagnostics of a pruned
network, `neuron_scores`, `neurons`, `removal` and `wiring` the steps of RANP.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.pruning import (
    initializers as initializers,
    isometry as isometry,
    masks as masks,
    neuron_scores as neuron_scores,
    neurons as neurons,
    removal as removal,
    scores as scores,
    signal_propagation as signal_propagation,
    sparsity as sparsity,
    wiring as wiring,
)
from jaxlib_methods.pruning._selection import (
    iterative_prune as iterative_prune,
    mark_prunable as mark_prunable,
    prune_masks as prune_masks,
)
from jaxlib_methods.pruning.initializers import (
    reinitialize as reinitialize,
)
from jaxlib_methods.pruning.isometry import (
    repair_isometry as repair_isometry,
)
from jaxlib_methods.pruning.masks import (
    apply_masks as apply_masks,
    pruned as pruned,
)
from jaxlib_methods.pruning.neuron_scores import (
    neuron_importance as neuron_importance,
)
from jaxlib_methods.pruning.neurons import (
    clean_up_neurons as clean_up_neurons,
    keep_neurons as keep_neurons,
)
from jaxlib_methods.pruning.removal import (
    remove_neurons as remove_neurons,
)
from jaxlib_methods.pruning.scores import (
    connection_sensitivity as connection_sensitivity,
    grasp as grasp,
    synflow as synflow,
)
from jaxlib_methods.pruning.wiring import (
    trace_wiring as trace_wiring,
)

__all__ = [
    "apply_masks",
    "clean_up_neurons",
    "connection_sensitivity",
    "grasp",
    "iterative_prune",
    "keep_neurons",
    "mark_prunable",
    "neuron_importance",
    "prune_masks",
    "pruned",
    "reinitialize",
    "remove_neurons",
    "repair_isometry",
    "synflow",
    "trace_wiring",
]

moved_names(
    __name__,
    {
        "Cost": "pruning.wiring.Cost",
        "Layer": "pruning.wiring.Layer",
        "LayerSensitivity": "pruning.signal_propagation.LayerSensitivity",
        "MaskState": "pruning.masks.MaskState",
        "PrunedState": "pruning.masks.PrunedState",
        "RepairedIsometry": "pruning.isometry.IsometryResult",
        "Sparsity": "pruning.sparsity.Sparsity",
        "Spectrum": "pruning.signal_propagation.Spectrum",
        "Wiring": "pruning.wiring.Wiring",
        "balance_layers": "pruning.neuron_scores.balance_layers",
        "empty_layers": "pruning.neurons.empty_layers",
        "format_sparsity": "pruning.sparsity.format_sparsity",
        "gate_gradient": "pruning.scores.gate_gradient",
        "isometry_loss": "pruning.isometry.isometry_loss",
        "jacobian_singular_values": "pruning.signal_propagation.jacobian_singular_values",
        "layer_sensitivity": "pruning.signal_propagation.layer_sensitivity",
        "magnitude": "pruning.scores.magnitude",
        "mask_updates": "pruning.masks.mask_updates",
        "max_sparsity": "pruning.neurons.max_sparsity",
        "network_costs": "pruning.wiring.network_costs",
        "neuron_masks": "pruning.removal.neuron_masks",
        "orthogonal_convolution": "pruning.initializers.orthogonal_convolution",
        "pack_masks": "pruning.masks.pack_masks",
        "prunable": "pruning.mark_prunable",
        "random": "pruning.scores.random",
        "redraw_weights": "pruning.removal.redraw_weights",
        "resource_weights": "pruning.neuron_scores.resource_weights",
        "reweight_layers": "pruning.neuron_scores.reweight_layers",
        "summarize_sparsity": "pruning.sparsity.summarize_sparsity",
        "summarize_spectrum": "pruning.signal_propagation.summarize_spectrum",
        "uniform_cross_entropy": "pruning.signal_propagation.uniform_cross_entropy",
        "unpack_masks": "pruning.masks.unpack_masks",
        "weight_singular_values": "pruning.signal_propagation.weight_singular_values",
    },
)
