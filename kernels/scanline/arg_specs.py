"""Named workloads of the sweep: the shapes that tests lower, benchmarks time and tuning is for.

The instances are those of the message-passing paper's experiments (Middlebury stereo and denoising, KITTI); their
pairwise costs are the published ones. Few of their sides are multiples of 128, so accelerators pad: `padding` says by
how much.

Source of the instances: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.kernels._arg_spec import ArgSpec
from jaxlib_methods.kernels.scanline.pairwise import Pairwise

_SOURCE = "Xu, Ajanthan, Hartley (ACCV 2020) [xu2020fast]"


def sweep_shape(spec: ArgSpec, *, vertical: bool = False, batch: int = 1) -> tuple[int, int, int]:
    """(positions, L, lines) of a horizontal (along a row) or vertical sweep over `batch` images."""
    positions, num_labels, lines = spec.args["u"].shape
    return (lines, num_labels, positions * batch) if vertical else (positions, num_labels, lines * batch)


def padding(lines: int, lines_per_block: int) -> tuple[int, float]:
    """Lines after rounding up to whole blocks, and the fraction of the work that is then wasted.

    Example:
      >>> padding(375, 128)
      (384, 0.0234375)
    """
    padded = math.ceil(lines / lines_per_block) * lines_per_block
    return padded, (padded - lines) / padded


def _truncated_linear(weight: float, truncation: int) -> Pairwise:
    return Pairwise("truncated_linear", np.float32(weight), truncation=truncation, semimetric=True)


def _truncated_quadratic(weight: float, distances: int, cap: float) -> Pairwise:
    """weight min(d^2, cap), written out for d = 0 .. distances."""
    profile = np.minimum(np.arange(distances + 1, dtype=np.float32) ** 2, np.float32(cap))
    return Pairwise("toeplitz", np.float32(weight), profile=profile, semimetric=True)


def _instance(name: str, height: int, width: int, num_labels: int, pairwise: Pairwise, *tags: str) -> ArgSpec:
    """A horizontal sweep over one image."""
    u = jax.ShapeDtypeStruct((width, num_labels, height), jnp.float32)
    return ArgSpec(name, {"u": u, "opposite": u, "pairwise": pairwise}, _SOURCE, tags)


ARG_SPECS = (
    _instance("tsukuba", 288, 384, 16, _truncated_linear(20.0, 2), "stereo", "ci"),
    _instance("map", 216, 284, 29, _truncated_linear(4.0, 6), "stereo", "ci"),
    _instance("venus", 383, 434, 20, _truncated_quadratic(50.0, 7, 49.0), "stereo", "ci"),
    _instance("teddy", 375, 450, 60, _truncated_linear(10.0, 1), "stereo", "ci"),
    _instance("kitti", 375, 1242, 96, _truncated_linear(10.0, 95), "stereo"),
    _instance("penguin", 179, 122, 256, _truncated_quadratic(25.0, 15, 200.0), "denoise"),
    _instance("house", 256, 256, 256, _truncated_quadratic(5.0, 255, np.inf), "denoise"),
)
