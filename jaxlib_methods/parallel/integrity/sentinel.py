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

from jaxlib_methods._core import checks
from jaxlib_methods.parallel.integrity.attacks import Attack, AttackState, check_attacks, init_attacks, tamper
from jaxlib_methods.parallel.integrity.distances import expand_reference, message_summary
from jaxlib_methods.parallel.integrity.verification import verify_summaries
from jaxlib_methods.parallel.integrity.verifiers import VerifierConfig, VerifierState, init_verifier
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook, HookInfo
from jaxlib_methods.parallel.pipelines.mesh import mesh_sizes
from jaxlib_methods.parallel.pipelines.stages import StageModel, differentiable
from jaxlib_methods.typing import Direction, PyTree

__all__ = [
    "guard_model",
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
