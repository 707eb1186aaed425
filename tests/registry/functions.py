"""Functions on arrays, losses and kernels, for `tests/batteries/test_functions.py`. Add yours to `ROWS`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import classifiers, low_rank, message_passing, normalization
from jaxlib_methods.kernels import scanline, threshold


@dataclasses.dataclass(frozen=True)
class Row:
    """One function, and what the battery has to know about it."""

    name: str
    function: Callable[..., Any]  # of the example's arrays, options bound
    example: Callable[[Any], tuple[Any, ...]]  # dtype -> arrays; a gradient is taken in the first
    _: dataclasses.KW_ONLY
    paper: str | None = None  # key of references.bib, if it comes from a paper
    opt_outs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # check -> reason why it cannot hold


def array(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def normal(*shape: int) -> Callable[[Any], tuple[Any, ...]]:
    """An example of one array."""
    return lambda dtype: (array(*shape, dtype=dtype),)


NO_GRADIENT = {"gradient": "its values are booleans or counts"}
MEASUREMENT = {"dtype": "a measurement is a float32 number"}

ROWS = [
    Row("polar", classifiers.polar, normal(6, 4)),
    Row("nearest_etf", classifiers.nearest_etf, normal(6, 4), paper="markou2024guiding"),
    Row(
        "dot_regression_loss",
        classifiers.dot_regression_loss,
        lambda dtype: (array(3, 4, dtype=dtype), jnp.arange(3)),
        paper="markou2024guiding",
    ),
    Row("bjorck", normalization.bjorck, normal(5, 5)),
    Row("stable_rank", low_rank.stable_rank, normal(6, 4), opt_outs=MEASUREMENT),
    Row("effective_rank", low_rank.effective_rank, normal(6, 4), opt_outs=MEASUREMENT),
    Row("boundary_weights", message_passing.boundary_weights, lambda dtype: (jnp.abs(array(4, 5, dtype=dtype)),)),
    Row(
        "scanline.sweep",
        lambda u: scanline.sweep(u, None, message_passing.potentials.potts(1.0), edge_probability=1.0),
        normal(4, 3, 2),
        opt_outs={"mapped": "a batch is the last axis of u: `num_images` cuts it", "dtype": "it computes in float32"},
    ),
    Row(
        "threshold.keep_largest",
        functools.partial(threshold.keep_largest, num_keep=7),
        normal(4, 5),
        opt_outs=NO_GRADIENT | {"dtype": "a mask is boolean"},
    ),
]
