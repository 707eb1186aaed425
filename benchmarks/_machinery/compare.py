"""Which implementations got slower or faster between two files of records, with the noise taken from their samples."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LEAST_CHANGE = 0.05  # what is smaller never counts, however quiet the samples were
FEWEST_SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Change:
    """One implementation of one case, then and now.

    `verdict` is "slower", "faster", "same", "unclear" (fewer than three samples), "new" or "gone".
    """

    benchmark: str
    case: str
    implementation: str
    old_ms: float | None
    new_ms: float | None
    noise: float | None  # relative change up to which the two medians count as the same
    against_peers: float | None  # change of the time divided by the change of the case's other implementations
    verdict: str


def compare(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Change]:
    """One `Change` for every (benchmark, case, implementation) of two lists of records.

    The noise of a change is the root of the summed squares of both runs' relative interquartile ranges, at least 5 %.
    A median that grew by more than the noise is "slower", one that shrank by more is "faster". On a CPU, which is often
    shared, the change must be as clear against the case's other implementations (by their geometric mean): the whole
    machine being busy slows all of them alike. A peer that changed alone makes nobody else slower or faster.
    """
    before, after = _by_key(old), _by_key(new)
    return [_change(key, before, after) for key in dict.fromkeys([*before, *after])]


def differences(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    """What besides the code differs between two runs: a warning for each device or version that is not the same."""
    warnings = []
    for title, field, names in (
        ("device", "device", ("platform", "kind", "count", "cores")),
        ("version", "versions", None),
    ):
        then, now = _values(old, field), _values(new, field)
        for name in names or sorted({*then, *now} - {"commit"}):  # commits are what is being compared
            if then.get(name) != now.get(name):
                shown = (" and ".join(sorted(values.get(name, {"none"}))) for values in (then, now))
                warnings.append("{} {} differs: {} then, {} now".format(title, name, *shown))
    return warnings


def relative_spread(samples: Sequence[float]) -> float:
    """Interquartile range divided by the median."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def _change(key: tuple[str, str, str], before: Mapping, after: Mapping) -> Change:
    then, now = before.get(key), after.get(key)
    if then is None or now is None:
        verdict = "new" if then is None else "gone"
        return Change(*key, then and then["median_ms"], now and now["median_ms"], None, None, verdict)
    peers = [other for other in before if other[:2] == key[:2] and other != key and other in after]
    growth = now["median_ms"] / then["median_ms"]
    against_peers = None
    if peers:
        drift = [math.log(after[other]["median_ms"] / before[other]["median_ms"]) for other in peers]
        against_peers = growth / math.exp(statistics.fmean(drift))
    if min(len(then["samples_ms"]), len(now["samples_ms"])) < FEWEST_SAMPLES:
        return Change(*key, then["median_ms"], now["median_ms"], None, against_peers, "unclear")
    noise = max(LEAST_CHANGE, math.hypot(relative_spread(then["samples_ms"]), relative_spread(now["samples_ms"])))
    changes = [growth]
    if against_peers is not None and now["device"]["platform"] == "cpu":
        changes.append(against_peers)
    verdict = "same"
    if min(changes) > 1 + noise:
        verdict = "slower"
    elif max(changes) < 1 / (1 + noise):
        verdict = "faster"
    return Change(*key, then["median_ms"], now["median_ms"], noise, against_peers, verdict)


def _by_key(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(r["benchmark"], r["case"], r["implementation"]): r for r in records}


def _values(records: Sequence[Mapping[str, Any]], field: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        for name, value in record[field].items():
            found.setdefault(name, set()).add(str(value))
    return found
