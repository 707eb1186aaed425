"""Adam on auxiliary variables, as the authors' code has it."""

from typing import Any

import jax
import optax

from jaxlib_methods.typing import PyTree


def with_adam(
    scale_by_rule: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a rule: an L2 term, added before Adam as in the authors' code, Adam, and the learning rate."""
    return optax.chain(
        scale_by_rule,
        optax.add_decayed_weights(weight_decay),
        adam(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam(
    b1: jax.typing.ArrayLike, b2: jax.typing.ArrayLike, eps: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Adam's moments; optax's own needs implicit promotion of its counter, which strict users have switched off."""
    inner = optax.with_extra_args_support(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any) -> tuple[PyTree, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
