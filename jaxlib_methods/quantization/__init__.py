r"""Quantization by proximal and mirror steps: weights from a small set of labels, trained through auxiliary variables.

    lattice = Lattice(labels=(-1, 1), rules=(("^bn", None),))          # what is quantized, to which labels, and how
    aux = init_auxiliary(params, lattice, key=key)
    optimizer = proximal_mean_field(1e-3, lattice, inverse_temperature=inverse_temperature_schedule(1.02, 100))
    opt_state = optimizer.init(aux)
    for batch in batches:
        weights = project(aux, lattice, read_inverse_temperature(opt_state))
        grads = jax.grad(loss)(weights, batch)                         # with respect to what the network saw
        updates, opt_state = optimizer.update(grads, opt_state, aux)   # applies the projection's Jacobian
        aux = optax.apply_updates(aux, updates)
    network = quantize(aux, lattice)                                   # every weight is in its label set

| method | projection | Jacobian | optimizer |
| --- | --- | --- | --- |
| proximal mean-field | softmax | double, single, exact | `proximal_mean_field` |
| GD-tanh | tanh | exact | `proximal_mean_field` |
| projected gradient descent | sparsemax | exact | `projected_gradient` |
| proximal ICM | argmax | clipped | `icm` |
| mirror descent, -S | softmax, tanh | none | `stable_mirror_descent` |
| mirror descent, literal | softmax, tanh | none | `mirror_descent`, on primal variables |
| straight-through, BinaryConnect | round | clipped, none | `straight_through`, `binary_connect` |

`rules` holds the link of each optimizer for a chain of your own (`scale_by_...`), `projections` and `steps` the
mathematics on arrays, `labels`, `lattice`, `auxiliary` and `annealing` what they work on, `packing` the bits.
Soft weights and fake quantization cost what float weights cost; `pack` stores the result in bits.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.quantization import (
    annealing as annealing,
    auxiliary as auxiliary,
    labels as labels,
    lattice as lattice,
    packing as packing,
    projections as projections,
    rules as rules,
    steps as steps,
)
from jaxlib_methods.quantization._mirror_descent import (
    mirror_descent as mirror_descent,
    stable_mirror_descent as stable_mirror_descent,
)
from jaxlib_methods.quantization._proximal_mean_field import (
    icm as icm,
    projected_gradient as projected_gradient,
    proximal_mean_field as proximal_mean_field,
)
from jaxlib_methods.quantization._straight_through import (
    binary_connect as binary_connect,
    straight_through as straight_through,
)
from jaxlib_methods.quantization.annealing import (
    inverse_temperature_schedule as inverse_temperature_schedule,
    read_inverse_temperature as read_inverse_temperature,
)
from jaxlib_methods.quantization.auxiliary import (
    init_auxiliary as init_auxiliary,
    project as project,
    quantize as quantize,
)
from jaxlib_methods.quantization.lattice import (
    Lattice as Lattice,
)
from jaxlib_methods.quantization.packing import (
    pack as pack,
    unpack as unpack,
)

__all__ = [
    "Lattice",
    "binary_connect",
    "icm",
    "init_auxiliary",
    "inverse_temperature_schedule",
    "mirror_descent",
    "pack",
    "project",
    "projected_gradient",
    "proximal_mean_field",
    "quantize",
    "read_inverse_temperature",
    "stable_mirror_descent",
    "straight_through",
    "unpack",
]

moved_names(
    __name__,
    {
        "BINARY": "quantization.labels.BINARY",
        "TERNARY": "quantization.labels.TERNARY",
        "AnnealingState": "quantization.annealing.AnnealingState",
        "PackedWeight": "quantization.packing.PackedWeight",
        "argmax_projection": "quantization.projections.argmax_projection",
        "assert_quantized": "quantization.lattice.assert_quantized",
        "auxiliary_from": "quantization.auxiliary.weights_to_auxiliary",
        "clip_to_labels": "quantization.rules.clip_to_labels",
        "inverse_temperature": "quantization.read_inverse_temperature",
        "label_share": "quantization.lattice.label_share",
        "lift_gradients": "quantization.rules.lift_gradients",
        "mirror_map": "quantization.steps.mirror_map",
        "mirror_step_softmax": "quantization.steps.mirror_step_softmax",
        "mirror_step_tanh": "quantization.steps.mirror_step_tanh",
        "packed_bytes": "quantization.packing.packed_bytes",
        "packed_matmul": "quantization.packing.packed_matmul",
        "primal_of": "quantization.auxiliary.auxiliary_to_primal",
        "proximal_mean_field_step": "quantization.steps.proximal_mean_field_step",
        "round_projection": "quantization.projections.round_projection",
        "scale_by_icm": "quantization.rules.scale_by_icm",
        "scale_by_mirror_descent": "quantization.rules.scale_by_mirror_descent",
        "scale_by_projected_gradient": "quantization.rules.scale_by_projected_gradient",
        "scale_by_proximal_mean_field": "quantization.rules.scale_by_proximal_mean_field",
        "scale_by_stable_mirror_descent": "quantization.rules.scale_by_stable_mirror_descent",
        "scale_by_straight_through": "quantization.rules.scale_by_straight_through",
        "softmax_projection": "quantization.projections.softmax_projection",
        "sparsemax_projection": "quantization.projections.sparsemax_projection",
        "symmetric_labels": "quantization.labels.symmetric_labels",
        "tanh_projection": "quantization.projections.tanh_projection",
        "weights_of": "quantization.auxiliary.primal_to_weights",
    },
)
