r"""Quantization by proximal and mirror steps: weights from a small set of labels, trained through auxiliary variables.

    lattice = Lattice(labels=(-1, 1), rules=(("^bn", None),))          # what is quantized, to which labels, and how
    aux = init_auxiliary(key, params, lattice)
    optimizer = proximal_mean_field(1e-3, lattice, beta=inverse_temperature_schedule(1.02, 100))
    opt_state = optimizer.init(aux)
    for batch in batches:
        weights = project(aux, lattice, inverse_temperature(opt_state))
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

Soft weights and fake quantization cost what float weights cost; `pack` stores the result in bits.
"""

from jaxlib_methods.quantization._annealing import (
    AnnealingState as AnnealingState,
    inverse_temperature as inverse_temperature,
    inverse_temperature_schedule as inverse_temperature_schedule,
)
from jaxlib_methods.quantization._lattice import (
    BINARY as BINARY,
    TERNARY as TERNARY,
    Lattice as Lattice,
    assert_quantized as assert_quantized,
    auxiliary_from as auxiliary_from,
    init_auxiliary as init_auxiliary,
    label_share as label_share,
    primal_of as primal_of,
    project as project,
    quantize as quantize,
    symmetric_labels as symmetric_labels,
    weights_of as weights_of,
)
from jaxlib_methods.quantization._mirror_descent import (
    lift_gradients as lift_gradients,
    mirror_descent as mirror_descent,
    mirror_map as mirror_map,
    mirror_step_softmax as mirror_step_softmax,
    mirror_step_tanh as mirror_step_tanh,
    scale_by_mirror_descent as scale_by_mirror_descent,
    scale_by_stable_mirror_descent as scale_by_stable_mirror_descent,
    stable_mirror_descent as stable_mirror_descent,
)
from jaxlib_methods.quantization._packing import (
    PackedWeight as PackedWeight,
    pack as pack,
    packed_bytes as packed_bytes,
    packed_matmul as packed_matmul,
    unpack as unpack,
)
from jaxlib_methods.quantization._projections import (
    argmax_projection as argmax_projection,
    round_projection as round_projection,
    softmax_projection as softmax_projection,
    sparsemax_projection as sparsemax_projection,
    tanh_projection as tanh_projection,
)
from jaxlib_methods.quantization._proximal_mean_field import (
    icm as icm,
    projected_gradient as projected_gradient,
    proximal_mean_field as proximal_mean_field,
    proximal_mean_field_step as proximal_mean_field_step,
    scale_by_icm as scale_by_icm,
    scale_by_projected_gradient as scale_by_projected_gradient,
    scale_by_proximal_mean_field as scale_by_proximal_mean_field,
)
from jaxlib_methods.quantization._straight_through import (
    binary_connect as binary_connect,
    clip_to_labels as clip_to_labels,
    scale_by_straight_through as scale_by_straight_through,
    straight_through as straight_through,
)

__all__ = [
    "BINARY",
    "TERNARY",
    "AnnealingState",
    "Lattice",
    "PackedWeight",
    "argmax_projection",
    "assert_quantized",
    "auxiliary_from",
    "binary_connect",
    "clip_to_labels",
    "icm",
    "init_auxiliary",
    "inverse_temperature",
    "inverse_temperature_schedule",
    "label_share",
    "lift_gradients",
    "mirror_descent",
    "mirror_map",
    "mirror_step_softmax",
    "mirror_step_tanh",
    "pack",
    "packed_bytes",
    "packed_matmul",
    "primal_of",
    "project",
    "projected_gradient",
    "proximal_mean_field",
    "proximal_mean_field_step",
    "quantize",
    "round_projection",
    "scale_by_icm",
    "scale_by_mirror_descent",
    "scale_by_projected_gradient",
    "scale_by_proximal_mean_field",
    "scale_by_stable_mirror_descent",
    "scale_by_straight_through",
    "softmax_projection",
    "sparsemax_projection",
    "stable_mirror_descent",
    "straight_through",
    "symmetric_labels",
    "tanh_projection",
    "unpack",
    "weights_of",
]
