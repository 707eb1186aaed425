r"""Mirror descent for quantization: P is the inverse mirror map, projected weights are primal, auxiliary ones dual.

    grad Phi = P_beta^{-1};   grad Phi(x_{k+1}) = grad Phi(x_k) - eta g_k,   g_k = dL/dx at x_k

Literal form: the primal variable is stored and moved by the closed forms of `quantization.steps`; raising beta
lengthens its steps. Stable form (-S): the dual variable is stored, w = P_beta(x), x' = x - eta g without a Jacobian;
raising beta sharpens w. The two coincide while beta is constant. With Adam, -eta g is Adam's step on the moments of the
primal gradient.
"""

import jax
import optax

from jaxlib_methods.quantization._adam import adam, with_adam
from jaxlib_methods.quantization.annealing import InverseTemperature
from jaxlib_methods.quantization.lattice import Lattice
from jaxlib_methods.quantization.rules import lift_gradients, scale_by_mirror_descent, scale_by_stable_mirror_descent


def mirror_descent(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    inverse_temperature: InverseTemperature,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Literal mirror descent (MD-tanh, MD-softmax) with Adam's moments of the primal gradient.

    Args:
      learning_rate: a number or a schedule.
      lattice: with projection "tanh" (two labels) or "softmax".
      inverse_temperature: a schedule such as `inverse_temperature_schedule(1.02, 100)`, or a constant.
      b1, b2, eps: of Adam.
      weight_decay: factor of an L2 term on the primal variables.

    Returns:
      The optimizer of the primal variables `auxiliary_to_primal(init_auxiliary(...), lattice)`; the network's weights
      are `primal_to_weights(primal, lattice)`.

    Raises:
      ValueError: as `scale_by_mirror_descent`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxlib_methods.quantization.auxiliary import primal_to_weights, quantize
      >>> lattice, target = Lattice(), jnp.array([1.0, -1.0, -1.0])
      >>> optimizer = mirror_descent(0.1, lattice, inverse_temperature=2.0)
      >>> u = jnp.full((2, 3), 0.5)
      >>> state = optimizer.init(u)
      >>> for _ in range(20):
      ...     updates, state = optimizer.update(primal_to_weights(u, lattice) - target, state, u)
      ...     u = optax.apply_updates(u, updates)
      >>> quantize(u, lattice).tolist()
      [1.0, -1.0, -1.0]

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    return optax.chain(
        lift_gradients(lattice),
        optax.add_decayed_weights(weight_decay),
        adam(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
        scale_by_mirror_descent(lattice, inverse_temperature=inverse_temperature),
    )


def stable_mirror_descent(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    inverse_temperature: InverseTemperature,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Mirror descent in the stable form (MD-tanh-S, MD-softmax-S) with Adam's moments of the primal gradient.

    Args:
      learning_rate: a number or a schedule.
      lattice: with projection "tanh" (any label set) or "softmax".
      inverse_temperature: a schedule such as `inverse_temperature_schedule(1.02, 200, maximum=1e35)`.
      b1, b2, eps: of Adam.
      weight_decay: factor of an L2 term on the dual variables; the papers use none.

    Returns:
      The optimizer of the auxiliary variables.

    Raises:
      ValueError: as `scale_by_stable_mirror_descent`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxlib_methods.quantization import inverse_temperature_schedule, project, quantize
      >>> from jaxlib_methods.quantization import read_inverse_temperature
      >>> lattice, target = Lattice((-1, 0, 1), projection="tanh"), jnp.array([1.0, 0.0, -1.0])
      >>> annealed = inverse_temperature_schedule(1.3, 1, maximum=1e35)
      >>> optimizer = stable_mirror_descent(0.1, lattice, inverse_temperature=annealed)
      >>> aux = jnp.array([-0.1, 0.2, 0.3])
      >>> state = optimizer.init(aux)
      >>> for _ in range(40):
      ...     weights = project(aux, lattice, read_inverse_temperature(state))
      ...     updates, state = optimizer.update(weights - target, state, aux)
      ...     aux = optax.apply_updates(aux, updates)
      >>> quantize(aux, lattice).tolist()
      [1.0, 0.0, -1.0]

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    rule = scale_by_stable_mirror_descent(lattice, inverse_temperature=inverse_temperature)
    return with_adam(rule, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
