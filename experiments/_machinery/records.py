"""What a run leaves behind: metrics by variant and seed, beside targets that say what they are.

`result.json` of a run, and each of the `runs` in `results/records/NAME.json`:

    {"experiment": "snip", "config": {...}, "smoke": false,
     "records": [{"variant": "snip 95%", "seed": 0, "metrics": {"test_error": 1.7}}, ...],
     "targets": {"snip 95%": {"test_error": {"value": 1.6, "source": "Lee et al., table 1", "kind": "paper"}}},
     "shown": ["test_error"], "versions": {...}, "device": "...", "command": "...", "wall_s": 61.2}

A record of a single run has its `seed`. One whose seeds are not known one by one has `"seeds": 3` instead, with the
means in `metrics` and, where there are several, the sample standard deviations in `std`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["paper", "authors' code", "reproduction", "ours"]
KEYS = (
    "experiment", "config", "smoke", "records", "targets", "shown", "versions", "device", "command", "wall_s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """A number to compare with, and what it is: nobody reads a reimplementation's number as the paper's."""

    value: float
    source: str  # where it stands, e.g. "Lee et al. 2019, table 1"
    kind: Kind

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")


Targets = Mapping[str, Mapping[str, Target]]  # variant -> metric -> target


class Outcome(NamedTuple):
    """What `run` of a method returns for one case; all of it must be JSON."""

    metrics: Mapping[str, float]  # the numbers of the table; what is not known is left out
    curve: Sequence[Mapping[str, float]] = ()  # points of training, e.g. the records of `loop.fit`
    details: Mapping[str, Any] = {}  # whatever else the figures need


class Case(NamedTuple):
    """A finished case, as `figures` and `compare` of a method get it."""

    name: str  # of the row
    variant: Any  # what `variants` has under that name
    seed: int
    metrics: dict[str, float]
    curve: list[dict[str, float]]
    details: dict[str, Any]
    folder: Any  # pathlib.Path of the case


class Cell(NamedTuple):
    """One metric of one variant over the seeds."""

    mean: float
    std: float | None  # sample standard deviation; None of a single seed
    seeds: int


def record(variant: str, seed: int, metrics: Mapping[str, float]) -> dict[str, Any]:
    """One record of a run, as JSON."""
    return {"variant": variant, "seed": seed, "metrics": {name: float(value) for name, value in metrics.items()}}


def targets_to_json(targets: Targets) -> dict[str, Any]:
    """Targets as they stand in `result.json`."""
    return {
        variant: {metric: dataclasses.asdict(target) for metric, target in of_variant.items()}
        for variant, of_variant in targets.items()
    }


def targets_from_json(targets: Mapping[str, Any]) -> Targets:
    """Undoes `targets_to_json`."""
    return {
        variant: {metric: Target(**target) for metric, target in of_variant.items()}
        for variant, of_variant in targets.items()
    }


def pivot(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Cell]]:
    """Rows by variant, columns by metric, in order of appearance; what a seed has measured twice counts once."""
    seen: set[tuple[str, int, str]] = set()
    parts: dict[str, dict[str, list[Cell]]] = {}
    for entry in records:
        row = parts.setdefault(entry["variant"], {})
        for metric, mean in entry["metrics"].items():
            if "seed" in entry:
                if (measured := (entry["variant"], entry["seed"], metric)) in seen:
                    continue
                seen.add(measured)
            row.setdefault(metric, []).append(Cell(mean, entry.get("std", {}).get(metric), entry.get("seeds", 1)))
    return {variant: {metric: _pooled(cells) for metric, cells in row.items()} for variant, row in parts.items()}


def _pooled(cells: Sequence[Cell]) -> Cell:
    """Mean and standard deviation over all seeds together, from those of the parts."""
    seeds = sum(cell.seeds for cell in cells)
    mean = math.fsum(cell.seeds * cell.mean for cell in cells) / seeds
    if seeds == 1 or (len(cells) == 1 and cells[0].std is None):
        return Cell(mean, None, seeds)
    squares = [(cell.seeds - 1) * (cell.std or 0.0) ** 2 + cell.seeds * (cell.mean - mean) ** 2 for cell in cells]
    return Cell(mean, math.sqrt(math.fsum(squares) / (seeds - 1)), seeds)
