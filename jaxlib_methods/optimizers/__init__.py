"""Optimizers: optax gradient transformations, each as the rule `scale_by_x` and as the alias `x`."""

from jaxlib_methods.optimizers._agd import agd as agd
from jaxlib_methods.optimizers._agd import agd_initializer as agd_initializer
from jaxlib_methods.optimizers._agd import scale_by_agd as scale_by_agd

__all__ = ["agd", "agd_initializer", "scale_by_agd"]
