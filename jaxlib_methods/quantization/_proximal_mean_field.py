r"""Proximal mean-field (PMF), and its relatives by other projections: projected gradient descent and proximal ICM.

Every weight w_j is a label of a set Q with probabilities u_j on the simplex, w = u q. The proximal step of the paper,

    u^{k+1} = argmin_{u in simplex} eta <g^k, u> - <u^k, u> - H(u) / beta = softmax(beta (u^k - eta g^k)),

is carried out on auxiliary variables x: u = P(beta x), dL/du_l = q_l dL/dw, x <- optimizer step on (dP/dx)^T dL/du, and
beta grows until u is one-hot. P is the softmax (PMF), the Euclidean projection to the simplex (PGD) or the argmax
(PICM, the limit of infinite beta, which for {-1, 1} is BinaryConnect with the clipped straight-through gradient).
"""

import jax
import optax

from jaxlib_methods.quantization._adam import with_adam
from jaxlib_methods.quantization.annealing import InverseTemperature
from jaxlib_methods.quantization.lattice import Lattice
from jaxlib_methods.quantization.rules import scale_by_icm, scale_by_projected_gradient, scale_by_proximal_mean_field
from jaxlib_methods.typing import ProjectionJacobian


def proximal_mean_field(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    inverse_temperature: InverseTemperature,
    jacobian: ProjectionJacobian | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Proximal mean-field with Adam on the auxiliary variables.

    Args:
      learning_rate: a number or a schedule.
      lattice: with projection "softmax" (or "tanh": GD-tanh).
      inverse_temperature: a schedule such as `inverse_temperature_schedule(1.02, 100)`, or a constant.
      jacobian: as in `scale_by_proximal_mean_field`.
      b1, b2, eps: of Adam.
      weight_decay: factor of the L2 term on the auxiliary variables, added before Adam as in the authors' code.

    Returns:
      The optimizer of the auxiliary variables.

    Raises:
      ValueError: as `scale_by_proximal_mean_field`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxlib_methods.quantization import init_auxiliary, inverse_temperature_schedule, project, quantize
      >>> from jaxlib_methods.quantization import read_inverse_temperature
      >>> target = jnp.array([[1.0, -1.0, -1.0]])
      >>> lattice = Lattice(labels=(-1, 1))
      >>> optimizer = proximal_mean_field(0.1, lattice, inverse_temperature=inverse_temperature_schedule(1.1, 1))
      >>> aux = init_auxiliary(target, lattice, key=jax.random.key(0))
      >>> state = optimizer.init(aux)
      >>> for _ in range(20):
      ...     weights = project(aux, lattice, read_inverse_temperature(state))
      ...     updates, state = optimizer.update(weights - target, state, aux)
      ...     aux = optax.apply_updates(aux, updates)
      >>> quantize(aux, lattice).tolist()
      [[1.0, -1.0, -1.0]]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, Algorithm 1 [ajanthan2019proximal].
    """
    rule = scale_by_proximal_mean_field(lattice, inverse_temperature=inverse_temperature, jacobian=jacobian)
    return with_adam(rule, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def projected_gradient(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    inverse_temperature: InverseTemperature,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Projected gradient descent (PGD) on the simplex of labels, with momentum on the auxiliary variables.

    Args:
      learning_rate: a number or a schedule; the authors' is 0.1.
      lattice: with projection "sparsemax".
      inverse_temperature: a schedule such as `inverse_temperature_schedule(1.02, 100)`, or a constant.
      momentum: decay of the accumulated gradient.
      weight_decay: factor of the L2 term on the auxiliary variables.

    Returns:
      The optimizer of the auxiliary variables.

    Raises:
      ValueError: as `scale_by_projected_gradient`.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = projected_gradient(0.1, Lattice(projection="sparsemax"), inverse_temperature=1.0)
      >>> aux = jnp.array([[0.3], [0.9]])
      >>> [f"{x:.2f}" for x in optimizer.update(jnp.ones(1), optimizer.init(aux), aux)[0][:, 0]]
      ['0.10', '-0.10']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return optax.chain(
        scale_by_projected_gradient(lattice, inverse_temperature=inverse_temperature),
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def icm(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Proximal iterated conditional modes (PICM) with Adam on the auxiliary variables; no temperature.

    Args:
      learning_rate: a number or a schedule; the authors' is 1e-4.
      lattice: with projection "argmax" and two labels on every quantized leaf.
      b1, b2, eps: of Adam.
      weight_decay: factor of the L2 term on the auxiliary variables.

    Returns:
      The optimizer of the auxiliary variables.

    Raises:
      ValueError: as `scale_by_icm`.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = icm(0.1, Lattice(projection="argmax"))
      >>> aux = jnp.array([[0.2], [0.5]])
      >>> [f"{x:.2f}" for x in optimizer.update(jnp.ones(1), optimizer.init(aux), aux)[0][:, 0]]
      ['0.10', '-0.10']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    rule = scale_by_icm(lattice)
    return with_adam(rule, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
