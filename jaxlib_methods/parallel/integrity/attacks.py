r"""What malicious workers send in place of activations and gradients: pure functions, and plans of who does it when."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.parallel.integrity.tampering import adaptive, invisible_noise, random_sign, random_values
from jaxlib_methods.parallel.integrity.verifiers import VerifierState
from jaxlib_methods.typing import AttackDirection, AttackKind, Direction

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackState",
    "check_attacks",
    "init_attacks",
    "tamper",
]

# Kind of attack -> what its value is, and the value if none is given.
ATTACKS = {
    "constant": ("the value of every entry; NaN and infinity too", 0.0),
    "random": ("1 for the tensor's own mean and deviation, 0 for N(0, 1)", 0.0),
    "scale": ("the factor sigma; -1 flips all signs", -1.0),
    "random_sign": ("the probability that an entry's sign is flipped", 0.5),
    "delay": ("the age in steps", 100),
    "bias": ("what is added", 1.0),
    "invisible_noise": ("the level p of the normal quantile", 0.99),
    "adaptive": ("the share of the fences that is used", 0.9),
}


@dataclasses.dataclass(frozen=True)
class Attack:
    """One malicious worker.

    Args:
      kind: a name of `ATTACKS`.
      stage: whose worker it is, 0-based.
      replica: which of the stage's workers, 0-based.
      direction: "forward" tampers with activations, "backward" with gradients, or "both".
      value: the attack's strength, as `ATTACKS` says; None takes its default.
      start: first step.
      stop: the step after the last one; None: never stops.

    Raises:
      ValueError: for an unknown kind or direction, a value out of range, or steps that are none.

    Example:
      >>> Attack("scale", stage=2, replica=0, value=-1.0).strength
      -1.0

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """

    kind: AttackKind
    stage: int
    replica: int
    direction: AttackDirection = "both"
    value: float | int | None = None
    start: int = 0
    stop: int | None = None

    def __post_init__(self):
        checks.one_of(AttackKind, kind=self.kind)
        checks.one_of(AttackDirection, direction=self.direction)
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(f"an attack needs steps 0 <= start < stop, got start={self.start}, stop={self.stop}")
        value, ok = self.strength, True
        if self.kind == "delay":
            ok = value >= 1 and value == int(value)
        elif self.kind == "random_sign":
            ok = 0 <= value <= 1
        elif self.kind in ("invisible_noise", "adaptive"):
            ok = 0 < value < 1
        if not ok:
            raise ValueError(f"the value of {self.kind!r} is {ATTACKS[self.kind][0]}; {value} is none")

    @property
    def strength(self) -> float | int:
        """The value, or the default of the kind."""
        return ATTACKS[self.kind][1] if self.value is None else self.value

    def acts(self, step: jax.Array) -> jax.Array:
        """Whether the worker tampers with its message in a step; one that delays is honest until it has one to send."""
        first = self.start + (int(self.strength) if self.kind == "delay" else 0)
        return (step >= first) & (True if self.stop is None else step < self.stop)


class AttackState(NamedTuple):
    """What a delaying worker remembers."""

    count: jax.Array  # int32 []: steps
    past: jax.Array  # [longest delay, ...] of the message's dtype: step t in slot t mod delay; length 0 without delays


# ------------------------------------------------------------------------------ the attacks


# ------------------------------------------------------------------------------ plans


def check_attacks(attacks: Sequence[Attack], num_stages: int, num_replicas: int) -> tuple[Attack, ...]:
    """The attacks, if the pipeline has the workers and the boundaries that they name.

    Args:
      attacks: the plan.
      num_stages: S.
      num_replicas: R.

    Returns:
      The plan as a tuple.

    Raises:
      ValueError: for a stage or a replica that does not exist, activations of the last stage, and gradients of the
        first: they cross no boundary. "both" on these means the one that does.

    Example:
      >>> len(check_attacks([Attack("bias", stage=1, replica=3)], num_stages=4, num_replicas=8))
      1
    """
    for attack in attacks:
        for name, size in (("stage", num_stages), ("replica", num_replicas)):
            if not 0 <= getattr(attack, name) < size:
                raise ValueError(
                    f"{attack} is on a {name} that does not exist: the pipeline has {size}, numbered from 0"
                )
        if attack.direction == "forward" and attack.stage == num_stages - 1:
            raise ValueError(f"{attack}: the last stage sends no activations; attack 'backward', or an earlier stage")
        if attack.direction == "backward" and attack.stage == 0:
            raise ValueError(f"{attack}: the first stage sends no gradients; attack 'forward', or a later stage")
    return tuple(attacks)


def init_attacks(attacks: Sequence[Attack], message: jax.Array | jax.ShapeDtypeStruct) -> AttackState:
    """The state of one worker's tampering before the first step.

    Args:
      attacks: the plan; its longest delay makes the memory.
      message: like what the worker sends.

    Returns:
      The state.

    Example:
      >>> init_attacks([Attack("delay", 1, 0, value=7)], jax.ShapeDtypeStruct((2, 3), jnp.float32)).past.shape
      (7, 2, 3)
    """
    longest = max((int(attack.strength) for attack in attacks if attack.kind == "delay"), default=0)
    return AttackState(jnp.zeros((), jnp.int32), jnp.zeros((longest, *message.shape), message.dtype))


def tamper(
    attacks: Sequence[Attack],
    state: AttackState,
    x: jax.Array,
    *,
    key: jax.Array,
    stage: int | jax.Array,
    replica: int | jax.Array,
    direction: Direction,
    banned: bool | jax.Array = False,
    verifier: VerifierState | None = None,
    reduce_axes: Sequence[int] = (0,),
) -> tuple[AttackState, jax.Array]:
    """What the worker (stage, replica) sends in the next step in place of x.

    Stage and replica may be traced, so that one program serves all devices of a mesh.

    Args:
      attacks: the plan.
      state: of `init_attacks`; counts the steps.
      x: the honest message.
      key: typed key of this worker and step.
      stage: of the sender.
      replica: of the sender.
      direction: "forward" or "backward".
      banned: whether the worker has been replaced by an honest one.
      verifier: state of the verifier that will test the message, for adaptive attacks.
      reduce_axes: the verifier's.

    Returns:
      (state, the message).

    Raises:
      ValueError: for an adaptive attack without a verifier.

    Example:
      >>> plan, x = [Attack("scale", stage=1, replica=0, value=-1.0)], jnp.ones(3)
      >>> worker = {"stage": 1, "replica": 0, "direction": "forward"}
      >>> _, sent = tamper(plan, init_attacks(plan, x), x, key=jax.random.key(0), **worker)
      >>> sent.tolist()
      [-1.0, -1.0, -1.0]

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    t, length, sent = state.count, state.past.shape[0], x
    for index, attack in enumerate(attacks):
        if attack.direction not in ("both", direction) or any(
            isinstance(own, int) and own != of for own, of in ((stage, attack.stage), (replica, attack.replica))
        ):
            continue
        active = attack.acts(t) & jnp.logical_not(banned) & (stage == attack.stage) & (replica == attack.replica)
        own = jax.random.fold_in(key, index)
        sent = jnp.where(active, _tampered(attack, state, x, own, verifier, reduce_axes), sent)
    past = state.past.at[t % length].set(x) if length else state.past
    return AttackState(t + 1, past), sent


def _tampered(
    attack: Attack,
    state: AttackState,
    x: jax.Array,
    key: jax.Array,
    verifier: VerifierState | None,
    reduce_axes: Sequence[int],
) -> jax.Array:
    value = attack.strength
    match attack.kind:
        case "constant":
            return jnp.full_like(x, value)
        case "random":
            return random_values(x, key=key, matched=bool(value))
        case "scale":
            return x * value
        case "random_sign":
            return random_sign(x, value, key=key)
        case "delay":
            return state.past[(state.count - int(value)) % state.past.shape[0]]
        case "bias":
            return x + value
        case "invisible_noise":
            return invisible_noise(x, value)
    if verifier is None:
        raise ValueError("an adaptive attack needs the verifier it adapts to; pass verifier=")
    return adaptive(x, verifier, key=key, share=value, reduce_axes=reduce_axes)
