"""Pipelines over a mesh of devices, and a model of how long they take over slow links."""

from jaxlib_methods.parallel._collectives import Collective as Collective
from jaxlib_methods.parallel._collectives import collectives as collectives
from jaxlib_methods.parallel._collectives import link_bytes as link_bytes
from jaxlib_methods.parallel._links import LINKS as LINKS
from jaxlib_methods.parallel._links import Link as Link
from jaxlib_methods.parallel._links import StageCosts as StageCosts
from jaxlib_methods.parallel._links import StepTime as StepTime
from jaxlib_methods.parallel._links import all_reduce_time as all_reduce_time
from jaxlib_methods.parallel._links import blocking_floor as blocking_floor
from jaxlib_methods.parallel._links import largest_pipeline as largest_pipeline
from jaxlib_methods.parallel._links import predict_step as predict_step
from jaxlib_methods.parallel._links import stage_costs as stage_costs

__all__ = [
    "LINKS",
    "Collective",
    "Link",
    "StageCosts",
    "StepTime",
    "all_reduce_time",
    "blocking_floor",
    "collectives",
    "largest_pipeline",
    "link_bytes",
    "predict_step",
    "stage_costs",
]
