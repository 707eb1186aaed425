"""How far rounding takes a chain of transforms from the exact product."""

import math

import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.typing import TransformFold

__all__ = [
    "rounding_bound",
]


def rounding_bound(
    dtype: str,
    *,
    width: int,
    num_transforms: int,
    condition: float | int = 1.0,
    transform_condition: float | int = 1.0,
    fold: TransformFold = "in place",
) -> float:
    r"""A bound of the relative error of a parameter of this dtype after a chain of transforms, $W T_1 \cdots T_n$.

    With u the unit roundoff of the dtype, $u_{64} = 2^{-53}$ and $S = \sum_{j=1}^n \kappa^j$ (n for orthogonal
    transforms):

    in place: $d\,u\,\kappa_W S$, `morph(params, ..., precision="parameter")` each time;
    each: $(d\,u_{64} + u)\,\kappa_W S$, `morph(params, ...)` each time, which folds in float64 and rounds;
    master: $d\,u_{64}\,\kappa_W S + u$, `morph(master, ...)` of a `master_copy`, which `cast_like` rounds once.

    These are bounds of the worst case: roundings that are independent add up to about the root of it.

    Args:
      dtype: of the parameter, such as "float32" or "bfloat16".
      width: d.
      num_transforms: n.
      condition: kappa_W, the condition number of W.
      transform_condition: kappa, that of one transform: 1 for orthogonal ones, exp(2 spread) for others.
      fold: "in place", "each" or "master".

    Returns:
      The bound of ||error|| / ||W T_1 ... T_n|| in the Frobenius norm; infinity where it overflows.

    Raises:
      ValueError: for sizes or condition numbers below 1, and an unknown `fold`.

    Example:
      >>> sizes = {"width": 10**3, "num_transforms": 10**4, "condition": 1e3}
      >>> [f"{rounding_bound('float32', **sizes, fold=fold):.0e}" for fold in ("in place", "master")]
      ['6e+02', '1e-06']

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable]; "each": this library.
    """
    checks.at_least(1, width=width, num_transforms=num_transforms)
    checks.at_least(1, condition=condition, transform_condition=transform_condition)
    checks.one_of(TransformFold, fold=fold)
    u, u64 = float(jnp.finfo(dtype).eps) / 2, 2.0**-53
    chain = condition * _power_sum(float(transform_condition), num_transforms)
    if fold == "in place":
        return width * u * chain
    return (width * u64 + u) * chain if fold == "each" else width * u64 * chain + u


def _power_sum(base: float, n: int) -> float:
    """base + base^2 + ... + base^n."""
    if base == 1:
        return float(n)
    exponent = n * math.log(base)
    return base * math.expm1(exponent) / (base - 1) if exponent < 700 else math.inf
