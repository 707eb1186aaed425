r"""SENTINEL in a pipeline over a mesh: hooks for its boundaries, and how taint travels.

Taint travels in band. The activations of a guarded model are (x, weight): the weight of each example is 1, and a
verifier that rejects the activations of a micro-batch sets it to 0, which the head multiplies the loss with and hands
back, as 1 - weight, in the cotangent of the weight. So the verifiers of both directions know what follows of a rejected
message, whatever schedule the pipeline runs and however it takes gradients. Attacks touch x alone: verifiers talk to
verifiers. Going back, 1 says that the micro-batch was dropped: its gradient is 0, and verifiers hand on 0 whatever they
receive, or else a second malicious worker could use what nobody tests; 1/2 says that a gradient has been rejected.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.parallel.integrity.attacks import Attack, AttackState, check_attacks, init_attacks, tamper
from jaxlib_methods.parallel.integrity.distances import expand_reference, message_summary
from jaxlib_methods.parallel.integrity.verification import (
    VerifierConfig,
    VerifierState,
    init_verifier,
    verify_summaries,
)
from jaxlib_methods.parallel.pipelines.base import Pipeline
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, EndStates, HookInfo, HookStates
from jaxlib_methods.parallel.pipelines.layout import SPEC
from jaxlib_methods.parallel.pipelines.mesh import mesh_sizes
from jaxlib_methods.parallel.pipelines.stages import StageModel, differentiable
from jaxlib_methods.typing import Direction, PyTree

__all__ = [
    "find_verifiers",
    "guard_model",
    "share_bans",
    "verification_hook",
]


class VerificationState(NamedTuple):
    """State of a `verification_hook` at one end of a boundary, on one device."""

    verifier: VerifierState | None
    attack: AttackState  # of the worker that sends to this device


def guard_model(model: StageModel) -> StageModel:
    """The model with a weight for each example of its activations, which verification needs.

    Args:
      model: with one floating array (B, ..., D) in its activations; integers, such as token ids, are not verified.

    Returns:
      The model on pairs (x, weight (B,)), of the same parameters: the blocks pass the weight through, and the head's
      loss is multiplied by its mean. The cotangent that the head sends for the weight is 1 - weight, no gradient.

    Example:
      >>> model = StageModel(lambda E, i: E[i], lambda w, x: x @ w, lambda w, x, y: jnp.mean((x @ w - y) ** 2))
      >>> x, weight = guard_model(model).embed(jnp.ones((5, 2)), jnp.array([0, 3]))
      >>> float(guard_model(model).head(jnp.ones(2), (x, weight), jnp.zeros(2)))
      4.0
    """

    def embed(params: PyTree, inputs: PyTree) -> tuple[PyTree, jax.Array]:
        x = model.embed(params, inputs)
        moving = next(leaf for leaf in jax.tree.leaves(x) if differentiable(leaf))
        first = moving.reshape(moving.shape[0], -1)[:, 0]
        return x, jnp.where(first == first, jnp.float32(1), jnp.float32(1))  # varies over the mesh as x does

    def block(params: PyTree, x: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        return model.block(params, x[0]), x[1]

    def head(params: PyTree, x: tuple[PyTree, jax.Array], targets: PyTree) -> jax.Array:
        return _weighted(model.head(params, x[0], targets), x[1])

    return StageModel(embed, block, head)


@jax.custom_vjp
def _weighted(loss: jax.Array, weight: jax.Array) -> jax.Array:
    return loss * jnp.mean(weight)


def _weighted_forward(loss: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _weighted(loss, weight), weight


def _weighted_backward(weight: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cotangent * jnp.mean(weight), 1 - weight


_weighted.defvjp(_weighted_forward, _weighted_backward)


def verification_hook(
    config: VerifierConfig | None,
    mesh: jax.sharding.Mesh,
    direction: Direction,
    *,
    key: jax.Array,
    attacks: Sequence[Attack] = (),
) -> BoundaryHook:
    """Verification at every boundary of a pipeline of a `guard_model`, and attacks for it to find.

    The devices of a stage exchange the summaries of what they have received, (N, D) floats each, over the axis "data";
    all come to the same decision. A banned worker's slot goes to an honest newcomer: its attacks stop. Where boundaries
    are transformed, `Pipeline.replace` moves references and projections along: the Wasserstein distances stay as they
    were, the Euclidean ones if the transform is orthogonal. Absolute and sign distances depend on the basis, and honest
    messages can lie beyond fences of an earlier one: leave them out then.

    Args:
      config: of the verifiers; None: there are none, and the attacks go through.
      mesh: of the pipeline.
      direction: "forward" for its `forward_hook`, "backward" for its `backward_hook`.
      key: typed key of the projections, which all verifiers share, and of the attacks.
      attacks: what malicious workers do; the steps of an attack are messages of its worker.

    Returns:
      The hook; `find_verifiers` finds its `VerifierState`s.

    Raises:
      ValueError: for an unknown direction, and attacks on workers that do not exist.

    Example:
      >>> from jaxlib_methods.parallel import make_mesh
      >>> hook = verification_hook(VerifierConfig(), make_mesh(1), "forward", key=jax.random.key(0))

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    checks.one_of(Direction, direction=direction)
    stages, replicas = mesh_sizes(mesh)
    attacks = check_attacks(attacks, stages, replicas)
    from_stage = -1 if direction == "forward" else 1  # the sender, seen from the receiver

    def init(shapes: PyTree) -> VerificationState:
        (x, _), _ = _pair(shapes)
        verifier = None if config is None else init_verifier(config, replicas, x.shape, key=key)
        return VerificationState(verifier, init_attacks(attacks, x))

    def send(x: PyTree, state: VerificationState, info: HookInfo) -> tuple[PyTree, VerificationState]:
        return x, state

    def receive(message: PyTree, state: VerificationState, info: HookInfo) -> tuple[PyTree, VerificationState]:
        ((x, weight), put_back), (verifier, attack) = _pair(message), state
        replica = jax.lax.axis_index("data")
        sender = info.stage + from_stage
        worker = functools.reduce(jax.random.fold_in, (sender, replica, attack.count), key)
        banned = jnp.bool_(False) if verifier is None else verifier.bans[replica] > 0
        attack, x = tamper(
            attacks,
            attack,
            x,
            key=worker,
            stage=sender,
            replica=replica,
            direction=direction,
            banned=banned,
            verifier=verifier,
            reduce_axes=(0,) if config is None else config.reduce_axes,
        )
        if verifier is not None:
            tainted = weight[0] == 0 if direction == "forward" else weight[0] > 0
            summary = message_summary(x, config.reduce_axes)
            gathered = jax.lax.all_gather((summary, tainted), "data")
            reference = verifier.reference
            verifier, accept = verify_summaries(verifier, *gathered, config)
            accept = accept[replica]
            x = jnp.where(accept, x, expand_reference(reference, x.shape, config.reduce_axes).astype(x.dtype))
            if direction == "backward":
                x = jnp.where(weight[0] == 1, jnp.zeros_like(x), x)
            weight = jnp.where(accept, weight, 0.0 if direction == "forward" else jnp.maximum(weight, 0.5))
        return put_back(x, weight), VerificationState(verifier, attack)

    def transform(state: VerificationState, matrix: jax.Array) -> VerificationState:
        if (verifier := state.verifier) is None:
            return state
        matrix = matrix.astype(jnp.float32)
        moved = jnp.matmul(verifier.reference, matrix, precision="highest")
        # (x T) (T^-1 w) = x w: the sliced distance is what it was.
        projections = jnp.linalg.solve(matrix, verifier.projections)
        return state._replace(verifier=verifier._replace(reference=moved, projections=projections))

    return BoundaryHook(init, send, receive, transform)


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


def _pair(tree: PyTree) -> tuple[list[Any], Callable[[Any, Any], PyTree]]:
    """The two floating leaves of a message, and how to put others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if differentiable(leaf)]
    pair = [leaves[i] for i in places]
    if len(pair) != 2 or pair[1].shape != pair[0].shape[:1]:
        raise ValueError(
            f"verification needs activations (x, weight), got {tree}; build the pipeline of guard_model(model)"
        )

    def put_back(x: Any, weight: Any) -> PyTree:
        new = dict(zip(places, (x, weight), strict=True))
        return structure.unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)])

    return pair, put_back
