"""Low-rank compression of trained networks, and metrics of how low the rank of their weights is.

`truncated_svd`, `asvd` and `svd_llm` work on one kernel; `compress_kernels` on a tree of parameters, with path rules
and what `collect_inputs` has gathered over calibration batches.
"""

from jaxlib_methods.low_rank.compression import (
    InputStatistics as InputStatistics,
    collect_inputs as collect_inputs,
    compress_kernels as compress_kernels,
    factorize_kernels as factorize_kernels,
    linear_inputs as linear_inputs,
    sensitivity_search as sensitivity_search,
)
from jaxlib_methods.low_rank.decompositions import (
    LowRank as LowRank,
    asvd as asvd,
    rank_for_keep as rank_for_keep,
    svd_llm as svd_llm,
    truncated_svd as truncated_svd,
    whitening_factor as whitening_factor,
)
from jaxlib_methods.low_rank.metrics import effective_rank as effective_rank, stable_rank as stable_rank

__all__ = [
    "InputStatistics",
    "LowRank",
    "asvd",
    "collect_inputs",
    "compress_kernels",
    "effective_rank",
    "factorize_kernels",
    "linear_inputs",
    "rank_for_keep",
    "sensitivity_search",
    "stable_rank",
    "svd_llm",
    "truncated_svd",
    "whitening_factor",
]
