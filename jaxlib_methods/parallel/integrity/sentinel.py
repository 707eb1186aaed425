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
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods.parallel.integrity.attacks import Attack, AttackState, check_attacks, init_attacks, tamper
from jaxlib_methods.parallel.integrity.distances import expand_reference, message_summary
from jaxlib_methods.parallel.integrity.verification import (
    VerifierConfig,
    VerifierState,
    init_verifier,
    verify_summaries,
)
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, HookInfo
from jaxlib_methods.parallel.pipelines.layout import SPEC
from jaxlib_methods.parallel.pipelines.mesh import mesh_sizes
from jaxlib_methods.parallel.pipelines.stages import StageModel, differentiable

__all__ = [
    "guard_model",
    "share_bans",
    "verification_hook",
]

PyTree = Any


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
    options: VerifierConfig | None,
    mesh: jax.sharding.Mesh,
    direction: str,
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
      options: of the verifiers; None: there are none, and the attacks go through.
      mesh: of the pipeline.
      direction: "forward" for its `forward_hook`, "backward" for its `backward_hook`.
      key: typed key of the projections, which all verifiers share, and of the attacks.
      attacks: what malicious workers do; the steps of an attack are messages of its worker.

    Returns:
      The hook. Its states hold a `VerifierState` on each device, where `trees.find_states` finds it.

    Raises:
      ValueError: for an unknown direction, and attacks on workers that do not exist.

    Example:
      >>> from jaxlib_methods.parallel import make_mesh
      >>> hook = verification_hook(VerifierConfig(), make_mesh(1), "forward", key=jax.random.key(0))

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    if direction not in ("forward", "backward"):
        raise ValueError(f"direction must be 'forward' or 'backward', got {direction!r}")
    stages, replicas = mesh_sizes(mesh)
    attacks = check_attacks(attacks, stages, replicas)
    from_stage = -1 if direction == "forward" else 1  # the sender, seen from the receiver

    def init(shapes: PyTree) -> tuple[VerifierState | None, AttackState]:
        (x, _), _ = _pair(shapes)
        verifier = None if options is None else init_verifier(options, replicas, x.shape, key)
        return verifier, init_attacks(attacks, x)

    def send(x: PyTree, state: PyTree, info: HookInfo) -> tuple[PyTree, PyTree]:
        return x, state

    def receive(message: PyTree, state: PyTree, info: HookInfo) -> tuple[PyTree, PyTree]:
        ((x, weight), put_back), (verifier, attack) = _pair(message), state
        replica = jax.lax.axis_index("data")
        sender = info.stage + from_stage
        worker = functools.reduce(jax.random.fold_in, (sender, replica, attack.count), key)
        banned = jnp.bool_(False) if verifier is None else verifier.bans[replica] > 0
        attack, x = tamper(
            attacks,
            attack,
            x,
            worker,
            stage=sender,
            replica=replica,
            direction=direction,
            banned=banned,
            verifier=verifier,
            reduce_axes=(0,) if options is None else options.reduce_axes,
        )
        if verifier is not None:
            tainted = weight[0] == 0 if direction == "forward" else weight[0] > 0
            summary = message_summary(x, options.reduce_axes)
            gathered = jax.lax.all_gather((summary, tainted), "data")
            reference = verifier.reference
            verifier, accept = verify_summaries(verifier, *gathered, options)
            accept = accept[replica]
            x = jnp.where(accept, x, expand_reference(reference, x.shape, options.reduce_axes).astype(x.dtype))
            if direction == "backward":
                x = jnp.where(weight[0] == 1, jnp.zeros_like(x), x)
            weight = jnp.where(accept, weight, 0.0 if direction == "forward" else jnp.maximum(weight, 0.5))
        return put_back(x, weight), (verifier, attack)

    def transform(state: PyTree, matrix: jax.Array) -> PyTree:
        verifier, attack = state
        if verifier is not None:
            matrix = matrix.astype(jnp.float32)
            moved = jnp.matmul(verifier.reference, matrix, precision="highest")
            # (x T) (T^-1 w) = x w: the sliced distance is what it was.
            verifier = verifier._replace(reference=moved, projections=jnp.linalg.solve(matrix, verifier.projections))
        return verifier, attack

    return BoundaryHook(init, send, receive, transform)


def share_bans(state: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """Tells the verifiers on both sides of a worker what either of them has decided.

    A worker of a stage is watched by the verifier behind it, for activations, and by the one before it, for gradients;
    in a step neither knows of the other. Without this, who is banned for activations goes on to send bad gradients.
    Call it between steps, as whoever replaces workers would.

    Args:
      state: of a pipeline with `verification_hook`s in both directions.
      mesh: of the pipeline.

    Returns:
      The state; counters of bans are the larger ones.

    Raises:
      ValueError: for a state without verifiers in both directions.

    Example:
      >>> from jaxlib_methods.parallel import make_mesh
      >>> share_bans({}, make_mesh(1))
      Traceback (most recent call last):
      ValueError: bans are shared between verifiers of both directions, and the state has 0 ends of boundaries, not 4
    """
    is_verifier = lambda node: isinstance(node, VerifierState)
    leaves, structure = jax.tree.flatten(state, is_leaf=is_verifier)
    ends = [i for i, leaf in enumerate(leaves) if is_verifier(leaf)]
    if len(ends) != 4:
        raise ValueError(
            "bans are shared between verifiers of both directions, and the state has "
            f"{len(ends)} ends of boundaries, not 4"
        )
    forward, backward = ends[1], ends[3]  # the receiving ends
    bans = _share(mesh, leaves[forward].bans, leaves[backward].bans)
    for end, shared in zip((forward, backward), bans, strict=True):
        leaves[end] = leaves[end]._replace(bans=shared)
    return structure.unflatten(leaves)


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
