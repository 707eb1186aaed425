"""Matrix products with weights stored in bits: 1, 2, 4 or 8 a weight, whatever the values of the labels."""

from jaxlib_methods.kernels.packed_matmul.api import packed_matmul as packed_matmul
from jaxlib_methods.kernels.packed_matmul.arg_specs import ARG_SPECS as ARG_SPECS
from jaxlib_methods.kernels.packed_matmul.arg_specs import ArgSpec as ArgSpec
from jaxlib_methods.kernels.packed_matmul.cost import Cost as Cost
from jaxlib_methods.kernels.packed_matmul.cost import cost_estimate as cost_estimate
from jaxlib_methods.kernels.packed_matmul.layout import bits_for as bits_for
from jaxlib_methods.kernels.packed_matmul.layout import decode as decode
from jaxlib_methods.kernels.packed_matmul.layout import pack_codes as pack_codes
from jaxlib_methods.kernels.packed_matmul.layout import unpack_codes as unpack_codes

__all__ = [
    "ARG_SPECS",
    "ArgSpec",
    "Cost",
    "bits_for",
    "cost_estimate",
    "decode",
    "pack_codes",
    "packed_matmul",
    "unpack_codes",
]
