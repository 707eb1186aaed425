"""Accelerated inner loops, each beside a plain `jax.numpy` reference. Imported as `jaxlib_methods.kernels`."""

from jaxlib_methods.kernels._arg_spec import ArgSpec as ArgSpec
from jaxlib_methods.kernels._cost import Cost as Cost

__all__ = ["ArgSpec", "Cost"]
