"""What ran when, by the trace of XLA's own profiler."""

import pathlib
import tempfile
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax


class Event(NamedTuple):
    """Something that a thread did."""

    name: str
    device: int | None  # that an operation of a program ran for; None for what is no operation
    start: float  # nanoseconds
    end: float


def record(call: Callable[[], Any]) -> tuple[list[Event], Any]:
    """All events while `call` runs, and its result."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = jax.block_until_ready(call())
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the iterator over the stats, for Python 3.12
            events = [_event(event) for plane in planes for line in plane.lines for event in line.events]
    return events, result


def _event(event: Any) -> Event:
    stats = dict(event.stats)
    device = stats.get("device_ordinal") if "hlo_op" in stats else None
    return Event(event.name, device, event.start_ns, event.start_ns + event.duration_ns)


def union(events: Iterable[Event]) -> list[tuple[float, float]]:
    """The time that some of the events take, as separate intervals in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((event.start, event.end) for event in events):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """Of separate intervals together."""
    return sum(end - start for start, end in intervals)


def common(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Length of what two lists of separate intervals have in common."""
    return length((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b if min(x[1], y[1]) > max(x[0], y[0]))
