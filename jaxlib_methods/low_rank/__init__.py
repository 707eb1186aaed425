"""Low-rank compression of trained networks, low-rank features, and metrics of how low the rank of their weights is.

    statistics = collect_inputs(lambda tokens: linear_inputs(model, tokens), batches)      # calibration
    params = compress_kernels(params, "attention|mlp", removal=0.2, method="svd_llm", statistics=statistics)

| method | what it keeps | one kernel | a tree of parameters |
| --- | --- | --- | --- |
| truncated SVD | the kernel | `truncated_svd` | `compress_kernels(method="svd")` |
| ASVD | inputs of large size more closely | `asvd` | `compress_kernels(method="asvd")`, `sensitivity_search` |
| SVD-LLM | the outputs on the calibration data | `svd_llm` | `compress_kernels(method="svd_llm")` |

Features instead of weights: `low_rank_penalty` pulls the activations of a layer into one subspace while the network
trains, with a virtual layer whose rank `keep_rank` bounds (`project_rank` every few updates).

`factorize_kernels` gives the factors, which are what is smaller; `stable_rank` and `effective_rank` measure.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.low_rank import (
    compression as compression,
    decompositions as decompositions,
    metrics as metrics,
    search as search,
)
from jaxlib_methods.low_rank._low_rank_features import (
    keep_rank as keep_rank,
    low_rank_penalty as low_rank_penalty,
    project_rank as project_rank,
)
from jaxlib_methods.low_rank.compression import (
    collect_inputs as collect_inputs,
    compress_kernels as compress_kernels,
    factorize_kernels as factorize_kernels,
    linear_inputs as linear_inputs,
)
from jaxlib_methods.low_rank.decompositions import asvd as asvd, svd_llm as svd_llm, truncated_svd as truncated_svd
from jaxlib_methods.low_rank.metrics import effective_rank as effective_rank, stable_rank as stable_rank
from jaxlib_methods.low_rank.search import sensitivity_search as sensitivity_search

__all__ = [
    "asvd",
    "collect_inputs",
    "compress_kernels",
    "effective_rank",
    "factorize_kernels",
    "keep_rank",
    "linear_inputs",
    "low_rank_penalty",
    "project_rank",
    "sensitivity_search",
    "stable_rank",
    "svd_llm",
    "truncated_svd",
]

moved_names(
    __name__,
    {
        "InputStatistics": "low_rank.compression.InputStatistics",
        "LowRank": "low_rank.decompositions.LowRank",
        "rank_for_keep": "low_rank.decompositions.rank_for_keep",
        "whitening_factor": "low_rank.decompositions.whitening_factor",
    },
)
