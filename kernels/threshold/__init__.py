"""Exact selection of the largest scores of a pytree without a sort, on one device or on shards."""

from jaxlib_methods.kernels.threshold.api import keep_largest as keep_largest, num_scores as num_scores
from jaxlib_methods.kernels.threshold.arg_specs import ARG_SPECS as ARG_SPECS

__all__ = ["ARG_SPECS", "keep_largest", "num_scores"]
