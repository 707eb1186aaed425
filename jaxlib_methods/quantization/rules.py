r"""The rules of all methods as links of an `optax.chain`, from gradients of the weights to steps of what is trained.

A quantized leaf's gradient has the shape of the weights or of its auxiliary variables; the rules lift the former,
dL/du_l = q_l dL/dw, and apply their projection's Jacobian, (dP/dx)^T dL/du, or in mirror descent none.
"""

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core.dtypes import widen
from jaxlib_methods.quantization._leaf_rules import change_leaves, lifted, pulled_back
from jaxlib_methods.quantization._projection_maps import check_jacobian
from jaxlib_methods.quantization.annealing import InverseTemperature
from jaxlib_methods.quantization.labels import Labels
from jaxlib_methods.quantization.lattice import Lattice
from jaxlib_methods.quantization.steps import centre_and_half, mirror_step_softmax, mirror_step_tanh
from jaxlib_methods.typing import ProjectionJacobian

__all__ = [
    "clip_to_labels",
    "lift_gradients",
    "scale_by_icm",
    "scale_by_mirror_descent",
    "scale_by_projected_gradient",
    "scale_by_proximal_mean_field",
    "scale_by_stable_mirror_descent",
    "scale_by_straight_through",
]


def scale_by_proximal_mean_field(
    lattice: Lattice, *, inverse_temperature: InverseTemperature, jacobian: ProjectionJacobian | None = None
) -> optax.GradientTransformationExtraArgs:
    """The rule of PMF: turns gradients with respect to w (or u) into those of the auxiliary variables.

    With a lattice of projection "tanh" and its exact Jacobian it is GD-tanh, which for two labels is PMF with half the
    state.

    Args:
      lattice: with projection "softmax" or "tanh".
      inverse_temperature: a schedule (`inverse_temperature_schedule`) or a constant.
      jacobian: for the softmax "double" (the authors' released code, the default), "single" or "exact"; for tanh
        "exact". See `softmax_projection`.

    Returns:
      A transformation with `AnnealingState`. `params` are the auxiliary variables, of all leaves that the lattice
      quantizes; updates of other leaves pass through. A quantized leaf's gradient has the shape of the weights or of
      its auxiliary variables (with respect to u): wrappers that keep gradients, such as `optax.MultiSteps`, need the
      latter, which differentiating through `project` gives.

    Raises:
      ValueError: another projection, an unknown Jacobian, an inverse temperature that is not positive or falls; on
        update, missing `params` or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_proximal_mean_field(Lattice(), inverse_temperature=1.5)
      >>> aux = jnp.array([[0.3], [-0.2]])
      >>> updates, _ = rule.update(jnp.array([0.8]), rule.init(aux), aux)
      >>> [f"{g:.5f}" for g in updates[:, 0]]
      ['-1.00118', '1.31615']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353, Algorithm 1 [ajanthan2019proximal].
    """
    if jacobian is None:
        jacobian = "double" if lattice.projection == "softmax" else "exact"
    change = lambda labels, x, g, beta: pulled_back(lattice, jacobian, labels, x, g, beta)
    projections = ("softmax", "tanh")
    rule = change_leaves(
        "proximal mean-field", lattice, change, projections=projections, inverse_temperature=inverse_temperature
    )
    check_jacobian(lattice.projection, jacobian)
    return rule


def scale_by_projected_gradient(
    lattice: Lattice, *, inverse_temperature: InverseTemperature
) -> optax.GradientTransformationExtraArgs:
    """The rule of projected gradient descent: PMF with the Euclidean projection to the simplex instead of the softmax.

    Args:
      lattice: with projection "sparsemax".
      inverse_temperature: a schedule or a constant.

    Returns:
      A transformation with `AnnealingState`, used as `scale_by_proximal_mean_field`.

    Raises:
      ValueError: as `scale_by_proximal_mean_field`.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_projected_gradient(Lattice(projection="sparsemax"), inverse_temperature=1.0)
      >>> aux = jnp.array([[0.3, 2.0], [0.9, 0.5]])
      >>> rule.update(jnp.ones(2), rule.init(aux), aux)[0].tolist()  # the second weight is at a corner
      [[-1.0, 0.0], [1.0, 0.0]]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    change = lambda labels, x, g, beta: pulled_back(lattice, "exact", labels, x, g, beta)
    return change_leaves(
        "projected gradient descent",
        lattice,
        change,
        projections=("sparsemax",),
        inverse_temperature=inverse_temperature,
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
    change = lambda labels, x, g, beta: pulled_back(lattice, "clipped", labels, x, g, beta)
    return change_leaves("ICM", lattice, change, projections=("argmax",))


def lift_gradients(lattice: Lattice) -> optax.GradientTransformationExtraArgs:
    """A link for `optax.chain`: gradients with respect to w become those with respect to u, dL/du_l = q_l dL/dw.

    Args:
      lattice: that of the parameters; in scalar form nothing changes.

    Returns:
      A transformation without state that needs `params`, the primal or auxiliary variables. Leaves that are not
      quantized, and gradients with respect to u already, pass through.

    Raises:
      ValueError: on update, missing `params` or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> link = lift_gradients(Lattice((-1, 0, 1)))
      >>> u = jnp.full((3, 1), 1 / 3)
      >>> link.update(jnp.array([2.0]), link.init(u), u)[0][:, 0].tolist()
      [-2.0, 0.0, 2.0]

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    change = lambda labels, x, g, beta: lifted(lattice, labels, x, g)
    return change_leaves("lift_gradients", lattice, change)


def scale_by_mirror_descent(
    lattice: Lattice, *, inverse_temperature: InverseTemperature
) -> optax.GradientTransformationExtraArgs:
    """The rule of literal mirror descent, the last link of a chain: a step of the dual becomes one of the primal.

    The parameters are the primal variables themselves, from `auxiliary_to_primal(init_auxiliary(...), lattice)`. What
    comes in is any optimizer's finished step -eta m of the dual variables; what goes out is x' - x. Sharp weights are
    reached by long steps here, not by beta: the papers round at the end.

    Args:
      lattice: with projection "tanh" (two labels) or "softmax".
      inverse_temperature: a schedule or a constant; it scales the step.

    Returns:
      A transformation with `AnnealingState`; steps of other leaves pass through.

    Raises:
      ValueError: another projection, more than two labels with "tanh", an inverse temperature that is not positive or
        falls; on update, missing `params` or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> rule = scale_by_mirror_descent(Lattice(projection="tanh"), inverse_temperature=2.0)
      >>> optimizer = optax.chain(optax.sgd(0.1), rule)
      >>> w = jnp.array([0.5])
      >>> updates, _ = optimizer.update(jnp.array([0.7]), optimizer.init(w), w)
      >>> f"{optax.apply_updates(w, updates)[0]:.6f}"
      '0.387883'

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    if lattice.projection == "tanh":
        for labels in (lattice.labels, *(labels for _, labels in lattice.rules)):
            if labels is not None:
                centre_and_half(labels)

    def step(labels: Labels, x: jax.Array, displacement: jax.Array, beta: jax.Array) -> jax.Array:
        dtype = x.dtype
        x, displacement = widen(x), widen(displacement)
        if lattice.lifted:
            moved = mirror_step_softmax(x, displacement, beta)
        else:
            moved = mirror_step_tanh(x, displacement, beta, labels=labels)
        return (moved - x).astype(dtype)

    return change_leaves(
        "mirror descent",
        lattice,
        step,
        projections=("tanh", "softmax"),
        inverse_temperature=inverse_temperature,
    )


def scale_by_stable_mirror_descent(
    lattice: Lattice, *, inverse_temperature: InverseTemperature
) -> optax.GradientTransformationExtraArgs:
    """The rule of mirror descent in the stable form (-S): the primal gradient is the step of the dual variables.

    It lifts gradients to the auxiliary variables and keeps the inverse temperature; the mirror map is in the forward
    pass, `project(aux, lattice, read_inverse_temperature(state))`. Finite for any beta that float32 holds.

    Args:
      lattice: with projection "tanh" (any label set) or "softmax".
      inverse_temperature: a schedule or a constant.

    Returns:
      A transformation with `AnnealingState`, used as `scale_by_proximal_mean_field`.

    Raises:
      ValueError: another projection, an inverse temperature that is not positive or falls; on update, missing `params`
        or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_stable_mirror_descent(Lattice(), inverse_temperature=1.5)
      >>> aux = jnp.array([[0.3], [-0.2]])
      >>> updates, _ = rule.update(jnp.array([0.8]), rule.init(aux), aux)
      >>> [f"{g:.1f}" for g in updates[:, 0]]
      ['-0.8', '0.8']

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    change = lambda labels, x, g, beta: lifted(lattice, labels, x, g)
    return change_leaves(
        "mirror descent",
        lattice,
        change,
        projections=("tanh", "softmax"),
        inverse_temperature=inverse_temperature,
    )


def scale_by_straight_through(lattice: Lattice, *, clip: bool = True) -> optax.GradientTransformationExtraArgs:
    """The rule of the straight-through estimator: zero gradients where a weight has left the range of its labels.

    Args:
      lattice: with projection "round".
      clip: whether to zero them; otherwise every gradient passes.

    Returns:
      A transformation without state; `params` are the float weights, gradients are those of the rounded ones.

    Raises:
      ValueError: another projection; on update, missing `params` or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_straight_through(Lattice(projection="round"))
      >>> x = jnp.array([0.3, -1.2])
      >>> rule.update(jnp.array([2.0, 2.0]), rule.init(x), x)[0].tolist()
      [2.0, 0.0]

    Source: Bengio, Leonard, Courville (2013), arXiv:1308.3432; the clipping of Hubara, Courbariaux, Soudry, El-Yaniv,
    Bengio (NeurIPS 2016), arXiv:1602.02830 [bengio2013estimating; hubara2016binarized].
    """
    jacobian = "clipped" if clip else "straight_through"
    change = lambda labels, x, g, beta: pulled_back(lattice, jacobian, labels, x, g, beta)
    return change_leaves("the straight-through estimator", lattice, change, projections=("round",))


def clip_to_labels(lattice: Lattice) -> optax.GradientTransformationExtraArgs:
    """The last link of BinaryConnect: shortens steps so that float weights stay within the range of their labels.

    Args:
      lattice: in scalar form, with projection "round" or "tanh".

    Returns:
      A transformation without state from finished steps to finished steps.

    Raises:
      ValueError: a lifted lattice; on update, missing `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> link = clip_to_labels(Lattice(projection="round"))
      >>> x = jnp.array([0.5, -0.25])
      >>> link.update(jnp.array([2.0, 0.25]), link.init(x), x)[0].tolist()
      [0.5, 0.25]

    Source: Courbariaux, Bengio, David (NeurIPS 2015), arXiv:1511.00363 [courbariaux2015binaryconnect].
    """

    def shorten(labels: Labels, x: jax.Array, step: jax.Array, beta: jax.Array) -> jax.Array:
        low, high = x.dtype.type(min(labels)), x.dtype.type(max(labels))
        return jnp.clip(x + step, low, high) - x

    return change_leaves("clip_to_labels", lattice, shorten, projections=("round", "tanh"))
