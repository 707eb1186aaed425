"""Training over a mesh of devices and over slow links, in five rooms.

| room | what is in it |
|---|---|
| `pipelines` | GPipe, 1F1B, circular and asynchronous 1F1B; what a step takes over slow links |
| `replicas` | what replicas on the data axis exchange: sparse averaging, FedAvg, DiLoCo, streaming DiLoCo |
| `boundaries` | what crosses a boundary in fewer bytes: lossy codecs, subspace networks |
| `integrity` | who sends what: SENTINEL's verifiers, attacks on pipelines, robust aggregation |
| `unextractable` | weights that nobody can put together: random transforms at the boundaries |

All rooms meet in a pipeline: a codec, a verifier or a transform is a hook or a call between steps. The names that every
program with a pipeline needs stand here too.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.parallel import (
    boundaries as boundaries,
    integrity as integrity,
    pipelines as pipelines,
    replicas as replicas,
    unextractable as unextractable,
)
from jaxlib_methods.parallel.pipelines import (
    StageModel as StageModel,
    asynchronous_pipeline as asynchronous_pipeline,
    join_stages as join_stages,
    make_mesh as make_mesh,
    sequential_loss as sequential_loss,
    shard_batch as shard_batch,
    split_microbatches as split_microbatches,
    split_stages as split_stages,
    synchronous_pipeline as synchronous_pipeline,
)

__all__ = [
    "StageModel",
    "asynchronous_pipeline",
    "boundaries",
    "integrity",
    "join_stages",
    "make_mesh",
    "pipelines",
    "replicas",
    "sequential_loss",
    "shard_batch",
    "split_microbatches",
    "split_stages",
    "synchronous_pipeline",
    "unextractable",
]

moved_names(
    __name__,
    {
        "LINKS": "parallel.pipelines.links.LINKS",
        "AsynchronousState": "parallel.pipelines.asynchronous.AsynchronousState",
        "BoundaryHook": "parallel.pipelines.BoundaryHook",
        "Collective": "parallel.pipelines.communication.Collective",
        "DataHook": "parallel.pipelines.DataHook",
        "DiLoCoState": "parallel.replicas.local_sgd.DiLoCoState",
        "FedAvgState": "parallel.replicas.local_sgd.FedAvgState",
        "HookInfo": "parallel.pipelines.hooks.HookInfo",
        "Link": "parallel.pipelines.links.Link",
        "Losses": "parallel.pipelines.base.Losses",
        "Packed": "parallel.pipelines.packing.Packed",
        "Pipeline": "parallel.pipelines.Pipeline",
        "Snapshot": "parallel.pipelines.layout.Snapshot",
        "SparseAveragingState": "parallel.replicas.averaging.SparseAveragingState",
        "StageCosts": "parallel.pipelines.links.StageCosts",
        "StepTime": "parallel.pipelines.step_time.StepTime",
        "StreamingDiLoCoState": "parallel.replicas.local_sgd.StreamingDiLoCoState",
        "SynchronousState": "parallel.pipelines.synchronous.SynchronousState",
        "all_reduce_time": "parallel.pipelines.links.all_reduce_time",
        "averaged_per_round": "parallel.replicas.averaged_per_round",
        "blocking_floor": "parallel.pipelines.links.blocking_floor",
        "bubble_fraction": "parallel.pipelines.schedules.bubble_fraction",
        "chain_hooks": "parallel.pipelines.chain_hooks",
        "codecs": "parallel.boundaries",
        "collectives": "parallel.pipelines.communication.collectives",
        "diloco": "parallel.replicas.diloco",
        "ema_weight_schedule": "parallel.replicas.ema_weight_schedule",
        "fed_avg": "parallel.replicas.fed_avg",
        "largest_pipeline": "parallel.pipelines.step_time.largest_pipeline",
        "link_bytes": "parallel.pipelines.communication.link_bytes",
        "outer_sgd": "parallel.replicas.outer_sgd",
        "predict_step": "parallel.pipelines.step_time.predict_step",
        "replica_mean": "parallel.replicas.replica_mean",
        "schedule_table": "parallel.pipelines.schedules.schedule_table",
        "sparse_averaging": "parallel.replicas.sparse_averaging",
        "stage_costs": "parallel.pipelines.links.stage_costs",
        "streaming_diloco": "parallel.replicas.streaming_diloco",
    },
)
