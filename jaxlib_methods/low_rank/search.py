"""ASVD's search for how much each kernel can lose."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import jax

from jaxlib_methods import trees
from jaxlib_methods.low_rank.compression import InputStatistics, checked_share, factorize, matching_kernels
from jaxlib_methods.typing import LowRankMethod, PyTree

__all__ = ["sensitivity_search"]


def sensitivity_search(
    calibration_loss: Callable[[PyTree], float | jax.Array],
    params: PyTree,
    *patterns: str,
    removal: float,
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    method: LowRankMethod = "asvd",
    statistics: Mapping[str, InputStatistics] | None = None,
    exponent: float = 0.5,
) -> dict[str, float]:
    """ASVD's search for a rank of each layer's own: all layers may raise the loss, alone, up to the same value.

    The loss is measured with one kernel compressed at a time, at each share: kernels times shares evaluations. Then the
    lowest threshold is found at which enough is removed, when every kernel takes the largest share whose loss stays
    below it.

    Args:
      calibration_loss: of the parameters, on calibration data.
      params: as in `factorize_kernels`, as all that follows but for `shares`.
      *patterns: regular expressions on the paths of the kernels.
      removal: share of all these kernels' parameters together to remove.
      shares: increasing shares to try for each kernel, in (0, 1).
      method: "svd", "asvd" or "svd_llm".
      statistics: of `collect_inputs`.
      exponent: of ASVD's scaling.

    Returns:
      The share to remove by path, 0 for a kernel to leave alone: give it to `compress_kernels` as `removal`.

    Raises:
      ValueError: as `factorize_kernels`; shares that do not increase, or that cannot add up to `removal`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"low": jnp.ones((8, 8)), "full": jnp.eye(8)}
      >>> error = lambda new: sum(float(jnp.sum((new[name] - params[name]) ** 2)) for name in params)
      >>> sensitivity_search(error, params, "low", "full", removal=0.3, method="svd", shares=(0.25, 0.7))
      {'full': 0.0, 'low': 0.7}

    Source: Yuan et al. (2023), arXiv:2312.05821, Section 3.3 [yuan2023asvd].
    """
    checked_share("all kernels", removal)
    if not shares or not all(0 < a < b < 1 for a, b in itertools.pairwise((*shares, 1 - 1e-9))):
        raise ValueError(f"shares must be increasing and in (0, 1), got {tuple(shares)}")
    kernels = matching_kernels(params, patterns, method, statistics)
    names = trees.path_names(params)
    reached: dict[str, list[float]] = {}
    for path, W in kernels.items():
        reached[path] = []
        for share in shares:
            smaller = factorize(path, W, share, method, statistics, exponent).kernel
            alone = jax.tree.map(lambda name, leaf: smaller if name == path else leaf, names, params)
            reached[path].append(float(calibration_loss(alone)))

    def taken(threshold: float) -> dict[str, float]:
        return {
            path: max((share for share, value in zip(shares, losses, strict=True) if value <= threshold), default=0.0)
            for path, losses in reached.items()
        }

    total = sum(W.size for W in kernels.values())
    for threshold in sorted(value for losses in reached.values() for value in losses):
        found = taken(threshold)
        if sum(found[path] * W.size for path, W in kernels.items()) >= removal * total * (1 - 1e-9):
            return found
    raise ValueError(f"removal={removal} is more than the largest of the shares {tuple(shares)} removes")
