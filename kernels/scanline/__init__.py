"""Scanline min-sum sweeps: min-plus product, normalisation, argmin and update of one direction, and its backward."""

from jaxlib_methods.kernels.scanline.api import sweep as sweep, sweep_backward as sweep_backward
from jaxlib_methods.kernels.scanline.cost import Cost as Cost, cost_estimate as cost_estimate
from jaxlib_methods.kernels.scanline.pairwise import Pairwise as Pairwise, dense as dense, transpose as transpose

__all__ = ["Cost", "Pairwise", "cost_estimate", "dense", "sweep", "sweep_backward", "transpose"]
