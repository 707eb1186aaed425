"""Pipelines over a mesh of devices, and a model of how long they take over slow links."""

from jaxlib_methods.parallel import codecs as codecs, integrity as integrity, unextractable as unextractable
from jaxlib_methods.parallel._asynchronous import (
    AsynchronousState as AsynchronousState,
    asynchronous_pipeline as asynchronous_pipeline,
)
from jaxlib_methods.parallel._collectives import (
    Collective as Collective,
    collectives as collectives,
    link_bytes as link_bytes,
)
from jaxlib_methods.parallel._engine import Traffic as Traffic
from jaxlib_methods.parallel._hooks import (
    BoundaryHook as BoundaryHook,
    DataHook as DataHook,
    HookInfo as HookInfo,
    chain_hooks as chain_hooks,
)
from jaxlib_methods.parallel._layout import Snapshot as Snapshot
from jaxlib_methods.parallel._links import (
    LINKS as LINKS,
    Link as Link,
    StageCosts as StageCosts,
    StepTime as StepTime,
    all_reduce_time as all_reduce_time,
    blocking_floor as blocking_floor,
    largest_pipeline as largest_pipeline,
    predict_step as predict_step,
    stage_costs as stage_costs,
)
from jaxlib_methods.parallel._local_sgd import (
    DiLoCoState as DiLoCoState,
    FedAvgState as FedAvgState,
    StreamingDiLoCoState as StreamingDiLoCoState,
    diloco as diloco,
    fed_avg as fed_avg,
    outer_sgd as outer_sgd,
    streaming_diloco as streaming_diloco,
)
from jaxlib_methods.parallel._mesh import (
    make_mesh as make_mesh,
    shard_batch as shard_batch,
    split_microbatches as split_microbatches,
)
from jaxlib_methods.parallel._packing import Packed as Packed
from jaxlib_methods.parallel._pipeline import Losses as Losses, Pipeline as Pipeline
from jaxlib_methods.parallel._schedules import bubble_fraction as bubble_fraction, schedule_table as schedule_table
from jaxlib_methods.parallel._sparse_averaging import (
    SparseAveragingState as SparseAveragingState,
    averaged_per_round as averaged_per_round,
    ema_weight_schedule as ema_weight_schedule,
    replica_mean as replica_mean,
    sparse_averaging as sparse_averaging,
)
from jaxlib_methods.parallel._stages import (
    StageModel as StageModel,
    join_stages as join_stages,
    sequential_loss as sequential_loss,
    split_stages as split_stages,
)
from jaxlib_methods.parallel._synchronous import (
    SynchronousState as SynchronousState,
    synchronous_pipeline as synchronous_pipeline,
)

__all__ = [
    "LINKS",
    "AsynchronousState",
    "BoundaryHook",
    "Collective",
    "DataHook",
    "DiLoCoState",
    "FedAvgState",
    "HookInfo",
    "Link",
    "Losses",
    "Packed",
    "Pipeline",
    "Snapshot",
    "SparseAveragingState",
    "StageCosts",
    "StageModel",
    "StepTime",
    "StreamingDiLoCoState",
    "SynchronousState",
    "Traffic",
    "all_reduce_time",
    "asynchronous_pipeline",
    "averaged_per_round",
    "blocking_floor",
    "bubble_fraction",
    "chain_hooks",
    "codecs",
    "collectives",
    "diloco",
    "ema_weight_schedule",
    "fed_avg",
    "integrity",
    "join_stages",
    "largest_pipeline",
    "link_bytes",
    "make_mesh",
    "outer_sgd",
    "predict_step",
    "replica_mean",
    "schedule_table",
    "sequential_loss",
    "shard_batch",
    "sparse_averaging",
    "split_microbatches",
    "split_stages",
    "stage_costs",
    "streaming_diloco",
    "synchronous_pipeline",
    "unextractable",
]
