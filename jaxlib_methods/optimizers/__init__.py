"""Optimizers: optax gradient transformations, each as the rule `scale_by_x` and as the alias `x`.

| method | here | building blocks in |
|---|---|---|
| NuMuon: Muon with a budget on the nuclear norm of its step | `numuon` | `nuclear_norm`, `block_krylov`, `schedules` |
| Nesterov's method for asynchronous pipelines | `delayed_nesterov`, `nadam` | `nesterov`, `discounted`, `schedules` |
| the same without weight stashing, and PipeMare | `no_stash_nesterov`, `pipemare` | `no_stash` |
| delays, simulated around any optax chain; corrections | | `delays`, `delay_corrections` |
| GeoPrecGD on a reduced objective | `geoprec_gd`, `reduced_objective` | `reduction`, `geoprec`, `curvature` |
| automatic gradient descent | `agd`, `scale_by_agd`, `agd_initializer` | |
| AdamW that keeps matrices in a subspace | `row_shared_adamw` | `row_shared` |

The building blocks are public submodules, as in `optimizers.delays.keep_param_history`.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.optimizers import (
    block_krylov as block_krylov,
    curvature as curvature,
    delay_corrections as delay_corrections,
    delays as delays,
    discounted as discounted,
    schedules as schedules,
)
from jaxlib_methods.optimizers._agd import agd as agd, agd_initializer as agd_initializer, scale_by_agd as scale_by_agd
from jaxlib_methods.optimizers.block_krylov import BlockKrylovConfig as BlockKrylovConfig
from jaxlib_methods.optimizers.geoprec import geoprec_gd as geoprec_gd
from jaxlib_methods.optimizers.muon import numuon as numuon, scale_by_numuon as scale_by_numuon
from jaxlib_methods.optimizers.nesterov import (
    delayed_nesterov as delayed_nesterov,
    nadam as nadam,
    no_stash_nesterov as no_stash_nesterov,
)
from jaxlib_methods.optimizers.no_stash import pipemare as pipemare
from jaxlib_methods.optimizers.reduction import reduced_objective as reduced_objective
from jaxlib_methods.optimizers.row_shared import row_shared_adamw as row_shared_adamw

__all__ = [
    "BlockKrylovConfig",
    "agd",
    "agd_initializer",
    "delayed_nesterov",
    "delays",
    "geoprec_gd",
    "nadam",
    "no_stash_nesterov",
    "numuon",
    "pipemare",
    "reduced_objective",
    "row_shared_adamw",
    "scale_by_agd",
    "scale_by_numuon",
    "schedules",
]

moved_names(
    __name__,
    {
        "DelayCompensationState": "optimizers.delay_corrections.DelayCompensationState",
        "DelayGradientsState": "optimizers.delays.DelayGradientsState",
        "DiscrepancyCorrectionState": "optimizers.no_stash.DiscrepancyCorrectionState",
        "ForecastGradientsState": "optimizers.delay_corrections.ForecastGradientsState",
        "NuMuonState": "optimizers.muon.NuMuonState",
        "ParamHistoryState": "optimizers.delays.ParamHistoryState",
        "PullbackMetricState": "optimizers.geoprec.PullbackMetricState",
        "ReducedCurvature": "optimizers.curvature.ReducedCurvature",
        "ScaleByDelayState": "optimizers.no_stash.ScaleByDelayState",
        "ScaleByDiscountedNesterovState": "optimizers.discounted.ScaleByDiscountedNesterovState",
        "ScaleByNadamState": "optimizers.nesterov.ScaleByNadamState",
        "ScaleByRowSharedAdamState": "optimizers.row_shared.ScaleByRowSharedAdamState",
        "argmin_mapping": "optimizers.reduction.argmin_mapping",
        "block_krylov_svd": "optimizers.block_krylov.block_krylov_svd",
        "clip_by_group_norm": "optimizers.delays.clip_by_group_norm",
        "cosine_rank_schedule": "optimizers.schedules.cosine_rank_schedule",
        "delay_compensation": "optimizers.delay_corrections.delay_compensation",
        "delay_gradients": "optimizers.delays.delay_gradients",
        "delay_memory": "optimizers.delays.delay_memory",
        "discounted_nesterov": "optimizers.discounted.discounted_nesterov",
        "discrepancy_corrected": "optimizers.no_stash.discrepancy_corrected",
        "discrepancy_correction": "optimizers.no_stash.discrepancy_correction",
        "forecast_gradients": "optimizers.delay_corrections.forecast_gradients",
        "forecast_weights": "optimizers.delay_corrections.forecast_weights",
        "keep_param_history": "optimizers.delays.keep_param_history",
        "mixed_versions": "optimizers.no_stash.mixed_versions",
        "momentum_schedule": "optimizers.schedules.momentum_schedule",
        "nuclear_norm_lmo": "optimizers.nuclear_norm.nuclear_norm_lmo",
        "piecewise_rank_schedule": "optimizers.schedules.piecewise_rank_schedule",
        "pipeline_delays": "optimizers.delays.pipeline_delays",
        "project_rows": "optimizers.row_shared.project_rows",
        "pullback_metric": "optimizers.geoprec.pullback_metric",
        "reduced_curvature": "optimizers.curvature.reduced_curvature",
        "scale_by_delay": "optimizers.no_stash.scale_by_delay",
        "scale_by_discounted_nesterov": "optimizers.discounted.scale_by_discounted_nesterov",
        "scale_by_nadam": "optimizers.nesterov.scale_by_nadam",
        "scale_by_pullback_metric": "optimizers.geoprec.scale_by_pullback_metric",
        "scale_by_row_shared_adam": "optimizers.row_shared.scale_by_row_shared_adam",
        "small_slope": "optimizers.reduction.small_slope",
        "stale_params": "optimizers.delays.stale_params",
        "theory_momentum": "optimizers.schedules.theory_momentum",
    },
)
