"""SENTINEL with all workers of a pipeline on one device: the protocol, a step at a time."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.parallel.integrity.attacks import Attack, AttackState, check_attacks, init_attacks, tamper
from jaxlib_methods.parallel.integrity.distances import expand_reference, message_summary
from jaxlib_methods.parallel.integrity.sentinel import guard_model
from jaxlib_methods.parallel.integrity.tampering import collude
from jaxlib_methods.parallel.integrity.verification import Judged, judge, learn
from jaxlib_methods.parallel.integrity.verifiers import VerifierConfig, VerifierState, init_verifier
from jaxlib_methods.parallel.pipelines.stages import StageModel, StageTree, run_stage, stage_vjp
from jaxlib_methods.typing import Direction, PyTree

__all__ = [
    "Verdicts",
    "VerifiedPipeline",
    "VerifiedState",
]


class VerifiedState(NamedTuple):
    """Verifiers of S - 1 boundaries, in a leading axis, and attackers: boundary s joins the stages s and s + 1."""

    forward: VerifierState | None  # arrays [S - 1, ...]
    backward: VerifierState | None
    forward_attacks: tuple[tuple[AttackState, ...], ...]  # of each boundary's malicious senders, by replica
    backward_attacks: tuple[tuple[AttackState, ...], ...]


class Verdicts(NamedTuple):
    """What the verifiers said in a step; row s is boundary s."""

    forward: jax.Array  # bool [S - 1, R]: accepted activations, of stage s
    backward: jax.Array  # bool [S - 1, R]: accepted gradients, of stage s + 1


class VerifiedPipeline(NamedTuple):
    """A pipeline of S stages and R replicas on one device, as SENTINEL sees it.

    Args:
      model: the plain one.
      num_replicas: R.
      forward: of the verifiers of activations; None: there are none.
      backward: of gradients.
      attacks: what malicious workers do.
      cascade: whether what is rejected is replaced and its taint handed on. Without, it goes on as it is, and the
        workers that are fed with it are blamed.
      collusion: share q of a stage's malicious workers that all send what the first of them sends, see `collude`.

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """

    model: StageModel
    num_replicas: int
    forward: VerifierConfig | None = VerifierConfig()
    backward: VerifierConfig | None = VerifierConfig(decay=0.8)
    attacks: tuple[Attack, ...] = ()
    cascade: bool = True
    collusion: float | int = 0

    def init(self, stages: Sequence[StageTree], inputs: PyTree, *, key: jax.Array) -> VerifiedState:
        """The state before the first step.

        Args:
          stages: the trees of the stages.
          inputs: of one replica's micro-batch, (B, ...), or their shapes.
          key: typed key of the projections.

        Raises:
          ValueError: for attacks on workers that do not exist.
        """
        check_attacks(self.attacks, len(stages), self.num_replicas)
        whole = {"embed": stages[0]["embed"], "blocks": ()}
        x = jax.eval_shape(lambda inputs: run_stage(self.model, whole, inputs), inputs)
        stack = lambda tree, *sizes: jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*sizes, *leaf.shape)), tree)
        count = len(stages) - 1
        verifiers = lambda config: (
            None if config is None else stack(init_verifier(config, self.num_replicas, x.shape, key=key), count)
        )
        attackers = lambda direction, first: tuple(
            tuple(init_attacks(plan, x) for plan in self.plans(s + first, direction).values()) for s in range(count)
        )
        return VerifiedState(
            verifiers(self.forward), verifiers(self.backward), attackers("forward", 0), attackers("backward", 1)
        )

    def plans(self, stage: int, direction: Direction) -> dict[int, list[Attack]]:
        """What each malicious worker of a stage does to what it sends in a direction, by replica."""
        here = [a for a in self.attacks if a.stage == stage and a.direction in ("both", direction)]
        return {r: [a for a in here if a.replica == r] for r in sorted({a.replica for a in here})}

    def value_and_grad(
        self, stages: Sequence[StageTree], inputs: PyTree, targets: PyTree, state: VerifiedState, *, key: jax.Array
    ) -> tuple[jax.Array, list[StageTree], VerifiedState, Verdicts]:
        """Losses and gradients of one micro-batch a replica; to be jitted.

        Args:
          stages: the trees of the stages.
          inputs: (R, B, ...).
          targets: (R, B, ...).
          state: of `init`.
          key: typed key of the step, for the attacks.

        Returns:
          (losses (R,), 0 for what was rejected on its way; gradients of the stages, (R, ...) each, to be averaged or
          aggregated by a robust rule such as `multi_krum`; state; verdicts).
        """
        S, model = len(stages), guard_model(self.model)
        forward = _Boundaries(self, "forward", state.forward, state.forward_attacks, key)
        backward = _Boundaries(self, "backward", state.backward, state.backward_attacks, key)
        banned = [self._banned(state, s) for s in range(S)]
        kept = [inputs]
        for s in range(S - 1):
            x, weight = jax.vmap(lambda x, stage=stages[s]: run_stage(model, stage, x))(kept[-1])
            x, taint = forward.cross(s, s, x, weight[:, 0] == 0, banned[s])
            kept.append((x, jnp.where(taint[:, None], jnp.float32(0), weight)))
        vjp = lambda stage: jax.vmap(lambda x, y, cotangent: stage_vjp(model, stage, x, y, cotangent))
        last = jax.vmap(lambda x, y: stage_vjp(model, stages[-1], x, y, None))
        losses, gradient, cotangent = last(kept[-1], targets)
        gradients = [gradient]
        for s in reversed(range(S - 1)):
            g, weight = cotangent
            g, taint = backward.cross(s, s + 1, g, weight[:, 0] > 0, banned[s + 1])
            g = jnp.where((weight[:, 0] == 1).reshape(-1, *(1,) * (g.ndim - 1)), jnp.zeros_like(g), g)
            weight = jnp.where(taint[:, None], jnp.maximum(weight, 0.5), weight)
            _, gradient, cotangent = vjp(stages[s])(kept[s], targets, [g, weight])
            gradients.append(gradient)
        verdicts = Verdicts(forward.accepted(), backward.accepted())
        state = VerifiedState(forward.learned(), backward.learned(), forward.tampered(), backward.tampered())
        return losses, gradients[::-1], state, verdicts

    def _banned(self, state: VerifiedState, stage: int) -> jax.Array:
        """Whether the verifier behind or before a stage has banned its worker: a newcomer is honest."""
        bans = jnp.zeros(self.num_replicas, jnp.int32)
        if state.forward is not None and stage < state.forward.bans.shape[0]:
            bans += state.forward.bans[stage]
        if state.backward is not None and stage > 0:
            bans += state.backward.bans[stage - 1]
        return bans > 0


class _Boundaries:
    """The boundaries in one direction, crossed one after the other; what was learned is put together at the end."""

    def __init__(
        self,
        pipeline: VerifiedPipeline,
        direction: Direction,
        verifiers: VerifierState | None,
        attacks: tuple[tuple[AttackState, ...], ...],
        key: jax.Array,
    ):
        self.pipeline, self.direction, self.verifiers, self.attacks = pipeline, direction, verifiers, attacks
        self.config = getattr(pipeline, direction)
        self.key = jax.random.fold_in(key, direction == "backward")
        self.seen: dict[int, tuple[tuple[AttackState, ...], Judged, jax.Array]] = {}

    def cross(
        self, boundary: int, sender: int, x: jax.Array, taint: jax.Array, banned: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Messages (R, B, ...) as they leave a boundary, and the taint of their micro-batches."""
        at = functools.partial(jax.tree.map, lambda leaf: leaf[boundary])
        verifier, key = at(self.verifiers), jax.random.fold_in(self.key, boundary)
        axes = (0,) if self.config is None else self.config.reduce_axes
        attackers, acting = [], jnp.zeros(self.pipeline.num_replicas, bool)
        for (replica, plan), attacker in zip(
            self.pipeline.plans(sender, self.direction).items(), self.attacks[boundary], strict=True
        ):
            for attack in plan:
                acting = acting.at[replica].max(attack.acts(attacker.count))
            attacker, sent = tamper(
                self.pipeline.attacks,
                attacker,
                x[replica],
                key=jax.random.fold_in(key, replica),
                stage=sender,
                replica=replica,
                direction=self.direction,
                banned=banned[replica],
                verifier=verifier,
                reduce_axes=axes,
            )
            attackers.append(attacker)
            x = x.at[replica].set(sent)
        if self.pipeline.collusion:
            x = collude(x, acting & ~banned, self.pipeline.collusion)
        if verifier is None:
            accept = jnp.ones(self.pipeline.num_replicas, bool)
            judged = Judged(x, x, ~accept)
        else:
            summaries = jax.vmap(lambda message: message_summary(message, axes))(x)
            judged = judge(verifier, summaries, taint, self.config)
        self.seen[boundary] = tuple(attackers), judged, taint
        if verifier is None or not self.pipeline.cascade:
            return x, jnp.zeros_like(taint)
        replacement = expand_reference(verifier.reference, x.shape[1:], axes).astype(x.dtype)
        rejected = judged.rejected
        return jnp.where(rejected.reshape(-1, *(1,) * (x.ndim - 1)), replacement[None], x), taint | rejected

    def accepted(self) -> jax.Array:
        return jnp.stack([~self.seen[s][1].rejected for s in range(len(self.seen))])

    def tampered(self) -> tuple[tuple[AttackState, ...], ...]:
        return tuple(self.seen[s][0] for s in range(len(self.seen)))

    def learned(self) -> VerifierState | None:
        if self.verifiers is None:
            return None
        judged, taint = _stack([self.seen[s][1:] for s in range(len(self.seen))])
        return jax.vmap(lambda state, judged, taint: learn(state, judged, taint, self.config))(
            self.verifiers, judged, taint
        )


def _stack(items: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)
