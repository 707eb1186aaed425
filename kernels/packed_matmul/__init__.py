"""Matrix products with weights stored in bits: 1, 2, 4 or 8 a weight, whatever the values of the labels."""

from jaxlib_methods.kernels.packed_matmul.api import packed_matmul as packed_matmul
from jaxlib_methods.kernels.packed_matmul.arg_specs import ARG_SPECS as ARG_SPECS
from jaxlib_methods.kernels.packed_matmul.cost import cost_estimate as cost_estimate
from jaxlib_methods.kernels.packed_matmul.layout import (
    bits_for as bits_for,
    decode as decode,
    pack_codes as pack_codes,
    unpack_codes as unpack_codes,
)

__all__ = [
    "ARG_SPECS",
    "bits_for",
    "cost_estimate",
    "decode",
    "pack_codes",
    "packed_matmul",
    "unpack_codes",
]
