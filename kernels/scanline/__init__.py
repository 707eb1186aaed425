"""Scanline min-sum sweeps: min-plus product, normalisation, argmin and update of one direction, and its backward."""

from jaxlib_methods.kernels.scanline.api import sweep as sweep, sweep_backward as sweep_backward
from jaxlib_methods.kernels.scanline.arg_specs import ARG_SPECS as ARG_SPECS
from jaxlib_methods.kernels.scanline.cost import cost_estimate as cost_estimate
from jaxlib_methods.kernels.scanline.pairwise import Pairwise as Pairwise, dense as dense, transpose as transpose

__all__ = ["ARG_SPECS", "Pairwise", "cost_estimate", "dense", "sweep", "sweep_backward", "transpose"]
