"""Options of experiments: frozen dataclasses whose annotations say which values they take, checked once.

    @dataclasses.dataclass(frozen=True)
    class Config(classification.Options):
        sparsity: tuple[Annotated[float, Range(0, 1, closed="left")], ...] = (0.9,)  # shares of connections removed
        steps: Count | None = None

An error names the option, the value and the remedy. A tuple must not be empty; None is let through.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Collection
from typing import Annotated, Any, Literal, Union


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval; `closed` says which of its ends belong to it."""

    low: float = -math.inf
    high: float = math.inf
    closed: Literal["both", "left", "right", "neither"] = "both"
    remedy: str = ""  # what to do instead, appended to the error

    def refusal(self, value: Any) -> str | None:
        above = value >= self.low if self.closed in ("both", "left") else value > self.low
        below = value <= self.high if self.closed in ("both", "right") else value < self.high
        return None if above and below else f"must {self}"

    def __str__(self) -> str:
        if math.isinf(self.high):
            if self.closed in ("both", "left"):
                return "not be negative" if self.low == 0 else f"be at least {self.low:g}"
            return "be positive" if self.low == 0 else f"be above {self.low:g}"
        left = "[" if self.closed in ("both", "left") else "("
        right = "]" if self.closed in ("both", "right") else ")"
        return f"lie in {left}{self.low:g}, {self.high:g}{right}"


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, as tyro wants it, whatever the names are
class OneOf:
    """One of some names that are known when the program runs; for fixed ones use `Literal`."""

    names: Collection[str]
    remedy: str = ""

    def refusal(self, value: Any) -> str | None:
        return None if value in self.names else f"must be one of {', '.join(self.names)}"


Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, closed="neither")]
Share = Annotated[float, Range(0, 1)]


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all options: checks every field against its annotation; a subclass adds what no annotation can say.

    Raises:
      ValueError: names the first option that is refused, its value and the remedy.
    """

    def __post_init__(self):
        hints = typing.get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), hints[field.name])


def _check(name: str, value: Any, hint: Any) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return
    if origin is Annotated:
        _check(name, value, arguments[0])
        for rule in arguments[1:]:
            if isinstance(rule, Range | OneOf) and (refusal := rule.refusal(value)):
                remedy = f"; {rule.remedy}" if rule.remedy else ""
                raise ValueError(f"{name} {refusal}, got {value!r}{remedy}")
    elif origin is tuple:
        if not value:
            raise ValueError(f"{name} is empty; name at least one")
        hints = [arguments[0]] * len(value) if arguments[1:] == (...,) else arguments
        for entry, entry_hint in zip(value, hints, strict=True):
            _check(name, entry, entry_hint)
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            if argument is not type(None):
                _check(name, value, argument)
    elif origin is Literal and value not in arguments:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
