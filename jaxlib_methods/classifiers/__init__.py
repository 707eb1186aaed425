"""Classifiers on the simplex equiangular tight frame: geometry, the nearest-ETF head, neural-collapse metrics.

| method | here | building blocks in |
|---|---|---|
| head on the simplex ETF nearest to the class means | `NearestETFHead`, `nearest_etf`, `polar` | `class_means` |
| its baselines: a fixed frame, unit rows | `FixedETFHead`, `NormalizedHead`, `dot_regression_loss` | |
| geometry of the simplex ETF | `simplex_etf`, `etf_weights` | `simplex` |
| neural-collapse metrics of a classifier | `neural_collapse` | `collapse`, `class_statistics` |

The building blocks are public submodules, as in `classifiers.collapse.cosine_margins`.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.classifiers._heads import (
    FixedETFHead as FixedETFHead,
    NearestETFHead as NearestETFHead,
    NormalizedHead as NormalizedHead,
    dot_regression_loss as dot_regression_loss,
)
from jaxlib_methods.classifiers._nearest_etf import (
    nearest_etf as nearest_etf,
    nearest_etf_objective as nearest_etf_objective,
)
from jaxlib_methods.classifiers._polar import polar as polar
from jaxlib_methods.classifiers.class_means import validate_batch as validate_batch
from jaxlib_methods.classifiers.collapse import neural_collapse as neural_collapse
from jaxlib_methods.classifiers.simplex import etf_weights as etf_weights, simplex_etf as simplex_etf

__all__ = [
    "FixedETFHead",
    "NearestETFHead",
    "NormalizedHead",
    "dot_regression_loss",
    "etf_weights",
    "nearest_etf",
    "nearest_etf_objective",
    "neural_collapse",
    "polar",
    "simplex_etf",
    "validate_batch",
]

moved_names(
    __name__,
    {
        "ClassStatistics": "classifiers.class_statistics.ClassStatistics",
        "centering_matrix": "classifiers.simplex.centering_matrix",
        "class_sums": "classifiers.class_means.class_sums",
        "collapse_metrics": "classifiers.collapse.collapse_metrics",
        "cosine_margins": "classifiers.collapse.cosine_margins",
        "distance_to_nearest_etf": "classifiers.simplex.distance_to_nearest_etf",
        "helmert_basis": "classifiers.simplex.helmert_basis",
        "init_class_statistics": "classifiers.class_statistics.init_class_statistics",
        "merge_class_statistics": "classifiers.class_statistics.merge_class_statistics",
        "nearest_centre_agreement": "classifiers.collapse.nearest_centre_agreement",
        "normalize_features": "classifiers.class_means.normalize_features",
        "running_class_means": "classifiers.class_means.running_class_means",
        "update_class_statistics": "classifiers.class_statistics.update_class_statistics",
    },
)
