"""Who is banned in a pipeline: verifiers found by direction, and what they tell each other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods import trees
from jaxlib_methods.parallel.integrity.verifiers import VerifierState
from jaxlib_methods.parallel.pipelines.base import Pipeline
from jaxlib_methods.parallel.pipelines.hooks import EndStates, HookStates
from jaxlib_methods.parallel.pipelines.layout import SPEC
from jaxlib_methods.parallel.pipelines.mesh import mesh_sizes
from jaxlib_methods.typing import Direction, PyTree

__all__ = [
    "find_verifiers",
    "share_bans",
]


def find_verifiers(pipe: Pipeline, state: PyTree) -> dict[Direction, VerifierState]:
    """The verifiers in the state of a pipeline, each at the receiving end of its boundary.

    Args:
      pipe: with a `verification_hook` in one direction or both, alone or in a chain of hooks.
      state: of the pipeline.

    Returns:
      Direction -> the verifiers [P, D, ...] that watch messages in it; only those that there are.
    """
    found: dict[Any, VerifierState] = {}
    for direction, ends in pipe.hook_states(state)._asdict().items():
        verifiers = trees.find_states(None if ends is None else ends.receiving, VerifierState)
        if verifiers:
            (found[direction],) = verifiers
    return found


def share_bans(pipe: Pipeline, state: PyTree) -> PyTree:
    """Tells the verifiers on both sides of a worker what either of them has decided.

    A worker of a stage is watched by the verifier behind it, for activations, and by the one before it, for gradients;
    in a step neither knows of the other. Without this, a worker that is banned for activations goes on to send bad
    gradients. Call it between steps, as whoever replaces workers would.

    Args:
      pipe: with `verification_hook`s in both directions.
      state: of the pipeline.

    Returns:
      The state; counters of bans are the larger ones.

    Raises:
      ValueError: for a pipeline without verifiers in both directions.
    """
    found = find_verifiers(pipe, state)
    if set(found) != {"forward", "backward"}:
        raise ValueError(f"bans are shared between verifiers of both directions, the pipeline has {sorted(found)}")
    forward, backward = _share(pipe.layout.mesh, found["forward"].bans, found["backward"].bans)

    def told(ends: EndStates, bans: jax.Array) -> EndStates:
        tell = lambda node: node._replace(bans=bans) if _is_verifier(node) else node
        return ends._replace(receiving=jax.tree.map(tell, ends.receiving, is_leaf=_is_verifier))

    hooks = pipe.hook_states(state)
    return pipe.replace_hook_states(state, HookStates(told(hooks.forward, forward), told(hooks.backward, backward)))


def _is_verifier(node: Any) -> bool:
    return isinstance(node, VerifierState)


@functools.partial(jax.jit, static_argnums=0)
def _share(mesh: jax.sharding.Mesh, forward: jax.Array, backward: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Stage j has `forward` of the workers of stage j - 1, and `backward` of those of j + 1; [P, D, R]."""
    stages, _ = mesh_sizes(mesh)

    def run(forward: jax.Array, backward: jax.Array) -> tuple[jax.Array, jax.Array]:
        ahead = jax.lax.ppermute(forward, "stage", [(j, j - 2) for j in range(2, stages)])
        behind = jax.lax.ppermute(backward, "stage", [(j, j + 2) for j in range(stages - 2)])
        return jnp.maximum(forward, behind), jnp.maximum(backward, ahead)

    if stages < 3:  # no worker has a verifier on both sides
        return forward, backward
    return jax.shard_map(run, mesh=mesh, in_specs=SPEC, out_specs=SPEC)(forward, backward)
