"""Pipelines over a ("stage", "data") mesh, and a model of how long they take over slow links.

A model is cut into stages (`split_stages`), each device of a mesh holds one (`make_mesh`), and micro-batches pass
through them (`shard_batch`). What crosses a boundary goes through hooks, and so does what replicas exchange.

| method | names | paper |
|---|---|---|
| GPipe, 1F1B, circular 1F1B | `synchronous_pipeline` | [huang2019gpipe], [narayanan2021efficient] |
| asynchronous 1F1B, with or without weight stashing | `asynchronous_pipeline` | [narayanan2019pipedream] |
| | its delays of exactly P - 1 - j updates | [ajanthan2025nesterov] |
| step time over links, bytes of a compiled program | `step_time`, `links`, `communication` | [ramasinghe2025protocol] |
"""

from jaxlib_methods.parallel.pipelines import communication as communication, links as links, step_time as step_time
from jaxlib_methods.parallel.pipelines.asynchronous import asynchronous_pipeline as asynchronous_pipeline
from jaxlib_methods.parallel.pipelines.base import Pipeline as Pipeline
from jaxlib_methods.parallel.pipelines.hooks import (
    BoundaryHook as BoundaryHook,
    DataHook as DataHook,
    chain_hooks as chain_hooks,
)
from jaxlib_methods.parallel.pipelines.mesh import (
    make_mesh as make_mesh,
    shard_batch as shard_batch,
    split_microbatches as split_microbatches,
)
from jaxlib_methods.parallel.pipelines.stages import (
    StageModel as StageModel,
    join_stages as join_stages,
    sequential_loss as sequential_loss,
    split_stages as split_stages,
)
from jaxlib_methods.parallel.pipelines.synchronous import synchronous_pipeline as synchronous_pipeline

__all__ = [
    "BoundaryHook",
    "DataHook",
    "Pipeline",
    "StageModel",
    "asynchronous_pipeline",
    "chain_hooks",
    "communication",
    "join_stages",
    "links",
    "make_mesh",
    "sequential_loss",
    "shard_batch",
    "split_microbatches",
    "split_stages",
    "synchronous_pipeline",
]
