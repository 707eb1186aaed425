"""Bounds of rounding errors hold for chains of transforms, and say what the paper's example says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.parallel.unextractable import draw_transform, morph, rounding_bound
from jaxlib_methods.parallel.unextractable.morphing import cast_like, master_copy

WIDTH, COUNT, RULES = 16, 100, [("V", (None, "b"))]


@pytest.mark.contract
def test_the_worked_example():
    sizes = {"width": 10**3, "num_transforms": 10**4, "condition": 1e3}
    order = lambda fold: math.floor(math.log10(rounding_bound("float32", **sizes, fold=fold)))
    assert order("in place") == 2 and order("master") == -6
    assert rounding_bound("float32", **sizes) == pytest.approx(1e10 * 2.0**-24)
    assert rounding_bound("float32", **sizes, fold="master") == pytest.approx(1e10 * 2.0**-53 + 2.0**-24)
    assert rounding_bound("float32", width=2, num_transforms=10**4, transform_condition=1.2) == math.inf
    skewed = rounding_bound("bfloat16", width=3, num_transforms=4, condition=2.0, transform_condition=1.5)
    assert skewed == pytest.approx(3 * 2.0**-8 * 2 * (1.5 + 1.5**2 + 1.5**3 + 1.5**4))


@pytest.mark.parametrize("spread", [None, 0.01])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_errors_stay_below_the_bounds(dtype, spread):
    """W has condition number 30; the reference is in float64, whose own errors are far smaller."""
    P = draw_transform(WIDTH, key=jax.random.key(1)).matrix
    start = {"V": (P * np.geomspace(1, 30, WIDTH)[None]).astype(jnp.dtype(dtype))}
    exact, copies = master_copy(start)["V"], {"in place": start, "each": start, "master": master_copy(start)}
    options = {"in place": {"precision": "parameter"}, "each": {}, "master": {}}
    condition = float(np.linalg.cond(exact))
    for k in range(COUNT):
        T = {"b": draw_transform(WIDTH, key=jax.random.key(k), spread=spread)}
        exact = exact @ T["b"].matrix
        copies = {fold: morph(copy, T, RULES, **options[fold]) for fold, copy in copies.items()}
    copies["master"] = cast_like(copies["master"], start)
    errors = {
        fold: np.linalg.norm(master_copy(copy)["V"] - exact) / np.linalg.norm(exact) for fold, copy in copies.items()
    }
    kappa = 1.0 if spread is None else math.exp(2 * spread)
    for fold, error in errors.items():
        bound = rounding_bound(
            dtype, width=WIDTH, num_transforms=COUNT, condition=condition, transform_condition=kappa, fold=fold
        )
        assert error < bound
    u = float(jnp.finfo(dtype).eps) / 2
    assert errors["master"] < u and min(errors["in place"], errors["each"]) > 2 * u  # roundings add up without it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"transform_condition": 0.5}, "transform_condition must be at least 1, got 0.5"),
        ({"fold": "twice"}, "fold must be one of .* got 'twice'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rounding_bound("float32", **({"width": 2, "num_transforms": 3} | options))
