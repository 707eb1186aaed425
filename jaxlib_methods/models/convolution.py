"""One convolution for every backend: XLA's own on GPU and TPU, patches times a matrix on the CPU.

XLA's CPU backend runs the gradients of a convolution inside a loop (`lax.scan`, `lax.fori_loop`) 5 to 50 times slower
than outside (jax-ml/jax issue 12868), and a training loop is a loop. Written as a product of patches and a matrix, the
same convolution is fast in both places.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

__all__ = ["Conv", "convolve"]


def _patches_times_kernel(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any) -> jax.Array:
    window = kernel.shape[:-2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    out = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:-1], window, strides, strict=True)]

    def shifted(x: jax.Array, d: int, i: int) -> jax.Array:
        return lax.slice_in_dim(x, i, i + (out[d] - 1) * strides[d] + 1, strides[d], axis=d + 1)

    patches = [x]
    for d in range(len(window)):
        patches = [shifted(patch, d, i) for patch in patches for i in range(window[d])]
    rows = jnp.concatenate(patches, axis=-1).reshape(math.prod((x.shape[0], *out)), -1)
    return (rows @ kernel.reshape(-1, kernel.shape[-1])).reshape(x.shape[0], *out, kernel.shape[-1])


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Any,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """Stands in for `lax.conv_general_dilated` in `nnx.Conv(conv_general_dilated=convolve)`.

    Args:
      x: images of shape (B, H, W, C), or volumes (B, D, H, W, C).
      kernel: shape (h, w, C, F), or (d, h, w, C, F).
      strides: two integers, or three.
      padding: "SAME", "VALID" or as many pairs of integers.
      lhs_dilation: as in `lax.conv_general_dilated`; anything but 1 uses XLA's convolution everywhere.
      rhs_dilation: likewise.
      dimension_numbers: ignored but for XLA's convolution; the layout is N(D)HWC, (D)HWIO, N(D)HWC.
      feature_group_count: groups; more than one uses XLA's convolution everywhere.
      precision, preferred_element_type, out_sharding: of XLA's convolution.

    Returns:
      Images of shape (B, H', W', F), or volumes (B, D', H', W', F).

    Example:
      >>> import jax.numpy as jnp
      >>> convolve(jnp.ones((1, 3, 3, 1)), jnp.ones((2, 2, 1, 1)), (1, 1), "VALID").squeeze().tolist()
      [[4.0, 4.0], [4.0, 4.0]]
    """
    layout = ("NDHWC", "DHWIO", "NDHWC") if kernel.ndim == 5 else ("NHWC", "HWIO", "NHWC")

    def by_xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers or layout,
            feature_group_count=feature_group_count,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )

    dilated = any(d != 1 for dilation in (lhs_dilation, rhs_dilation) for d in dilation or ())
    if kernel.ndim not in (4, 5) or dilated or feature_group_count != 1:
        return by_xla(x, kernel)
    return lax.platform_dependent(
        x, kernel, cpu=lambda x, kernel: _patches_times_kernel(x, kernel, strides, padding), default=by_xla
    )


class Conv(nnx.Conv):
    """`flax.nnx.Conv` that stays fast inside loops on the CPU; same arguments, parameters and results.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> Conv(1, 8, (5, 5), padding="VALID", rngs=nnx.Rngs(0))(jnp.zeros((2, 28, 28, 1))).shape
      (2, 24, 24, 8)
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, conv_general_dilated=convolve, **kwargs)
