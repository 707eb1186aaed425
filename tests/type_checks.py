"""Every call of the library is checked against its annotations while tests run, by beartype."""

import functools
import operator
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

import beartype


def check_types(function: Callable) -> Callable:
    """beartype, for which a `Literal` is any string: to refuse a wrong one is the library's part, with its message."""
    function.__annotations__ = {name: _without_literals(hint) for name, hint in function.__annotations__.items()}
    return beartype.beartype(function)


def _without_literals(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return functools.reduce(operator.or_, {type(option) for option in get_args(hint)})
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, map(_without_literals, get_args(hint)))
    return hint
