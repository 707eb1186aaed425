"""What the checks refuse, and what they let pass."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods._core import checks

OPTIONS = Literal["a", "b"]


@pytest.mark.contract
@pytest.mark.parametrize(
    ("check", "good", "bad", "message"),
    [
        (lambda x: checks.at_least(2, x=x), 2, 1, "x must be at least 2, got 1"),
        (lambda x: checks.positive(x=x), 1e-30, 0.0, "x must be positive, got 0.0"),
        (lambda x: checks.not_negative(x=x), 0, -1, "x must not be negative, got -1"),
        (lambda x: checks.finite(x=x), np.ones(2), np.array([1.0, np.inf]), r"x must be finite, got \[1.0, inf\]"),
        (lambda x: checks.within("(0, 1]", x=x), 1, 0, r"x must lie in \(0, 1\], got 0"),
        (lambda x: checks.within("[0, 1)", x=x), 0, 1.0, r"x must lie in \[0, 1\), got 1.0"),
        (lambda x: checks.one_of(OPTIONS, x=x), "a", "c", "x must be one of 'a', 'b', got 'c'"),
        (lambda x: checks.one_of((1, 2), x=x), 2, 3, "x must be one of 1, 2, got 3"),
        (lambda x: checks.one_of(OPTIONS | None, x=x), None, "c", "x must be None or one of 'a', 'b', got 'c'"),
        (
            lambda x: checks.same_shape(y=np.ones(2), x=x),
            np.ones(2),
            np.ones(3),
            r"x .* shape of y, \(2,\), got \(3,\)",
        ),
        (lambda x: checks.floating(x=x), {"w": np.ones(2)}, {"w": np.arange(2)}, r"x\['w'\] must be floating, got int"),
    ],
)
def test_an_error_names_the_argument_the_demand_and_the_value(check, good, bad, message):
    check(good)
    with pytest.raises(ValueError, match=message):
        check(bad)


def test_nan_satisfies_nothing_and_every_value_is_looked_at():
    for check in (checks.positive, checks.not_negative, checks.finite):
        with pytest.raises(ValueError, match=r"second must .* got nan"):
            check(first=1.0, second=float("nan"))


def test_what_has_no_value_passes():
    checks.positive(schedule=lambda step: -1.0, missing=None)
    jax.jit(lambda x: checks.positive(x=x) or x)(jnp.float32(-1.0))


def test_the_remedy_ends_the_message():
    with pytest.raises(ValueError, match=r"got 0; one step is enough$"):
        checks.at_least(1, steps=0, remedy="one step is enough")
