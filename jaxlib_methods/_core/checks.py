"""Checks of arguments. An error names the argument, what it must be, what it is, and where one is given the remedy.

Values are given by keyword, so that the name in the message is the argument's: `at_least(1, steps=steps)`. What is
traced, or a schedule, has no value yet, and None is no value: these pass. NaN satisfies nothing.
"""

from collections.abc import Iterable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.typing import PyTree


def at_least(least: float | int, *, remedy: str = "", **values: Any) -> None:
    """Raises ValueError for a value below `least`.

    Example:
      >>> at_least(1, steps=0)
      Traceback (most recent call last):
      ValueError: steps must be at least 1, got 0
    """
    _each(lambda value: value >= least, f"must be at least {least}", values, remedy)


def positive(*, remedy: str = "", **values: Any) -> None:
    """Raises ValueError for a value that is not above zero.

    Example:
      >>> positive(temperature=-1.0, remedy="1 leaves the logits as they are")
      Traceback (most recent call last):
      ValueError: temperature must be positive, got -1.0; 1 leaves the logits as they are
    """
    _each(lambda value: value > 0, "must be positive", values, remedy)


def not_negative(*, remedy: str = "", **values: Any) -> None:
    """Raises ValueError for a value below zero.

    Example:
      >>> not_negative(weight_decay=-0.1)
      Traceback (most recent call last):
      ValueError: weight_decay must not be negative, got -0.1
    """
    _each(lambda value: value >= 0, "must not be negative", values, remedy)


def finite(*, remedy: str = "", **values: Any) -> None:
    """Raises ValueError for a value, or an array's entry, that is infinite or no number.

    Example:
      >>> finite(weight=float("nan"))
      Traceback (most recent call last):
      ValueError: weight must be finite, got nan
    """
    _each(np.isfinite, "must be finite", values, remedy)


def within(interval: str, *, remedy: str = "", **values: Any) -> None:
    """Raises ValueError for a value outside an interval, written as in mathematics.

    Args:
      interval: such as "[0, 1)" or f"(0, {limit}]".
      remedy: ends the message, after a semicolon.
      **values: the arguments by name.

    Example:
      >>> within("[0, 1)", sparsity=1.0, remedy="0.98 removes 98 of 100 connections")
      Traceback (most recent call last):
      ValueError: sparsity must lie in [0, 1), got 1.0; 0.98 removes 98 of 100 connections
    """
    low, high = map(float, interval[1:-1].split(","))
    above = np.greater_equal if interval[0] == "[" else np.greater
    below = np.less_equal if interval[-1] == "]" else np.less
    _each(lambda value: above(value, low) & below(value, high), f"must lie in {interval}", values, remedy)


def one_of(options: Any, *, remedy: str = "", **values: Any) -> None:
    """Raises ValueError for a value that is none of the options.

    Args:
      options: a `Literal` of `jaxlib_methods.typing`, or the values themselves; `None` is allowed where it is among
        them.
      remedy: ends the message, after a semicolon.
      **values: the arguments by name.

    Example:
      >>> from jaxlib_methods.typing import Implementation
      >>> one_of(Implementation, implementation="cuda")
      Traceback (most recent call last):
      ValueError: implementation must be one of 'xla', 'pallas_gpu', 'pallas_tpu', got 'cuda'
    """
    allowed = options_of(options)
    wanted = ", ".join(repr(option) for option in allowed if option is not None)
    for name, value in values.items():
        if value not in allowed:
            _raise(name, f"must be {'None or ' if None in allowed else ''}one of {wanted}", repr(value), remedy)


def options_of(options: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, of a union of `Literal`s and None, or of a collection.

    Example:
      >>> from typing import Literal
      >>> options_of(Literal["a", "b"] | None)
      ('a', 'b', None)
    """
    if not get_args(options):
        return tuple(options) if isinstance(options, Iterable) else (options,)
    parts = (options_of(part) if get_args(part) else (part,) for part in get_args(options))
    return tuple(None if value is type(None) else value for part in parts for value in part)


def same_shape(*, remedy: str = "", **arrays: Any) -> None:
    """Raises ValueError where the shapes of the arrays are not all that of the first.

    Example:
      >>> same_shape(weight=np.ones(2), mask=np.ones(3))
      Traceback (most recent call last):
      ValueError: mask must have the shape of weight, (2,), got (3,)
    """
    (first, like), *others = ((name, np.shape(array)) for name, array in arrays.items())
    for name, shape in others:
        if shape != like:
            _raise(name, f"must have the shape of {first}, {like}", str(shape), remedy)


def floating(*, remedy: str = "", **trees: PyTree) -> None:
    """Raises ValueError for an array, or a leaf of a tree, that is not of real floating numbers.

    Example:
      >>> floating(images=np.ones(2, np.uint8), remedy="divide by 255")
      Traceback (most recent call last):
      ValueError: images must be floating, got uint8; divide by 255
    """
    for name, tree in trees.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                where = jax.tree_util.keystr(path)
                _raise(name + where, "must be floating", str(jnp.result_type(leaf)), remedy)


def _each(holds: Any, wanted: str, values: dict[str, Any], remedy: str) -> None:
    for name, value in values.items():
        if value is None or callable(value) or isinstance(value, jax.core.Tracer):
            continue
        if not np.all(holds(np.asarray(value))):
            _raise(name, wanted, str(np.asarray(value).tolist()), remedy)


def _raise(name: str, wanted: str, got: str, remedy: str) -> None:
    raise ValueError(f"{name} {wanted}, got {got}" + (f"; {remedy}" if remedy else ""))
