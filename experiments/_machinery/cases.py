"""Runs made of many cases (variant x seed): finished cases are read back, an unfinished one resumes."""

import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax

from experiments._machinery.errors import WorkdirError
from experiments._machinery.files import write_json
from experiments._machinery.records import Case, Outcome


def run_or_load(
    case_dir: pathlib.Path, fn: Callable[[pathlib.Path], dict[str, Any]], *, keep_checkpoints: bool = False
) -> dict[str, Any]:
    """Returns the metrics of one case: from `case_dir/metrics.json`, or from `fn(case_dir)`, written there at its end.

    `fn` hands `case_dir` to `fit` as workdir, so that a killed case goes on from its last checkpoint. The metrics may
    be anything JSON holds; they come back as JSON gives them back on the first run as well. A finished case's
    checkpoints are deleted unless asked to keep. On several processes the folder is shared, and process 0 writes.
    """
    path = pathlib.Path(case_dir) / "metrics.json"
    if _exists_on_first_process(path):
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise WorkdirError(f"{path} is not JSON ({error}); delete it to run this case again") from error
    metrics = fn(path.parent)
    if jax.process_index() == 0:
        write_json(path, metrics)
        if not keep_checkpoints:
            shutil.rmtree(path.parent / "checkpoints", ignore_errors=True)
    return json.loads(json.dumps(metrics))


def folder(workdir: pathlib.Path, variant: str, seed: int, candidate: Any = None) -> pathlib.Path:
    """Where a case of the run in `workdir` lies, for those that need another one's files."""
    tried = "" if candidate is None else f"-{candidate:g}" if isinstance(candidate, float) else f"-{candidate}"
    return pathlib.Path(workdir) / "cases" / re.sub(r"[^\w.+=%-]+", "-", f"{variant}-seed{seed}{tried}")


def seeds_of(config: Any) -> list[int]:
    """`config.seeds` (a sequence, or how many from 0), else `config.seed`, else 0."""
    seeds = getattr(config, "seeds", None) or [getattr(config, "seed", 0)]
    return list(range(seeds)) if isinstance(seeds, int) else list(seeds)


def run_all(method: ModuleType, config: Any, shared: Any, workdir: pathlib.Path) -> Iterator[Case]:
    """Runs or reads back every case of a method, variant by variant, so that the seeds share compiled programs.

    With `candidates(config, name, chosen)` the first seed tries each of them, the one with the least `TUNED_BY` is
    kept for all seeds, and `chosen` has those of the variants before.
    """
    keep = getattr(method, "KEEP_CHECKPOINTS", False)
    chosen: dict[str, Any] = {}

    def one(name: str, variant: Any, seed: int, *candidate: Any) -> Case:
        where = folder(workdir, name, seed, *candidate)
        fresh = lambda case_dir: Outcome(*method.run(shared, variant, seed, case_dir, *candidate))._asdict()
        found = run_or_load(where, fresh, keep_checkpoints=keep)
        return Case(name, variant, seed, found["metrics"], found["curve"], found["details"], where)

    for name, variant in method.variants(config).items():
        first, *others = seeds_of(config)
        if not hasattr(method, "candidates"):
            yield from (one(name, variant, seed) for seed in (first, *others))
            continue
        tried = {value: one(name, variant, first, value) for value in method.candidates(config, name, chosen)}
        chosen[name] = min(tried, key=lambda value: tried[value].metrics.get(method.TUNED_BY, math.inf))
        yield tried[chosen[name]]
        yield from (one(name, variant, seed, chosen[name]) for seed in others)


def _exists_on_first_process(path: pathlib.Path) -> bool:
    """Process 0 looks and tells the others: they must not disagree on whether there is a program to run together."""
    exists = path.exists()
    if jax.process_count() > 1:
        import numpy as np
        from jax.experimental import multihost_utils

        exists = bool(multihost_utils.broadcast_one_to_all(np.asarray(exists)))
    return exists
