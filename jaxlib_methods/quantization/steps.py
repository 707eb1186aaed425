r"""One step of each theory on the primal variables, without auxiliary ones, and the mirror map behind it.

    proximal  u' = softmax(beta (u - eta g))
    tanh      P(x) = c + h tanh(beta (x - c)), h half the distance of the two labels, t = (w - c) / h:
              Phi(w) = h / (2 beta) [(1 + t) log(1 + t) + (1 - t) log(1 - t)] + c w
              w' = c + h (r e - 1) / (r e + 1), r = (1 + t) / (1 - t), e = exp(-2 beta eta g)
    softmax   Phi(u) = (1 / beta) sum_l u_l log u_l;   u'_l = u_l exp(-beta eta g_l) / sum   (exponentiated gradient)

The step -eta g of the dual variables is called the displacement: with Adam it is Adam's own.
"""

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.quantization.labels import Labels, as_labels
from jaxlib_methods.quantization.projections import softmax_projection
from jaxlib_methods.typing import WeightProjection

__all__ = ["mirror_map", "mirror_step_softmax", "mirror_step_tanh", "proximal_mean_field_step"]

# exp(2 * 20) is what float32 still tells from the labels; beyond, steps only overflow.
MAX_EXPONENT = 20.0


def proximal_mean_field_step(
    u: jax.Array, g: jax.Array, *, learning_rate: jax.Array | float, inverse_temperature: jax.Array | float
) -> jax.Array:
    r"""One step of the theory, without auxiliary variables: $u^{k+1} = \mathrm{softmax}(\beta (u^k - \eta g^k))$.

    It is the unique minimiser over the simplex of $\eta \langle g, u \rangle - \langle u^k, u \rangle - H(u) / \beta$.

    Args:
      u: [d, ...], rows on the simplex over the leading axis.
      g: the gradient with respect to u, same shape.
      learning_rate: eta.
      inverse_temperature: beta > 0.

    Returns:
      The next u, same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> u, g = jnp.array([0.5, 0.5]), jnp.array([1.0, -1.0])
      >>> u = proximal_mean_field_step(u, g, learning_rate=0.5, inverse_temperature=2.0)
      >>> [f"{x:.4f}" for x in u]
      ['0.1192', '0.8808']

    Source: Ajanthan, Dokania, Hartley, Torr (ICCV 2019), arXiv:1812.04353 [ajanthan2019proximal].
    """
    return softmax_projection(u - jnp.asarray(learning_rate, u.dtype) * g, inverse_temperature)


def centre_and_half(labels: Labels) -> tuple[float, float]:
    """Centre c and half distance h of two labels."""
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
    x: jax.Array,
    inverse_temperature: jax.Array | float = 1.0,
    *,
    projection: WeightProjection = "tanh",
    labels: tuple[float | int, ...] = (-1, 1),
) -> jax.Array:
    r"""The potential $\Phi$ whose gradient is the inverse of the projection, summed over all entries.

    Args:
      x: primal variables: w between the two labels ("tanh"), or u [d, ...] on the simplex ("softmax").
      inverse_temperature: beta > 0.
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
    checks.one_of(("tanh", "softmax"), projection=projection)
    entropy = lambda p: jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, jnp.ones_like(p))), jnp.zeros_like(p))
    if projection == "softmax":
        return jnp.sum(entropy(x)) / inverse_temperature
    c, h = centre_and_half(as_labels(labels))
    t = (x - c) / h
    return jnp.sum(h / (2 * inverse_temperature) * (entropy(1 + t) + entropy(1 - t)) + c * x)


def mirror_step_tanh(
    w: jax.Array,
    displacement: jax.Array,
    inverse_temperature: jax.Array | float,
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
      inverse_temperature: beta > 0.
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
    c, h = centre_and_half(as_labels(labels))
    limit = _interior(w.dtype)
    t = jnp.clip((w - w.dtype.type(c)) / w.dtype.type(h), -limit, limit)
    s = jnp.tanh(jnp.clip(jnp.asarray(inverse_temperature, w.dtype) * displacement, -MAX_EXPONENT, MAX_EXPONENT))
    moved = jnp.clip(t + s * ((1 - t) * (1 + t)) / (1 + t * s), -limit, limit)
    return jnp.where(displacement == 0, w, w.dtype.type(c) + w.dtype.type(h) * moved)


def mirror_step_softmax(u: jax.Array, displacement: jax.Array, inverse_temperature: jax.Array | float) -> jax.Array:
    r"""The closed mirror step of MD-softmax, $u'_l \propto u_l \exp(\beta \Delta_l)$ with $\Delta = -\eta g$.

    Probabilities are floored at 1e-20, since no finite step leaves 0, and exponents cut 40 below the row's largest.
    Rows whose displacement is zero stay unchanged to the last bit.

    Args:
      u: [d, ...], rows on the simplex over the leading axis.
      displacement: the step Delta of the dual variables, same shape.
      inverse_temperature: beta > 0.

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
    exponent = jnp.maximum(jnp.asarray(inverse_temperature, u.dtype) * centred, -2 * MAX_EXPONENT)
    odds = jnp.maximum(u, 1e-20 if u.dtype != jnp.float16 else 1e-7) * jnp.exp(exponent)
    moved = odds / jnp.sum(odds, axis=0, keepdims=True)
    return jnp.where(jnp.all(displacement == 0, axis=0, keepdims=True), u, moved)
