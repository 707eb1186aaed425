r"""Proximal mean-field (PMF), and its relatives by other projections: projected gradient descent and proximal ICM.

Every weight w_j is a label of a set Q with probabilities u_j on the simplex, w = u q. The proximal step of the paper,

    u^{k+1} = argmin_{u in simplex} eta <g^k, u> - <u^k, u> - H(u) / beta = softmax(beta (u^k - eta g^k)),

is carried out on auxiliary variables x: u = P(beta x), dL/du_l = q_l dL/dw, x <- optimizer step on (dP/dx)^T dL/du, and
beta grows until u is one-hot. P is the softmax (PMF), the Euclidean projection to the simplex (PGD) or the argmax
(PICM, the limit of infinite beta, which for {-1, 1} is BinaryConnect with the clipped straight-through gradient).
"""

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods.quantization import _annealing
from jaxlib_methods.quantization._lattice import Lattice
from jaxlib_methods.quantization._projections import check_jacobian, softmax_projection

Beta = optax.ScalarOrSchedule | int


def proximal_mean_field_step(
    u: jax.Array, g: jax.Array, *, learning_rate: jax.Array | float, beta: jax.Array | float
) -> jax.Array:
    r"""One step of the theory, without auxiliary variables: $u^{k+1} = \mathrm{softmax}(\beta (u^k - \eta g^k))$.

    It is the unique minimiser over the simplex of $\eta \langle g, u \rangle - \langle u^k, u \rangle - H(u) / \beta$.

    Args:
      u: [d, ...], rows on the simplex over the leading axis.
      g: the gradient with respect to u, same shape.
      learning_rate: eta.
      beta: inverse temperature > 0.

    Returns:
      The next u, same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> u = proximal_mean_field_step(jnp.array([0.5, 0.5]), jnp.array([1.0, -1.0]), learning_rate=0.5, beta=2.0)
      >>> [f"{x:.4f}" for x in u]
      ['0.1192', '0.8808']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return softmax_projection(u - jnp.asarray(learning_rate, u.dtype) * g, beta)


def scale_by_proximal_mean_field(
    lattice: Lattice, *, beta: Beta, jacobian: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """The rule of PMF: turns gradients with respect to w (or u) into those of the auxiliary variables.

    With a lattice of projection "tanh" and its exact Jacobian it is GD-tanh, which for two labels is PMF with half the
    state.

    Args:
      lattice: with projection "softmax" or "tanh".
      beta: inverse temperature: a schedule (`inverse_temperature_schedule`) or a constant.
      jacobian: for the softmax "double" (the authors' released code, the default), "single" or "exact"; for tanh
        "exact". See `softmax_projection`.

    Returns:
      A transformation with `AnnealingState`. `params` are the auxiliary variables, of all leaves that the lattice
      quantizes; updates of other leaves pass through. A quantized leaf's gradient has the shape of the weights or of
      its auxiliary variables (with respect to u): wrappers that keep gradients, such as `optax.MultiSteps`, need the
      latter, which differentiating through `project` gives.

    Raises:
      ValueError: another projection, an unknown Jacobian, beta that is not positive or falls; on update, missing
        `params` or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_proximal_mean_field(Lattice(), beta=1.5)
      >>> aux = jnp.array([[0.3], [-0.2]])
      >>> updates, _ = rule.update(jnp.array([0.8]), rule.init(aux), aux)
      >>> [f"{g:.5f}" for g in updates[:, 0]]
      ['-1.00118', '1.31615']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, Algorithm 1 [ajanthan2019proximal].
    """
    _annealing.check_projection("proximal mean-field", lattice, "softmax", "tanh")
    _annealing.check_beta(beta)
    if jacobian is None:
        jacobian = "double" if lattice.projection == "softmax" else "exact"
    check_jacobian(lattice.projection, jacobian)

    of_leaf = lambda labels, x, g, beta: _annealing.pull_back(lattice, jacobian, labels, x, g, beta)
    return _annealing.rule("proximal mean-field", lattice, of_leaf, beta=beta)


def proximal_mean_field(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    beta: Beta,
    jacobian: str | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Proximal mean-field with Adam on the auxiliary variables.

    Args:
      learning_rate: a number or a schedule.
      lattice: with projection "softmax" (or "tanh": GD-tanh).
      beta: inverse temperature, a schedule such as `inverse_temperature_schedule(1.02, 100)`, or a constant.
      jacobian: as in `scale_by_proximal_mean_field`.
      b1, b2, eps: of Adam.
      weight_decay: factor of the L2 term on the auxiliary variables, added before Adam as in the authors' code.

    Returns:
      The optimizer of the auxiliary variables.

    Raises:
      ValueError: as `scale_by_proximal_mean_field`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxlib_methods.quantization import init_auxiliary, inverse_temperature, inverse_temperature_schedule
      >>> from jaxlib_methods.quantization import project, quantize
      >>> target = jnp.array([[1.0, -1.0, -1.0]])
      >>> lattice = Lattice(labels=(-1, 1))
      >>> optimizer = proximal_mean_field(0.1, lattice, beta=inverse_temperature_schedule(1.1, 1))
      >>> aux = init_auxiliary(jax.random.key(0), target, lattice)
      >>> state = optimizer.init(aux)
      >>> for _ in range(20):
      ...     weights = project(aux, lattice, inverse_temperature(state))
      ...     updates, state = optimizer.update(weights - target, state, aux)
      ...     aux = optax.apply_updates(aux, updates)
      >>> quantize(aux, lattice).tolist()
      [[1.0, -1.0, -1.0]]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, Algorithm 1 [ajanthan2019proximal].
    """
    rule = scale_by_proximal_mean_field(lattice, beta=beta, jacobian=jacobian)
    return _annealing.with_adam(rule, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def scale_by_projected_gradient(lattice: Lattice, *, beta: Beta) -> optax.GradientTransformationExtraArgs:
    """The rule of projected gradient descent: PMF with the Euclidean projection to the simplex instead of the softmax.

    Args:
      lattice: with projection "sparsemax".
      beta: inverse temperature: a schedule or a constant.

    Returns:
      A transformation with `AnnealingState`, used as `scale_by_proximal_mean_field`.

    Raises:
      ValueError: as `scale_by_proximal_mean_field`.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_projected_gradient(Lattice(projection="sparsemax"), beta=1.0)
      >>> aux = jnp.array([[0.3, 2.0], [0.9, 0.5]])
      >>> rule.update(jnp.ones(2), rule.init(aux), aux)[0].tolist()  # the second weight is at a corner
      [[-1.0, 0.0], [1.0, 0.0]]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    _annealing.check_projection("projected gradient descent", lattice, "sparsemax")
    _annealing.check_beta(beta)

    of_leaf = lambda labels, x, g, beta: _annealing.pull_back(lattice, "exact", labels, x, g, beta)
    return _annealing.rule("projected gradient descent", lattice, of_leaf, beta=beta)


def projected_gradient(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    beta: Beta,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Projected gradient descent (PGD) on the simplex of labels, with momentum on the auxiliary variables.

    Args:
      learning_rate: a number or a schedule; the authors' is 0.1.
      lattice: with projection "sparsemax".
      beta: inverse temperature, a schedule such as `inverse_temperature_schedule(1.02, 100)`, or a constant.
      momentum: decay of the accumulated gradient.
      weight_decay: factor of the L2 term on the auxiliary variables.

    Returns:
      The optimizer of the auxiliary variables.

    Raises:
      ValueError: as `scale_by_projected_gradient`.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = projected_gradient(0.1, Lattice(projection="sparsemax"), beta=1.0)
      >>> aux = jnp.array([[0.3], [0.9]])
      >>> [f"{x:.2f}" for x in optimizer.update(jnp.ones(1), optimizer.init(aux), aux)[0][:, 0]]
      ['0.10', '-0.10']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return optax.chain(
        scale_by_projected_gradient(lattice, beta=beta),
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_icm(lattice: Lattice) -> optax.GradientTransformationExtraArgs:
    """The rule of proximal ICM: the network sees the best labels, gradients pass where two labels are within 1.

    Args:
      lattice: with projection "argmax" and two labels on every quantized leaf.

    Returns:
      A transformation without state, used as `scale_by_proximal_mean_field`.

    Raises:
      ValueError: as `scale_by_proximal_mean_field`; on update, for a leaf with more than two labels.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_icm(Lattice(projection="argmax"))
      >>> aux = jnp.array([[0.2, -1.0], [0.5, 1.0]])
      >>> rule.update(jnp.ones(2), rule.init(aux), aux)[0].tolist()
      [[-1.0, 0.0], [1.0, 0.0]]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    _annealing.check_projection("ICM", lattice, "argmax")

    of_leaf = lambda labels, x, g, beta: _annealing.pull_back(lattice, "clipped", labels, x, g, beta)
    return _annealing.rule("ICM", lattice, of_leaf)


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
    return _annealing.with_adam(rule, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
