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

BibTeX:
@inproceedings{lee2019snip,
  title = {{SNIP}: Single-shot network pruning based on connection sensitivity},
  author = {Lee, Namhoon and Ajanthan, Thalaiyasingam and Torr, Philip H. S.},
  booktitle = {International Conference on Learning Representations},
  year = {2019},
}

@inproceedings{wang2020picking,
  title = {Picking winning tickets before training by preserving gradient flow},
  author = {Wang, Chaoqi and Zhang, Guodong and Grosse, Roger},
  booktitle = {International Conference on Learning Representations},
  year = {2020},
}

@inproceedings{tanaka2020pruning,
  title = {Pruning neural networks without any data by iteratively conserving synaptic flow},
  author = {Tanaka, Hidenori and Kunin, Daniel and Yamins, Daniel L. K. and Ganguli, Surya},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020},
}

@inproceedings{han2015learning,
  title = {Learning both weights and connections for efficient neural networks},
  author = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2015},
}

@inproceedings{lee2020signal,
  title = {A signal propagation perspective for pruning neural networks at initialization},
  author = {Lee, Namhoon and Ajanthan, Thalaiyasingam and Gould, Stephen and Torr, Philip H. S.},
  booktitle = {International Conference on Learning Representations},
  year = {2020},
}

@inproceedings{xiao2018dynamical,
  title = {Dynamical isometry and a mean field theory of {CNNs}: How to train 10,000-layer vanilla convolutional neural
    networks},
  author = {Xiao, Lechao and Bahri, Yasaman and Sohl-Dickstein, Jascha and Schoenholz, Samuel S. and
    Pennington, Jeffrey},
  booktitle = {International Conference on Machine Learning},
  year = {2018},
}

@inproceedings{xu2020ranp,
  title = {{RANP}: Resource aware neuron pruning at initialization for {3D} {CNNs}},
  author = {Xu, Zhiwei and Ajanthan, Thalaiyasingam and Vineet, Vibhav and Hartley, Richard},
  booktitle = {International Conference on 3D Vision},
  year = {2020},
}
"""

from jaxlib_methods.pruning._initializers import orthogonal_convolution as orthogonal_convolution
from jaxlib_methods.pruning._initializers import reinitialize as reinitialize
from jaxlib_methods.pruning._isometry import RepairedIsometry as RepairedIsometry
from jaxlib_methods.pruning._isometry import isometry_loss as isometry_loss
from jaxlib_methods.pruning._isometry import repair_isometry as repair_isometry
from jaxlib_methods.pruning._masks import (
    MaskState as MaskState,
)
from jaxlib_methods.pruning._masks import (
    PrunedState as PrunedState,
)
from jaxlib_methods.pruning._masks import (
    Sparsity as Sparsity,
)
from jaxlib_methods.pruning._masks import (
    apply_masks as apply_masks,
)
from jaxlib_methods.pruning._masks import (
    format_sparsity as format_sparsity,
)
from jaxlib_methods.pruning._masks import (
    mask_updates as mask_updates,
)
from jaxlib_methods.pruning._masks import (
    pack_masks as pack_masks,
)
from jaxlib_methods.pruning._masks import (
    pruned as pruned,
)
from jaxlib_methods.pruning._masks import (
    summarize_sparsity as summarize_sparsity,
)
from jaxlib_methods.pruning._masks import (
    unpack_masks as unpack_masks,
)
from jaxlib_methods.pruning._neurons import (
    balance_layers as balance_layers,
)
from jaxlib_methods.pruning._neurons import (
    clean_up_neurons as clean_up_neurons,
)
from jaxlib_methods.pruning._neurons import (
    empty_layers as empty_layers,
)
from jaxlib_methods.pruning._neurons import (
    keep_neurons as keep_neurons,
)
from jaxlib_methods.pruning._neurons import (
    max_sparsity as max_sparsity,
)
from jaxlib_methods.pruning._neurons import (
    neuron_importance as neuron_importance,
)
from jaxlib_methods.pruning._neurons import (
    resource_weights as resource_weights,
)
from jaxlib_methods.pruning._neurons import (
    reweight_layers as reweight_layers,
)
from jaxlib_methods.pruning._removal import (
    neuron_masks as neuron_masks,
)
from jaxlib_methods.pruning._removal import (
    redraw_weights as redraw_weights,
)
from jaxlib_methods.pruning._removal import (
    remove_neurons as remove_neurons,
)
from jaxlib_methods.pruning._scores import (
    connection_sensitivity as connection_sensitivity,
)
from jaxlib_methods.pruning._scores import (
    gate_gradient as gate_gradient,
)
from jaxlib_methods.pruning._scores import (
    grasp as grasp,
)
from jaxlib_methods.pruning._scores import (
    magnitude as magnitude,
)
from jaxlib_methods.pruning._scores import (
    random as random,
)
from jaxlib_methods.pruning._scores import (
    synflow as synflow,
)
from jaxlib_methods.pruning._selection import (
    iterative_prune as iterative_prune,
)
from jaxlib_methods.pruning._selection import (
    prunable as prunable,
)
from jaxlib_methods.pruning._selection import (
    prune_masks as prune_masks,
)
from jaxlib_methods.pruning._signal_propagation import LayerSensitivity as LayerSensitivity
from jaxlib_methods.pruning._signal_propagation import Spectrum as Spectrum
from jaxlib_methods.pruning._signal_propagation import jacobian_singular_values as jacobian_singular_values
from jaxlib_methods.pruning._signal_propagation import layer_sensitivity as layer_sensitivity
from jaxlib_methods.pruning._signal_propagation import summarize_spectrum as summarize_spectrum
from jaxlib_methods.pruning._signal_propagation import uniform_cross_entropy as uniform_cross_entropy
from jaxlib_methods.pruning._signal_propagation import weight_singular_values as weight_singular_values
from jaxlib_methods.pruning._wiring import (
    Cost as Cost,
)
from jaxlib_methods.pruning._wiring import (
    Layer as Layer,
)
from jaxlib_methods.pruning._wiring import (
    Wiring as Wiring,
)
from jaxlib_methods.pruning._wiring import (
    network_costs as network_costs,
)
from jaxlib_methods.pruning._wiring import (
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
