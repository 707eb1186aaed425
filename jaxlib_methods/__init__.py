"""Research methods for compressing, calibrating and distributing networks, and for structured prediction, in JAX."""

from jaxlib_methods._citation import citation as citation
from jaxlib_methods._version import __version__ as __version__

__all__ = ["__version__", "citation"]
