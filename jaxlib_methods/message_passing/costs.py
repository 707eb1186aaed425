"""Unary costs of the classical grid problems: stereo matching and denoising of integer images.

Pure functions from images to a cost volume `(H, W, L)`; a batch of images is `jax.vmap` of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxlib_methods._core import checks

__all__ = ["birchfield_tomasi", "denoising_unaries", "gradient_cues"]


def _signed(image: ArrayLike, name: str) -> jax.Array:
    """(H, W) or (H, W, C) of any real dtype -> (H, W, C) in a type in which differences are safe."""
    image = jnp.asarray(image)
    if image.ndim not in (2, 3):
        raise ValueError(
            f"{name} must be an image (H, W) or (H, W, C), got shape {image.shape}; use jax.vmap for a batch of images"
        )
    if not jnp.issubdtype(image.dtype, jnp.floating):
        image = image.astype(jnp.int32)
    return image[..., None] if image.ndim == 2 else image


def _half_pixel_interval(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[I_min, I_max] of the linear interpolation on [x - 1/2, x + 1/2]; integer images floor the half-pixel values."""
    padded = jnp.pad(image, ((0, 0), (1, 1), (0, 0)), mode="edge")
    total_before, total_after = image + padded[:, :-2], image + padded[:, 2:]
    if jnp.issubdtype(image.dtype, jnp.floating):
        before, after = total_before * 0.5, total_after * 0.5
    else:
        before, after = total_before // 2, total_after // 2
    lowest = jnp.minimum(jnp.minimum(before, after), image)
    highest = jnp.maximum(jnp.maximum(before, after), image)
    return lowest, highest


@functools.partial(jax.jit, static_argnames=("num_disparities", "dtype"))
def _birchfield_tomasi(left, right, outside_cost, truncation, *, num_disparities, dtype):
    width = left.shape[1]
    left_min, left_max = _half_pixel_interval(left)
    right_min, right_max = _half_pixel_interval(right)
    zero = jnp.zeros((), left.dtype)
    column = jnp.arange(width, dtype=jnp.int32)[None, :]

    def cost_of(disparity):
        shift = lambda x: jnp.roll(x, disparity, axis=1)  # x[:, c] becomes the value at column c - disparity
        r, r_min, r_max = shift(right), shift(right_min), shift(right_max)
        left_to_right = jnp.maximum(zero, jnp.maximum(left - r_max, r_min - left))
        right_to_left = jnp.maximum(zero, jnp.maximum(r - left_max, left_min - r))
        total = jnp.minimum(left_to_right, right_to_left).sum(-1, dtype=left.dtype).astype(dtype)
        return jnp.where(column >= disparity, total, outside_cost)

    costs = jax.lax.map(cost_of, jnp.arange(num_disparities, dtype=jnp.int32))
    return jnp.minimum(jnp.moveaxis(costs, 0, -1), truncation)


def birchfield_tomasi(
    left: ArrayLike,
    right: ArrayLike,
    num_disparities: int,
    *,
    truncation: float | int | None = None,
    outside_cost: float | int = 255.0,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Stereo matching costs that do not depend on where the two cameras sampled the scene.

    With I⁻, I⁺ the values half a pixel to either side and I_min, I_max the extremes of {I⁻, I, I⁺},
    d(I, J) = max(0, I − J_max, J_min − I) and, channel by channel,
    θ(y, x, d) = Σ_c min(d(L(y, x), R(y, x − d)), d(R(y, x − d), L(y, x))).

    Integer images use the integer averages (a + b) // 2 as half-pixel values, border pixels repeat, and a pixel whose
    partner x − d lies outside the right image costs `outside_cost` per channel: the setting of the published energies
    on Tsukuba, Teddy, Venus and Map.

    Args:
      left: the left rectified image, (H, W) or (H, W, C), of any real dtype.
      right: the right image, same shape and dtype.
      num_disparities: number L of labels; label d is a disparity of d pixels.
      truncation: upper limit of the cost summed over the channels; None does not truncate.
      outside_cost: cost per channel where x − d < 0.
      dtype: dtype of the result.

    Returns:
      Costs (H, W, L).

    Raises:
      ValueError: for images of different shapes or that are no images, or a non-positive number of disparities.

    Example:
      >>> import numpy as np
      >>> right = np.array([[10, 40, 90, 20]], np.uint8)
      >>> left = np.array([[0, 10, 40, 90]], np.uint8)  # everything moved by one pixel
      >>> birchfield_tomasi(left, right, 2)[0, 1:].argmin(-1).tolist()
      [1, 1, 1]

    Source: Birchfield, Tomasi (TPAMI 1998) [birchfield1998dissimilarity]; this summation over channels as in the
    energies of Szeliski et al. (TPAMI 2008) [szeliski2008comparative].
    """
    left, right = _signed(left, "left"), _signed(right, "right")
    if left.shape != right.shape or left.dtype != right.dtype:
        raise ValueError(
            f"left and right must agree in shape and dtype, got {left.shape} {left.dtype} and {right.shape} "
            f"{right.dtype}; rectify and crop the pair first"
        )
    checks.at_least(1, num_disparities=num_disparities)
    limit = jnp.asarray(jnp.inf if truncation is None else truncation, dtype)
    outside = jnp.asarray(outside_cost * left.shape[-1], dtype)
    return _birchfield_tomasi(left, right, outside, limit, num_disparities=num_disparities, dtype=jnp.dtype(dtype))


def denoising_unaries(
    image: ArrayLike, mask: ArrayLike | None, num_labels: int, *, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Quadratic data term of restoring an image from noisy and missing grey values.

    θ_i(λ) = (I_i − λ)² where pixel i was observed, 0 where it was not.

    Args:
      image: observed grey values, (H, W).
      mask: (H, W), 0 or False = unobserved; None = every pixel observed.
      num_labels: number L of grey values; label λ is the grey value λ.
      dtype: dtype of the result.

    Returns:
      Costs (H, W, L).

    Raises:
      ValueError: for shapes that are not (H, W) or do not agree, or a non-positive number of labels.

    Example:
      >>> import numpy as np
      >>> denoising_unaries(np.array([[2, 0]]), np.array([[1, 0]]), 3)[0].tolist()
      [[4.0, 1.0, 0.0], [0.0, 0.0, 0.0]]

    Source: Szeliski et al. (TPAMI 2008) [szeliski2008comparative].
    """
    image = jnp.asarray(image)
    if image.ndim != 2:
        raise ValueError(f"image must be grey, (H, W), got shape {image.shape}; denoise colour channels one by one")
    checks.at_least(1, num_labels=num_labels)
    levels = jnp.arange(num_labels, dtype=dtype)
    costs = jnp.square(image.astype(dtype)[:, :, None] - levels[None, None, :])
    if mask is None:
        return costs
    mask = jnp.asarray(mask)
    if mask.shape != image.shape:
        raise ValueError(f"mask must have the shape of the image, {image.shape}, got {mask.shape}")
    return jnp.where((mask != 0)[:, :, None], costs, jnp.zeros((), dtype))


def gradient_cues(
    image: ArrayLike, *, threshold: float | int = 8, penalty: float | int = 2
) -> tuple[jax.Array, jax.Array]:
    """Edge weights that make label changes dear inside evenly coloured regions and cheap across strong image edges.

    w_ij = penalty if the root mean square over the channels of I_i − I_j is below the threshold, else 1. With threshold
    8, penalty 2, 20 min(d, 2) and `birchfield_tomasi` costs this is Tsukuba as in the Middlebury MRF benchmark.

    Args:
      image: (H, W) or (H, W, C), of any real dtype.
      threshold: colour difference that counts as an image edge.
      penalty: weight where there is none.

    Returns:
      Weights of the edges that arrive from the left and from above, each (H, W) float32 at the receiving pixel, with
      values of no meaning where there is no such neighbour: `both_directions` takes the two.

    Raises:
      ValueError: if the image is none.

    Example:
      >>> import numpy as np
      >>> right, down = gradient_cues(np.array([[0, 0, 200], [0, 0, 200]], np.uint8))
      >>> right[:, 1:].tolist(), down[1:].tolist()
      ([[2.0, 1.0], [2.0, 1.0]], [[2.0, 2.0, 2.0]])

    Source: Szeliski et al. (TPAMI 2008) [szeliski2008comparative].
    """
    image = _signed(image, "image")
    limit = jnp.asarray(threshold**2 * image.shape[-1], image.dtype)
    weights = []
    for axis in (1, 0):
        squares = jnp.square(image - jnp.roll(image, 1, axis)).sum(-1, dtype=image.dtype)
        weights.append(jnp.where(squares < limit, jnp.float32(penalty), jnp.float32(1)))
    return weights[0], weights[1]
