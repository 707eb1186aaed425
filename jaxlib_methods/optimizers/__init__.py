"""Optimizers: optax gradient transformations, each as the rule `scale_by_x` and as the alias `x`."""

from jaxlib_methods.optimizers._agd import agd as agd, agd_initializer as agd_initializer, scale_by_agd as scale_by_agd
from jaxlib_methods.optimizers._block_krylov import block_krylov_svd as block_krylov_svd
from jaxlib_methods.optimizers._delay_corrections import (
    DelayCompensationState as DelayCompensationState,
    ForecastGradientsState as ForecastGradientsState,
    delay_compensation as delay_compensation,
    forecast_gradients as forecast_gradients,
    forecast_weights as forecast_weights,
)
from jaxlib_methods.optimizers._delays import (
    DelayGradientsState as DelayGradientsState,
    ParamHistoryState as ParamHistoryState,
    clip_by_group_norm as clip_by_group_norm,
    delay_gradients as delay_gradients,
    delay_memory as delay_memory,
    keep_param_history as keep_param_history,
    mixed_versions as mixed_versions,
    pipeline_delays as pipeline_delays,
    stale_params as stale_params,
)
from jaxlib_methods.optimizers._geoprec_gd import (
    PullbackMetricState as PullbackMetricState,
    geoprec_gd as geoprec_gd,
    pullback_metric as pullback_metric,
    scale_by_pullback_metric as scale_by_pullback_metric,
)
from jaxlib_methods.optimizers._nadam import (
    ScaleByDiscountedNesterovState as ScaleByDiscountedNesterovState,
    ScaleByNadamState as ScaleByNadamState,
    delayed_nesterov as delayed_nesterov,
    discounted_nesterov as discounted_nesterov,
    momentum_schedule as momentum_schedule,
    nadam as nadam,
    scale_by_discounted_nesterov as scale_by_discounted_nesterov,
    scale_by_nadam as scale_by_nadam,
    theory_momentum as theory_momentum,
)
from jaxlib_methods.optimizers._no_stash import (
    DiscrepancyCorrectionState as DiscrepancyCorrectionState,
    ScaleByDelayState as ScaleByDelayState,
    discrepancy_corrected as discrepancy_corrected,
    discrepancy_correction as discrepancy_correction,
    no_stash_nesterov as no_stash_nesterov,
    pipemare as pipemare,
    scale_by_delay as scale_by_delay,
)
from jaxlib_methods.optimizers._nuclear_norm import nuclear_norm_lmo as nuclear_norm_lmo
from jaxlib_methods.optimizers._numuon import (
    NuMuonState as NuMuonState,
    numuon as numuon,
    scale_by_numuon as scale_by_numuon,
)
from jaxlib_methods.optimizers._rank_schedules import (
    cosine_rank_schedule as cosine_rank_schedule,
    piecewise_rank_schedule as piecewise_rank_schedule,
)
from jaxlib_methods.optimizers._reduction_curvature import (
    ReducedCurvature as ReducedCurvature,
    reduced_curvature as reduced_curvature,
)
from jaxlib_methods.optimizers._reduction_mappings import (
    argmin_mapping as argmin_mapping,
    reduced_objective as reduced_objective,
    small_slope as small_slope,
)
from jaxlib_methods.optimizers._row_shared_adam import (
    ScaleByRowSharedAdamState as ScaleByRowSharedAdamState,
    project_rows as project_rows,
    row_shared_adamw as row_shared_adamw,
    scale_by_row_shared_adam as scale_by_row_shared_adam,
)

__all__ = [
    "DelayCompensationState",
    "DelayGradientsState",
    "DiscrepancyCorrectionState",
    "ForecastGradientsState",
    "NuMuonState",
    "ParamHistoryState",
    "PullbackMetricState",
    "ReducedCurvature",
    "ScaleByDelayState",
    "ScaleByDiscountedNesterovState",
    "ScaleByNadamState",
    "ScaleByRowSharedAdamState",
    "agd",
    "agd_initializer",
    "argmin_mapping",
    "block_krylov_svd",
    "clip_by_group_norm",
    "cosine_rank_schedule",
    "delay_compensation",
    "delay_gradients",
    "delay_memory",
    "delayed_nesterov",
    "discounted_nesterov",
    "discrepancy_corrected",
    "discrepancy_correction",
    "forecast_gradients",
    "forecast_weights",
    "geoprec_gd",
    "keep_param_history",
    "mixed_versions",
    "momentum_schedule",
    "nadam",
    "no_stash_nesterov",
    "nuclear_norm_lmo",
    "numuon",
    "piecewise_rank_schedule",
    "pipeline_delays",
    "pipemare",
    "project_rows",
    "pullback_metric",
    "reduced_curvature",
    "reduced_objective",
    "row_shared_adamw",
    "scale_by_agd",
    "scale_by_delay",
    "scale_by_discounted_nesterov",
    "scale_by_nadam",
    "scale_by_numuon",
    "scale_by_pullback_metric",
    "scale_by_row_shared_adam",
    "small_slope",
    "stale_params",
    "theory_momentum",
]
