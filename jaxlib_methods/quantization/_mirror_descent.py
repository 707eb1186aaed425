r"""Mirror descent for quantization: P is the inverse mirror map, projected weights are primal, auxiliary ones dual.

    grad Phi = P_beta^{-1};   grad Phi(x_{k+1}) = grad Phi(x_k) - eta g_k,   g_k = dL/dx at x_k

    tanh      P(x) = c + h tanh(beta (x - c)), h half the distance of the two labels, t = (w - c) / h:
              Phi(w) = h / (2 beta) [(1 + t) log(1 + t) + (1 - t) log(1 - t)] + c w
              w' = c + h (r e - 1) / (r e + 1), r = (1 + t) / (1 - t), e = exp(-2 beta eta g)
    softmax   Phi(u) = (1 / beta) sum_l u_l log u_l;   u'_l = u_l exp(-beta eta g_l) / sum   (exponentiated gradient)

Literal form: the primal variable is stored and moved by the closed forms; raising beta lengthens its steps. Stable
form (-S): the dual variable is stored, w = P_beta(x), x' = x - eta g without a Jacobian; raising beta sharpens w. The
two coincide while beta is constant. With Adam, -eta g is Adam's step on the moments of the primal gradient.
"""

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods.quantization import _annealing
from jaxlib_methods.quantization._lattice import Lattice
from jaxlib_methods.quantization._projections import Labels, as_labels

Beta = optax.ScalarOrSchedule | int
# exp(2 * 20) is what float32 still tells from the labels; beyond, steps only overflow.
MAX_EXPONENT = 20.0


def _centre_and_half(labels: Labels) -> tuple[float, float]:
    if len(labels) != 2:
        raise ValueError(
            f"the mirror map of tanh is closed for two labels, got {labels}; use stable_mirror_descent, or a lattice "
            "with projection='softmax'"
        )
    low, high = sorted(labels)
    return (low + high) / 2, (high - low) / 2


def _interior(dtype: jax.typing.DTypeLike) -> float:
    """How close to a label the literal form may come: at the label itself no finite step leaves it again."""
    return 1 - max(1e-7, float(jnp.finfo(dtype).eps))


def mirror_map(
    x: jax.Array, beta: jax.Array | float = 1.0, *, projection: str = "tanh", labels: tuple[float | int, ...] = (-1, 1)
) -> jax.Array:
    r"""The potential $\Phi$ whose gradient is the inverse of the projection, summed over all entries.

    Args:
      x: primal variables: w between the two labels ("tanh"), or u [d, ...] on the simplex ("softmax").
      beta: inverse temperature > 0.
      projection: "tanh" or "softmax".
      labels: the two labels of "tanh".

    Returns:
      Phi(x), a scalar; strictly convex in x.

    Raises:
      ValueError: another projection, or a number of labels other than two with "tanh".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> float(jax.grad(mirror_map)(jnp.array(0.5), 2.0)), float(jnp.arctanh(0.5) / 2.0)
      (0.27465..., 0.27465...)

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    entropy = lambda p: jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, jnp.ones_like(p))), jnp.zeros_like(p))
    if projection == "softmax":
        return jnp.sum(entropy(x)) / beta
    if projection != "tanh":
        raise ValueError(f"projection must be 'tanh' or 'softmax', got {projection!r}")
    c, h = _centre_and_half(as_labels(labels))
    t = (x - c) / h
    return jnp.sum(h / (2 * beta) * (entropy(1 + t) + entropy(1 - t)) + c * x)


def mirror_step_tanh(
    w: jax.Array,
    displacement: jax.Array,
    beta: jax.Array | float,
    *,
    labels: tuple[float | int, ...] = (-1, 1),
) -> jax.Array:
    r"""The closed mirror step of MD-tanh, $w' = P(P^{-1}(w) + \Delta)$ with $\Delta = -\eta g$.

    Computed as t' = (t + s) / (1 + t s), s = tanh(beta Delta): equal to the odds form and stable. The exponent is cut
    at +-40 and t at +-(1 - 1e-7), where the authors' code overflows or stays for ever; no step leaves w unchanged to
    the last bit.

    Args:
      w: primal weights strictly between the two labels.
      displacement: the step Delta of the dual variables, same shape.
      beta: inverse temperature > 0.
      labels: the two labels.

    Returns:
      w', like w, strictly between the labels in float32 and float64.

    Raises:
      ValueError: a number of labels other than two.

    Example:
      >>> import jax.numpy as jnp
      >>> f"{mirror_step_tanh(jnp.float32(0.5), jnp.float32(-0.1 * 0.7), 2.0):.7f}"
      '0.3878834'

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    c, h = _centre_and_half(as_labels(labels))
    limit = _interior(w.dtype)
    t = jnp.clip((w - w.dtype.type(c)) / w.dtype.type(h), -limit, limit)
    s = jnp.tanh(jnp.clip(jnp.asarray(beta, w.dtype) * displacement, -MAX_EXPONENT, MAX_EXPONENT))
    moved = jnp.clip(t + s * ((1 - t) * (1 + t)) / (1 + t * s), -limit, limit)
    return jnp.where(displacement == 0, w, w.dtype.type(c) + w.dtype.type(h) * moved)


def mirror_step_softmax(u: jax.Array, displacement: jax.Array, beta: jax.Array | float) -> jax.Array:
    r"""The closed mirror step of MD-softmax, $u'_l \propto u_l \exp(\beta \Delta_l)$ with $\Delta = -\eta g$.

    Probabilities are floored at 1e-20, since no finite step leaves 0, and exponents cut 40 below the row's largest.
    Rows whose displacement is zero stay unchanged to the last bit.

    Args:
      u: [d, ...], rows on the simplex over the leading axis.
      displacement: the step Delta of the dual variables, same shape.
      beta: inverse temperature > 0.

    Returns:
      u', like u.

    Example:
      >>> import jax.numpy as jnp
      >>> u = mirror_step_softmax(jnp.array([0.6, 0.4]), -0.1 * jnp.array([0.2, -0.1]), 2.0)
      >>> [f"{x:.5f}" for x in u]
      ['0.58552', '0.41448']

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    centred = displacement - jnp.max(displacement, axis=0, keepdims=True)
    exponent = jnp.maximum(jnp.asarray(beta, u.dtype) * centred, -2 * MAX_EXPONENT)
    odds = jnp.maximum(u, 1e-20 if u.dtype != jnp.float16 else 1e-7) * jnp.exp(exponent)
    moved = odds / jnp.sum(odds, axis=0, keepdims=True)
    return jnp.where(jnp.all(displacement == 0, axis=0, keepdims=True), u, moved)


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
    of_leaf = lambda labels, x, g, beta: _annealing.lifted(lattice, labels, x, g)
    return _annealing.rule("lift_gradients", lattice, of_leaf)


def scale_by_mirror_descent(lattice: Lattice, *, beta: Beta) -> optax.GradientTransformationExtraArgs:
    """The rule of literal mirror descent, the last link of a chain: a step of the dual becomes one of the primal.

    The parameters are the primal variables themselves, from `primal_of(init_auxiliary(...), lattice)`. What comes in is
    any optimizer's finished step -eta m of the dual variables; what goes out is x' - x. Sharp weights are reached by
    long steps here, not by beta: the papers round at the end.

    Args:
      lattice: with projection "tanh" (two labels) or "softmax".
      beta: inverse temperature: a schedule or a constant; it scales the step.

    Returns:
      A transformation with `AnnealingState`; steps of other leaves pass through.

    Raises:
      ValueError: another projection, more than two labels with "tanh", beta that is not positive or falls; on update,
        missing `params` or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> optimizer = optax.chain(optax.sgd(0.1), scale_by_mirror_descent(Lattice(projection="tanh"), beta=2.0))
      >>> w = jnp.array([0.5])
      >>> updates, _ = optimizer.update(jnp.array([0.7]), optimizer.init(w), w)
      >>> f"{optax.apply_updates(w, updates)[0]:.6f}"
      '0.387883'

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    _annealing.check_projection("mirror descent", lattice, "tanh", "softmax")
    _annealing.check_beta(beta)
    if not lattice.lifted:
        for labels in (lattice.labels, *(labels for _, labels in lattice.rules)):
            if labels is not None:
                _centre_and_half(labels)

    def step(labels: Labels, x: jax.Array, displacement: jax.Array, beta: jax.Array) -> jax.Array:
        dtype = x.dtype
        compute = jnp.float64 if dtype == jnp.float64 else jnp.float32
        x, displacement = x.astype(compute), displacement.astype(compute)
        if lattice.lifted:
            moved = mirror_step_softmax(x, displacement, beta)
        else:
            moved = mirror_step_tanh(x, displacement, beta, labels=labels)
        return (moved - x).astype(dtype)

    return _annealing.rule("mirror descent", lattice, step, beta=beta)


def mirror_descent(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    beta: Beta,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Literal mirror descent (MD-tanh, MD-softmax) with Adam's moments of the primal gradient.

    Args:
      learning_rate: a number or a schedule.
      lattice: with projection "tanh" (two labels) or "softmax".
      beta: inverse temperature, a schedule such as `inverse_temperature_schedule(1.02, 100)`, or a constant.
      b1, b2, eps: of Adam.
      weight_decay: factor of an L2 term on the primal variables.

    Returns:
      The optimizer of the primal variables `primal_of(init_auxiliary(...), lattice)`; the network's weights are
      `weights_of(primal, lattice)`.

    Raises:
      ValueError: as `scale_by_mirror_descent`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxlib_methods.quantization import quantize, weights_of
      >>> lattice, target = Lattice(), jnp.array([1.0, -1.0, -1.0])
      >>> optimizer = mirror_descent(0.1, lattice, beta=2.0)
      >>> u = jnp.full((2, 3), 0.5)
      >>> state = optimizer.init(u)
      >>> for _ in range(20):
      ...     updates, state = optimizer.update(weights_of(u, lattice) - target, state, u)
      ...     u = optax.apply_updates(u, updates)
      >>> quantize(u, lattice).tolist()
      [1.0, -1.0, -1.0]

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    return optax.chain(
        lift_gradients(lattice),
        optax.add_decayed_weights(weight_decay),
        _annealing.adam(b1, b2, eps),
        optax.scale_by_learning_rate(learning_rate),
        scale_by_mirror_descent(lattice, beta=beta),
    )


def scale_by_stable_mirror_descent(lattice: Lattice, *, beta: Beta) -> optax.GradientTransformationExtraArgs:
    """The rule of mirror descent in the stable form (-S): the primal gradient is the step of the dual variables.

    It lifts gradients to the auxiliary variables and keeps the inverse temperature; the mirror map is in the forward
    pass, `project(aux, lattice, inverse_temperature(state))`. Finite for any beta that float32 holds.

    Args:
      lattice: with projection "tanh" (any label set) or "softmax".
      beta: inverse temperature: a schedule or a constant.

    Returns:
      A transformation with `AnnealingState`, used as `scale_by_proximal_mean_field`.

    Raises:
      ValueError: another projection, beta that is not positive or falls; on update, missing `params` or shapes that do
        not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = scale_by_stable_mirror_descent(Lattice(), beta=1.5)
      >>> aux = jnp.array([[0.3], [-0.2]])
      >>> updates, _ = rule.update(jnp.array([0.8]), rule.init(aux), aux)
      >>> [f"{g:.1f}" for g in updates[:, 0]]
      ['-0.8', '0.8']

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    _annealing.check_projection("mirror descent", lattice, "tanh", "softmax")
    _annealing.check_beta(beta)
    of_leaf = lambda labels, x, g, beta: _annealing.lifted(lattice, labels, x, g)
    return _annealing.rule("mirror descent", lattice, of_leaf, beta=beta)


def stable_mirror_descent(
    learning_rate: optax.ScalarOrSchedule,
    lattice: Lattice,
    *,
    beta: Beta,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Mirror descent in the stable form (MD-tanh-S, MD-softmax-S) with Adam's moments of the primal gradient.

    Args:
      learning_rate: a number or a schedule.
      lattice: with projection "tanh" (any label set) or "softmax".
      beta: inverse temperature, a schedule such as `inverse_temperature_schedule(1.02, 200, maximum=1e35)`.
      b1, b2, eps: of Adam.
      weight_decay: factor of an L2 term on the dual variables; the papers use none.

    Returns:
      The optimizer of the auxiliary variables.

    Raises:
      ValueError: as `scale_by_stable_mirror_descent`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxlib_methods.quantization import inverse_temperature, inverse_temperature_schedule, project, quantize
      >>> lattice, target = Lattice((-1, 0, 1), projection="tanh"), jnp.array([1.0, 0.0, -1.0])
      >>> optimizer = stable_mirror_descent(0.1, lattice, beta=inverse_temperature_schedule(1.3, 1, maximum=1e35))
      >>> aux = jnp.array([-0.1, 0.2, 0.3])
      >>> state = optimizer.init(aux)
      >>> for _ in range(40):
      ...     weights = project(aux, lattice, inverse_temperature(state))
      ...     updates, state = optimizer.update(weights - target, state, aux)
      ...     aux = optax.apply_updates(aux, updates)
      >>> quantize(aux, lattice).tolist()
      [1.0, 0.0, -1.0]

    Source: Ajanthan, Gupta, Torr, Hartley, Dokania (AISTATS 2021), arXiv:1910.08237 [ajanthan2021mirror].
    """
    rule = scale_by_stable_mirror_descent(lattice, beta=beta)
    return _annealing.with_adam(rule, learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
