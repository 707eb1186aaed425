"""Transforms of a pipeline while it trains: its snapshots, its replicas and what its hooks remember."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlib_methods.parallel.pipelines.base import Pipeline
from jaxlib_methods.parallel.pipelines.layout import Snapshot
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.parallel.unextractable.momentum import FIRST_MOMENTS, transform_momentum
from jaxlib_methods.parallel.unextractable.morphing import Rules, morph
from jaxlib_methods.parallel.unextractable.transforms import Transform, transpose
from jaxlib_methods.typing import PyTree, SecondMoments

__all__ = [
    "morph_pipeline",
    "morph_snapshot",
]


def morph_snapshot(
    snapshot: Snapshot,
    transforms: Mapping[Hashable, Transform],
    rules: Rules,
    *,
    first_moments: Sequence[str] = FIRST_MOMENTS,
    second_moments: SecondMoments = "error",
) -> Snapshot:
    """Folds transforms into the snapshot of a pipeline: its parameters and its optimizer's first moments.

    `morph_pipeline` does it for all replicas of a running one.

    Args:
      snapshot: of a pipeline; an asynchronous one is drained before.
      transforms: as for `morph`.
      rules: as for `morph`, by the paths "embed/...", "blocks/<number>/..." and "head/...".
      first_moments: as for `transform_momentum`.
      second_moments: as for `transform_momentum`.

    Returns:
      The snapshot from which the pipeline goes on.

    Raises:
      ValueError: as `transform_momentum`.

    Example:
      >>> from jaxlib_methods.parallel.unextractable import Sides, draw_transform
      >>> T = {"b": draw_transform(2, key=jax.random.key(0))}
      >>> one = Snapshot({"embed/V": np.eye(2)}, {"0/trace": {"embed/V": np.eye(2)}}, {}, np.int32(1))
      >>> new = morph_snapshot(one, T, [("^embed/V$", Sides(right="b"))])
      >>> bool(np.allclose(new.params["embed/V"], new.moments["0/trace"]["embed/V"]))  # orthogonal
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    moments = transform_momentum(
        snapshot.moments,
        snapshot.params,
        transforms,
        rules,
        first_moments=first_moments,
        second_moments=second_moments,
    )
    return snapshot._replace(params=morph(snapshot.params, transforms, rules), moments=moments)


def morph_pipeline(
    pipe: Pipeline,
    state: PyTree,
    transforms: Mapping[Hashable, Transform],
    rules: Rules,
    *,
    boundaries: Sequence[Hashable],
    first_moments: Sequence[str] = FIRST_MOMENTS,
    second_moments: SecondMoments = "error",
) -> PyTree:
    r"""Folds transforms into all replicas of a pipeline and into what its hooks remember of messages.

    Activations that were x become x T, and their cotangents $g\, T^{-\top}$: references of verifiers follow them.
    On the data axis, the average drift of the parameters is transformed as they are; averages that are still to come
    are of the old ones and are dropped.

    Args:
      pipe: of the state.
      state: without micro-batches in flight: `drain` an asynchronous pipeline before.
      transforms: as for `morph`; the same for all replicas.
      rules: as for `morph_snapshot`.
      boundaries: the name of the transform at each of the P - 1 boundaries between stages.
      first_moments: as for `transform_momentum`.
      second_moments: as for `transform_momentum`.

    Returns:
      The state to go on with.

    Raises:
      ValueError: as `transform_momentum` and `Pipeline.replace`, and for another number of boundaries.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxlib_methods.parallel import StageModel, make_mesh, synchronous_pipeline
      >>> from jaxlib_methods.parallel.unextractable import Sides, draw_transform
      >>> model = StageModel(lambda E, i: E[i], lambda w, x: x @ w, lambda w, x, y: jnp.mean((x @ w - y) ** 2))
      >>> stages = ({"embed": jnp.ones((5, 2)), "blocks": (jnp.eye(2),), "head": jnp.ones(2)},)
      >>> batch = np.zeros((6, 4), np.int32), np.zeros((6, 4), np.float32)
      >>> pipe = synchronous_pipeline(model, stages, optax.sgd(0.1), make_mesh(1), batch=batch, num_microbatches=1)
      >>> rules = [("^embed$", Sides(right="b")), ("^blocks/0$", Sides(left="b"))]
      >>> state, T = pipe.init(stages), draw_transform(2, key=jax.random.key(0))
      >>> (stage,) = pipe.stages(morph_pipeline(pipe, state, {"b": T}, rules, boundaries=[]))
      >>> bool(np.allclose(stage["embed"] @ stage["blocks"][0], np.ones((5, 2)), atol=1e-6))
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    count = pipe.layout.num_stages - 1
    if len(boundaries) != count:
        raise ValueError(f"boundaries must name the transforms at {count} boundaries of stages, got {len(boundaries)}")
    snapshots = [
        morph_snapshot(
            pipe.snapshot(state, replica),
            transforms,
            rules,
            first_moments=first_moments,
            second_moments=second_moments,
        )
        for replica in range(pipe.layout.num_replicas)
    ]
    state = _morph_hook(pipe, state, transforms, rules)
    crossed = [transforms[name] for name in boundaries if name in transforms]
    if not crossed:
        return pipe.replace(state, snapshots)
    eye = np.eye(crossed[0].matrix.shape[-1])
    at = [transforms.get(name, Transform(eye, eye)) for name in boundaries]
    matrices = np.stack([T.matrix for T in at]), np.stack([transpose(T.inverse) for T in at])
    return pipe.replace(state, snapshots, matrices)


def _morph_hook(pipe: Pipeline, state: PyTree, transforms: Mapping[Hashable, Transform], rules: Rules) -> PyTree:
    """What the hook on the data axis keeps in the shape of the parameters: averages of their drift."""
    layout = pipe.layout

    def morphed(node: Any) -> Any:
        if not isinstance(node, Packed):
            return node
        named = [layout.named(node, replica) for replica in range(layout.num_replicas)]
        new = layout.put_named(*(morph(one, transforms, rules) for one in named))
        return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), new, node)

    hook = jax.tree.map(morphed, state.data_hook, is_leaf=lambda node: isinstance(node, Packed))
    return state._replace(data_hook=hook)
