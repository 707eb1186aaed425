"""Classifiers on the simplex equiangular tight frame: geometry, the nearest-ETF head, neural-collapse metrics."""

from jaxlib_methods.classifiers._heads import (
    FixedETFHead as FixedETFHead,
    NearestETFHead as NearestETFHead,
    NormalizedHead as NormalizedHead,
    class_sums as class_sums,
    dot_regression_loss as dot_regression_loss,
    normalize_features as normalize_features,
    running_class_means as running_class_means,
    validate_batch as validate_batch,
)
from jaxlib_methods.classifiers._nearest_etf import (
    nearest_etf as nearest_etf,
    nearest_etf_objective as nearest_etf_objective,
)
from jaxlib_methods.classifiers._neural_collapse import (
    ClassStatistics as ClassStatistics,
    collapse_metrics as collapse_metrics,
    cosine_margins as cosine_margins,
    init_class_statistics as init_class_statistics,
    merge_class_statistics as merge_class_statistics,
    nearest_centre_agreement as nearest_centre_agreement,
    neural_collapse as neural_collapse,
    update_class_statistics as update_class_statistics,
)
from jaxlib_methods.classifiers._polar import polar as polar
from jaxlib_methods.classifiers._simplex_etf import (
    centering_matrix as centering_matrix,
    distance_to_nearest_etf as distance_to_nearest_etf,
    etf_weights as etf_weights,
    helmert_basis as helmert_basis,
    simplex_etf as simplex_etf,
)

__all__ = [
    "ClassStatistics",
    "FixedETFHead",
    "NearestETFHead",
    "NormalizedHead",
    "centering_matrix",
    "class_sums",
    "collapse_metrics",
    "cosine_margins",
    "distance_to_nearest_etf",
    "dot_regression_loss",
    "etf_weights",
    "helmert_basis",
    "init_class_statistics",
    "merge_class_statistics",
    "nearest_centre_agreement",
    "nearest_etf",
    "nearest_etf_objective",
    "neural_collapse",
    "normalize_features",
    "polar",
    "running_class_means",
    "simplex_etf",
    "update_class_statistics",
    "validate_batch",
]
