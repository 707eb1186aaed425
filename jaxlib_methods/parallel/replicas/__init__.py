"""What replicas on the data axis exchange: hooks that a pipeline calls after each optimizer step.

All are a `DataHook`: `apply` runs where the axis is bound, in a pipeline, in `jax.shard_map` or in `jax.vmap`.

| method | names | paper |
|---|---|---|
| AsyncMesh, AsyncSPARTA, SPARTA | `sparse_averaging`, `ema_weight_schedule` | [ajanthan2026asyncmesh] |
| federated averaging | `fed_avg` | [mcmahan2017communication] |
| DiLoCo | `diloco`, `outer_sgd` | [douillard2023diloco] |
| streaming DiLoCo | `streaming_diloco` | [douillard2025streaming] |

`replica_mean` is what a model is evaluated with. States are in `averaging` and `local_sgd`.
"""

from jaxlib_methods.parallel.replicas import averaging as averaging, local_sgd as local_sgd
from jaxlib_methods.parallel.replicas.averaging import (
    averaged_per_round as averaged_per_round,
    ema_weight_schedule as ema_weight_schedule,
    replica_mean as replica_mean,
    sparse_averaging as sparse_averaging,
)
from jaxlib_methods.parallel.replicas.local_sgd import (
    diloco as diloco,
    fed_avg as fed_avg,
    outer_sgd as outer_sgd,
    streaming_diloco as streaming_diloco,
)

__all__ = [
    "averaged_per_round",
    "averaging",
    "diloco",
    "ema_weight_schedule",
    "fed_avg",
    "local_sgd",
    "outer_sgd",
    "replica_mean",
    "sparse_averaging",
    "streaming_diloco",
]
