r"""Projections of auxiliary variables to the simplex of labels or to the interval, and their Jacobians.

Lifted form: x [d, ...], one auxiliary variable per label, labels in the leading axis. u = P(beta x) lies on the simplex
over that axis and w = sum_l q_l u_l. Scalar form: x [...], w = P(beta x) between the smallest and the largest label.

    softmax    u_l = exp(beta x_l) / sum_k exp(beta x_k)                  proximal mean-field, mirror descent
    sparsemax  u = argmin_{s in simplex} |s - beta x|^2                   projected gradient descent
    argmax     u = one-hot argmax_l x_l                                   iterated conditional modes
    tanh       w = c + sum_j h_j tanh(beta (x - m_j))                     mirror descent, GD-tanh
    round      w = the label nearest to x                                 straight-through estimator, BinaryConnect

with the sorted labels' midpoints m_j, half gaps h_j and centre c: tanh(beta x) for {-1, 1}, and for {-1, 0, 1} the
shifted tanh (tanh(beta (x + 1/2)) + tanh(beta (x - 1/2))) / 2. Nothing overflows to NaN for finite x and any beta that
float32 holds. Gradients g with respect to u (or w) are pulled back to x by

    softmax    exact   beta (diag(u) - u u^T) g
               single  beta (I - u u^T) g                        does not vanish as u becomes one-hot
               double  beta (I - v v^T) g, v = softmax(beta u)   the authors' released code
    sparsemax  exact   beta (diag(s) - s s^T / |s|) g, s = [u > 0]
    argmax     clipped [|x_0 - x_1| <= 1] (g_0 - g_1, g_1 - g_0) / 2; two labels only
    tanh       exact   beta sum_j h_j (1 - tanh^2(beta (x - m_j))) g
    round      clipped [min q <= x <= max q] g
    all        straight_through  g

A softmax over two labels is a function of their difference: one exponential or tanh for a weight instead of two for
each of its labels, and nothing but the difference between the passes over memory.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import widen
from jaxlib_methods.quantization.labels import Labels, label_steps, look_up, nearest_index

LIFTED = ("softmax", "sparsemax", "argmax")
JACOBIANS = {
    "softmax": ("exact", "single", "double", "straight_through"),
    "sparsemax": ("exact", "straight_through"),
    "argmax": ("clipped", "straight_through"),
    "tanh": ("exact", "straight_through"),
    "round": ("clipped", "straight_through"),
}


def check_jacobian(projection: str, jacobian: str) -> None:
    """Raises ValueError for a Jacobian that the projection does not have."""
    checks.one_of(JACOBIANS[projection], jacobian=jacobian, remedy=f"these are the {projection} projection's")


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """<a, b> over the labels, broadcastable to them; for two labels without a reduction, which XLA would not fuse."""
    products = a * b
    return products + products[::-1] if len(products) == 2 else jnp.sum(products, axis=0, keepdims=True)


def _softmax(x: jax.Array, beta: jax.Array) -> jax.Array:
    if x.shape[0] == 2:  # both probabilities to their last digit
        z = beta * (x[1] - x[0])
        e = jnp.exp(-jnp.abs(z))
        large, small = 1 / (1 + e), e / (1 + e)
        return jnp.stack([jnp.where(z > 0, small, large), jnp.where(z > 0, large, small)])
    e = jnp.exp(beta * (x - jnp.max(x, axis=0, keepdims=True)))
    return e / jnp.sum(e, axis=0, keepdims=True)


def _sparsemax(x: jax.Array, beta: jax.Array) -> jax.Array:
    if x.shape[0] == 2:  # the closed form: on a segment the projection is a clip
        half = beta * (x[:1] - x[1:]) / 2
        u = jnp.clip(half + x.dtype.type(0.5), 0, 1)
        return jnp.concatenate([u, 1 - u])
    # What lies more than 1 below the maximum is outside the support, so the cut at 2 changes nothing but overflow.
    z = jnp.maximum(beta * (x - jnp.max(x, axis=0, keepdims=True)), jnp.asarray(-2, x.dtype))
    if len(z) <= 4:  # elementwise: of the thresholds of all candidate supports {j: z_j >= z_l} the largest is the one
        thresholds = []
        for least in z:
            inside = [z_j >= least for z_j in z]
            total = sum(jnp.where(i, z_j, jnp.zeros_like(z_j)) for i, z_j in zip(inside, z, strict=True))
            thresholds.append((total - 1) / sum(i.astype(z.dtype) for i in inside))
        return jnp.maximum(z - functools.reduce(jnp.maximum, thresholds)[None], 0)
    project = optax.projections.projection_simplex
    for _ in range(x.ndim - 1):
        project = jax.vmap(project, in_axes=-1, out_axes=-1)
    with jax.numpy_dtype_promotion("standard"):  # optax divides by integers
        return project(z)


def _argmax(x: jax.Array) -> jax.Array:
    labels = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return (labels == jnp.argmax(x, axis=0, keepdims=True).astype(jnp.int32)).astype(x.dtype)


def _tanh(x: jax.Array, beta: jax.Array, labels: Labels) -> jax.Array:
    midpoints, halves, centre = label_steps(labels)
    steps = [x.dtype.type(h) * jnp.tanh(beta * (x - x.dtype.type(m))) for m, h in zip(midpoints, halves, strict=True)]
    return functools.reduce(jnp.add, steps) + x.dtype.type(centre)


def _forward(projection: str, labels: Labels, x: jax.Array, beta: jax.Array) -> jax.Array:
    if projection == "softmax":
        return _softmax(x, beta)
    if projection == "sparsemax":
        return _sparsemax(x, beta)
    if projection == "argmax":
        return _argmax(x)
    if projection == "tanh":
        return _tanh(x, beta, labels)
    return look_up(nearest_index(x, labels), sorted(labels), x.dtype)


def pull_back(projection: str, jacobian: str, labels: Labels, x: jax.Array, beta: jax.Array, g: jax.Array) -> jax.Array:
    """(dP/dx)^T g in the dtype of x; g is the gradient with respect to u (lifted) or w (scalar)."""
    if jacobian == "straight_through":
        return g.astype(x.dtype)
    dtype = x.dtype
    x, g = widen(x), widen(g)
    beta = jnp.asarray(beta).astype(x.dtype)
    if projection == "softmax" and len(x) == 2:
        out = _pull_back_two(jacobian, x, beta, g)
    elif projection == "softmax":
        u = _softmax(x, beta)
        if jacobian == "exact":
            out = beta * (u * (g - _inner(u, g)))
        else:
            v = u if jacobian == "single" else _softmax(u, beta)
            out = beta * (g - v * _inner(v, g))
    elif projection == "sparsemax":
        s = (_sparsemax(x, beta) > 0).astype(x.dtype)
        out = beta * (s * (g - _inner(s, g) / _inner(s, s)))
    elif projection == "argmax":
        if x.shape[0] != 2:
            raise ValueError(
                f"the argmax projection has a gradient for two labels only, got {x.shape[0]}; "
                "use projection='softmax', or 'round' with the straight-through estimator"
            )
        inside = jnp.abs(x[:1] - x[1:]) <= 1
        out = jnp.where(inside, (g - g[::-1]) / 2, jnp.zeros_like(g))
    elif projection == "tanh":
        midpoints, halves, _ = label_steps(labels)
        tanhs = [jnp.tanh(beta * (x - x.dtype.type(m))) for m in midpoints]
        slopes = [x.dtype.type(h) * ((1 - t) * (1 + t)) for h, t in zip(halves, tanhs, strict=True)]
        out = beta * functools.reduce(jnp.add, slopes) * g
    else:
        inside = (x >= x.dtype.type(min(labels))) & (x <= x.dtype.type(max(labels)))
        out = jnp.where(inside, g, jnp.zeros_like(g))
    return out.astype(dtype)


def _pull_back_two(jacobian: str, x: jax.Array, beta: jax.Array, g: jax.Array) -> jax.Array:
    """The softmax's Jacobians for two labels in t = u_1 - u_0 = tanh(beta (x_1 - x_0) / 2) and s = v_1 - v_0."""
    sign = jnp.asarray([-1, 1], x.dtype).reshape(2, *(1,) * (x.ndim - 1))
    z = beta * (x[1] - x[0])
    if jacobian == "exact":
        e = jnp.exp(-jnp.abs(z))
        return sign * (beta * (e / (1 + e) ** 2) * (g[1] - g[0]))[None]  # beta u_0 u_1 (g_1 - g_0)
    t = jnp.tanh(z / 2)
    s = t if jacobian == "single" else jnp.tanh(beta * t / 2)
    inner = ((1 - s) * g[0] + (1 + s) * g[1]) / 2
    return beta * (g - (1 + sign * s[None]) / 2 * inner[None])


def lift(labels: Labels, g: jax.Array) -> jax.Array:
    """dL/du_l = q_l dL/dw, [d, ...]."""
    q = jnp.asarray(labels, g.dtype).reshape(-1, *(1,) * g.ndim)
    return q * g[None]


def collapse(labels: Labels, u: jax.Array) -> jax.Array:
    """w = sum_l q_l u_l."""
    wide = widen(u)
    return sum((wide[l] * wide.dtype.type(q) for l, q in enumerate(labels[1:], 1)), wide[0] * labels[0]).astype(u.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def primal(projection: str, jacobian: str, labels: Labels, x: jax.Array, beta: jax.Array) -> jax.Array:
    """u = P(beta x), or w in scalar form, in the dtype of x; its derivative is `pull_back`, and zero in beta."""
    wide = widen(x)
    return _forward(projection, labels, wide, jnp.asarray(beta).astype(wide.dtype)).astype(x.dtype)


def _primal_forward(projection: str, jacobian: str, labels: Labels, x: jax.Array, beta: jax.Array):
    return primal(projection, jacobian, labels, x, beta), (x, beta)


def _primal_backward(projection: str, jacobian: str, labels: Labels, saved: tuple, g: jax.Array):
    x, beta = saved
    return pull_back(projection, jacobian, labels, x, beta, g), jnp.zeros_like(beta)


primal.defvjp(_primal_forward, _primal_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def weights(projection: str, jacobian: str, labels: Labels, x: jax.Array, beta: jax.Array) -> jax.Array:
    """w = sum_l q_l u_l of the primal variables, without writing u down; its derivative is theirs."""
    if projection not in LIFTED:
        return primal(projection, jacobian, labels, x, beta)
    if projection != "softmax" or len(labels) != 2:
        return collapse(labels, primal(projection, jacobian, labels, x, beta))
    wide = widen(x)
    centre, half = (wide.dtype.type(value) for value in ((labels[0] + labels[1]) / 2, (labels[1] - labels[0]) / 2))
    t = jnp.tanh(jnp.asarray(beta).astype(wide.dtype) * (wide[1] - wide[0]) / 2)
    return (centre + half * t).astype(x.dtype)


def _weights_forward(projection: str, jacobian: str, labels: Labels, x: jax.Array, beta: jax.Array):
    return weights(projection, jacobian, labels, x, beta), (x, beta)


def _weights_backward(projection: str, jacobian: str, labels: Labels, saved: tuple, g: jax.Array):
    x, beta = saved
    g = lift(labels, g) if projection in LIFTED else g
    return pull_back(projection, jacobian, labels, x, beta, g), jnp.zeros_like(beta)


weights.defvjp(_weights_forward, _weights_backward)
