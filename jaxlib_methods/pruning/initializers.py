r"""Initial weights by layer type, so that a signal keeps its size: orthogonal, and the normals beside them.

A weight is read as the matrix $C \in \mathbb{R}^{n \times k}$, $n$ = fan-in (height x width x channels of a kernel
stored HWIO), $k$ = outputs. `jax.nn.initializers.orthogonal` makes $C$ orthonormal in its columns or rows; for a
convolution that is not an isometry of images, and `orthogonal_convolution` is one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.pruning._selection import mark_prunable
from jaxlib_methods.typing import InitializerKind, PyTree

__all__ = [
    "orthogonal_convolution",
    "reinitialize",
]

Initializer = Callable[..., jax.Array]


def orthogonal_convolution(scale: float | int = 1.0) -> Initializer:
    r"""An initializer of 2-D convolution kernels that keep the norm of every image, all taps in use.

    With random symmetric projections $P, Q$ of size $k$ (outputs) the 2 x 2 kernel of matrices
    $[[PQ, P(I-Q)], [(I-P)Q, (I-P)(I-Q)]]$ is an isometry under circular padding. A kernel of size $s$ is the
    convolution of $s - 1$ of them, every tap multiplied on the left by the first rows of a random orthogonal matrix.
    `jax.nn.initializers.delta_orthogonal` is the special case of one tap, in the centre.

    Args:
      scale: factor on the kernel.

    Returns:
      `initializer(key, shape, dtype=float32)` for shapes (s, s, inputs, outputs), inputs <= outputs.

    Raises:
      ValueError: by the initializer, for a kernel that is not square or has fewer outputs than inputs.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kernel = orthogonal_convolution()(jax.random.key(0), (3, 3, 2, 4))
      >>> energy = jnp.einsum("hwio,hwjo->ij", kernel, kernel)  # rows of the reshaped kernel, orthonormal as a whole
      >>> bool(jnp.abs(energy - jnp.eye(2)).max() < 1e-5)
      True

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307, and the authors' code [lee2020signal]; the
    construction is that of [xiao2018dynamical].
    """

    def initializer(
        key: jax.Array, shape: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        if len(shape) != 4 or shape[0] != shape[1] or shape[2] > shape[3]:
            raise ValueError(
                f"an orthogonal convolution needs the shape (s, s, inputs, outputs) with inputs <= outputs, got "
                f"{tuple(shape)}; take jax.nn.initializers.orthogonal for other kernels"
            )
        size, _, inputs, outputs = shape
        compute = compute_dtype(dtype)
        first, *rest = jax.random.split(key, 2 * size - 1)
        kernel = _orthogonal(first, outputs, compute)[None, None, :inputs]
        for vertical, horizontal in zip(rest[::2], rest[1::2], strict=True):
            P, Q = (_symmetric_projection(k, outputs, compute) for k in (vertical, horizontal))
            kernel = _convolve_matrices(kernel, _isometric_block(P, Q))
        kernel = (scale * kernel).astype(dtype)
        return kernel if out_sharding is None else jax.sharding.reshard(kernel, out_sharding)

    return initializer


def _orthogonal(key: jax.Array, n: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    return initializers.orthogonal()(key, (n, n), dtype)


def _symmetric_projection(key: jax.Array, n: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    r"""$P = U\,\mathrm{diag}(b)\,U^\top$ with $U$ orthogonal and fair coins $b$."""
    basis_key, coin_key = jax.random.split(key)
    chosen = _orthogonal(basis_key, n, dtype) * jax.random.bernoulli(coin_key, 0.5, (1, n)).astype(dtype)
    return matmul(chosen, chosen.T)


def _isometric_block(P: jax.Array, Q: jax.Array) -> jax.Array:
    """[[PQ, P(I-Q)], [(I-P)Q, (I-P)(I-Q)]] of shape (2, 2, n, n)."""
    complement = lambda X: jnp.eye(len(X), dtype=X.dtype) - X
    return jnp.stack([jnp.stack([matmul(A, B) for B in (Q, complement(Q))]) for A in (P, complement(P))])


def _convolve_matrices(kernel: jax.Array, block: jax.Array) -> jax.Array:
    """The 2-D convolution of two kernels whose taps are matrices: (h, w, m, n) with (2, 2, n, n)."""
    h, w, m, n = kernel.shape
    out = jnp.zeros((h + 1, w + 1, m, n), kernel.dtype)
    for i in range(2):
        for j in range(2):
            out = out.at[i : i + h, j : j + w].add(matmul(kernel, jnp.broadcast_to(block[i, j], (h, w, n, n))))
    return out


def _normal(variance: int, fan: str) -> Callable[[float], Initializer]:
    return lambda scale: initializers.variance_scaling(scale**2 * variance, fan, "normal")


_BY_LAYER_TYPE = {  # kind -> initializers of (matrices, kernels), each made from the gain
    "orthogonal": (initializers.orthogonal, initializers.orthogonal),
    "conv_orthogonal": (initializers.orthogonal, orthogonal_convolution),
    "delta_orthogonal": (initializers.orthogonal, initializers.delta_orthogonal),
    "lecun_normal": (_normal(1, "fan_in"), _normal(1, "fan_in")),
    "glorot_normal": (_normal(1, "fan_avg"), _normal(1, "fan_avg")),
    "he_normal": (_normal(2, "fan_in"), _normal(2, "fan_in")),
}


def reinitialize(
    params: PyTree, *, key: jax.Array, kind: InitializerKind = "conv_orthogonal", gain: float | int = 1.0
) -> PyTree:
    r"""Draws the weights of a network anew by layer type: matrices are dense layers, higher ranks are convolutions.

    * "conv_orthogonal": orthogonal matrices, `orthogonal_convolution` kernels: every layer an isometry.
    * "delta_orthogonal": the same with kernels of one tap (`jax.nn.initializers.delta_orthogonal`).
    * "orthogonal": orthogonal matrices, kernels orthogonal as matrices $C$ of shape (fan-in, outputs).
    * "lecun_normal", "glorot_normal", "he_normal": normals, not truncated, of variance 1/fan-in,
      2/(fan-in + fan-out), 2/fan-in: the paper's VS-L, VS-G and VS-H.

    Biases become zero; the scale and shift of normalisation layers (see `mark_prunable`) stay as they are.

    Args:
      params: pytree of arrays; paths name layers as in `mark_prunable`.
      key: typed key.
      kind: one of the above. The paper's "LDI" is orthogonal.
      gain: factor $\sigma_w$ on all weights; the authors take 1 for every activation.

    Returns:
      A tree like `params`, in the same types.

    Raises:
      ValueError: for an unknown kind, and for a kernel that the kind cannot draw, with its path.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = reinitialize({"kernel": jnp.zeros((5, 3)), "bias": jnp.ones(3)}, key=jax.random.key(0))
      >>> bool(jnp.allclose(params["kernel"].T @ params["kernel"], jnp.eye(3), atol=1e-5)), params["bias"].tolist()
      (True, [0.0, 0.0, 0.0])

    Source: Lee, Ajanthan, Gould, Torr (ICLR 2020), arXiv:1906.06307 [lee2020signal].
    """
    checks.one_of(InitializerKind, kind=kind)
    matrix, kernel = (make(gain) for make in _BY_LAYER_TYPE[kind])
    leaves, structure = jax.tree.flatten(params)
    names, gated = jax.tree.leaves(trees.path_names(params)), jax.tree.leaves(mark_prunable(params, "snip"))
    drawn = []
    for name, leaf, is_gated, k in zip(names, leaves, gated, jax.random.split(key, max(len(leaves), 1)), strict=False):
        if leaf.ndim < 2:
            drawn.append(jnp.zeros_like(leaf) if is_gated else leaf)
            continue
        try:
            drawn.append((matrix if leaf.ndim == 2 else kernel)(k, leaf.shape, leaf.dtype))
        except ValueError as error:
            raise ValueError(f'{kind} cannot draw {name!r} ({error}); kind="orthogonal" can') from error
    return jax.tree.unflatten(structure, drawn)
