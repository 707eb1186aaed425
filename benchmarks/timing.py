"""Times several implementations of one case side by side and returns one record for each (an example: README.md).

The samples of all implementations are interleaved: round r calls each of them once, starting with the r-th, so that
a disturbance of the machine hits all of them alike and the ratios of the medians stay meaningful.
"""

import dataclasses
import datetime
import fnmatch
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._machinery import ceilings, records
from benchmarks._machinery.records import Record as Record


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to compute a case.

    Args:
      function: called as `function(*args)`. A jitted function is lowered and compiled first, both timed apart; it takes
        no static arguments (bind them with `functools.partial` before `jax.jit`). Any other callable is timed as it is.
        A function that neither returns JAX arrays nor is synchronous must wait for its own result.
      args: the arguments, or a callable without arguments that makes fresh ones before every call, outside the clock.
        What a jitted function donates is copied before every call without further ado.
      canonical: brings the result into the reference's form (a tree of arrays) before the error is measured.
      module: what a peer is imported from, for its version; `peer` fills it in.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...] | Callable[[], tuple[Any, ...]] = ()
    canonical: Callable[[Any], Any] = lambda output: output
    module: str | None = None


@dataclasses.dataclass(frozen=True)
class Skip:
    """Stands where an implementation cannot be measured here; the reason is shown to the user."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Case:
    """Named implementations of the same computation, and the model of the work that it cannot avoid.

    Args:
      benchmark: the benchmark's name.
      name: the case's name, unique in the benchmark; `--case` selects by it.
      implementations: name -> `Implementation`, or `Skip` with the reason why not. Ours comes first.
      reference: the implementation that the others' results are compared with; None: no errors.
      flops: floating-point operations that any implementation needs; None: no model.
      bytes: bytes that any implementation must read and write in main memory; None: no model.
      dtype: of the matrix product that `flops` is held against.
      seconds: aim for this much timed work (a fifth with --quick); never fewer than `min_rounds` rounds.
      min_rounds: samples at least, for each implementation (at most 3 with --quick).
      warm_up: untimed calls of each implementation, at least 1 (the first gives the result for the error).
    """

    benchmark: str
    name: str
    implementations: Mapping[str, Implementation | Skip]
    reference: str | None = None
    flops: float | None = None
    bytes: float | None = None
    dtype: str = "float32"
    seconds: float = 10.0
    min_rounds: int = 7
    warm_up: int = 2

    def __post_init__(self):
        if self.reference is not None and not isinstance(self.implementations.get(self.reference), Implementation):
            raise ValueError(f"reference must name an implementation that runs here, got {self.reference!r}")
        if self.warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {self.warm_up}; the first call gives the result")


MAX_ROUNDS = 200


@dataclasses.dataclass
class Options:
    """What the command line asked for; every benchmark's `run` gets one.

    Args:
      case: a shell pattern; cases whose name it does not match are left out.
      quick: fewer samples, and benchmarks may leave out their large cases.
    """

    case: str = "*"
    quick: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def selects(self, case: str) -> bool:
        """Whether to measure the case of this name: ask before making its arguments."""
        return fnmatch.fnmatchcase(case, self.case)

    def note(self, message: str) -> None:
        """Tells the user now, and again below the table at the end."""
        self.notes.append(message)
        print(f"note: {message}", file=sys.stderr, flush=True)


def peer(module: str, make: Callable[[Any], Implementation], *, extra: str = "peers") -> Implementation | Skip:
    """`make(imported module)`, or a `Skip` that says how to get the module where it cannot be imported."""
    try:
        imported = importlib.import_module(module)
    except (ImportError, AttributeError) as error:  # AttributeError: a peer that needs a name which JAX has removed
        return Skip(f"{module} cannot be imported ({error}); pip install '.[{extra}]' or {module} itself")
    return dataclasses.replace(make(imported), module=module)


def measure(case: Case, options: Options, *, clock: Callable[[], float] = time.perf_counter) -> list[Record]:
    """Times all implementations of a case, interleaved, and returns one record each in the order they were given."""
    prepared = []
    for name, implementation in case.implementations.items():
        if isinstance(implementation, Skip):
            options.note(f"{case.benchmark} [{case.name}]: {name} skipped: {implementation.reason}")
        else:
            prepared.append(_Prepared(name, implementation, clock))

    round_s = 0.0
    for p in prepared:
        for i in range(case.warm_up):
            elapsed, output = p.sample(clock)
            if i == 0 and case.reference is not None:
                p.output = jax.tree.map(np.asarray, p.canonical(output))
            del output
        round_s += elapsed
    rounds = _rounds(case, round_s, quick=options.quick)
    _ceiling(case)  # before the samples and after them: the better of the two moments counts
    samples: dict[str, list[float]] = {p.name: [] for p in prepared}
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            start = r % len(prepared)
            for p in prepared[start:] + prepared[:start]:
                samples[p.name].append(p.sample(clock)[0] * 1e3)
    finally:
        gc.enable()

    medians = {name: statistics.median(times) for name, times in samples.items()}
    bound_s, device = _ceiling(case)
    outputs = {p.name: p.output for p in prepared}
    found = records.peer_versions(i.module for i in case.implementations.values() if isinstance(i, Implementation))
    return [
        Record(
            benchmark=case.benchmark,
            case=case.name,
            implementation=p.name,
            lower_ms=p.lower_ms,
            compile_ms=p.compile_ms,
            samples_ms=samples[p.name],
            median_ms=medians[p.name],
            peak_bytes=p.peak_bytes,
            flops=case.flops,
            bytes=case.bytes,
            fraction_of_ceiling=None if bound_s is None else bound_s * 1e3 / medians[p.name],
            error=None if case.reference is None else records.error(p.output, outputs[case.reference]),
            ratios={other: medians[other] / medians[p.name] for other in medians if other != p.name},
            versions=records.versions() | found,
            device=device,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        for p in prepared
    ]


class _Prepared:
    """An implementation that is compiled where it can be, and called by `sample`."""

    def __init__(self, name: str, implementation: Implementation, clock: Callable[[], float]):
        self.name = name
        self.canonical = implementation.canonical
        self.call = implementation.function
        self.lower_ms = self.compile_ms = self.peak_bytes = self.output = None
        args = implementation.args
        self.make_args = args if callable(args) else lambda: args
        if isinstance(implementation.function, jax.stages.Wrapped):
            start = clock()
            lowered = implementation.function.lower(*self.make_args())
            middle = clock()
            self.call = compiled = lowered.compile()
            end = clock()
            self.lower_ms, self.compile_ms = (middle - start) * 1e3, (end - middle) * 1e3
            self.peak_bytes = _executable_bytes(compiled)
            donated = [info.donated for info in jax.tree.leaves(lowered.args_info)]
            if any(donated) and not callable(args):
                self.make_args = lambda: _copy_where(donated, args)

    def sample(self, clock: Callable[[], float]) -> tuple[float, Any]:
        """One call: seconds until its result is there, and the result."""
        args = jax.block_until_ready(self.make_args())
        before = jax.devices()[0].memory_stats() or {}
        start = clock()
        output = jax.block_until_ready(self.call(*args))
        elapsed = clock() - start
        after = jax.devices()[0].memory_stats() or {}
        # The device's peak is that of the whole process: it is this call's own only where the call has raised it.
        if self.lower_ms is None and after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0):
            self.peak_bytes = after["peak_bytes_in_use"] - before["bytes_in_use"]
        return elapsed, output


def _copy_where(donated: Sequence[bool], args: tuple[Any, ...]) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(args)
    fresh = [jnp.copy(leaf) if given else leaf for given, leaf in zip(donated, leaves, strict=True)]
    return jax.tree.unflatten(structure, fresh)


def _executable_bytes(compiled: jax.stages.Compiled) -> int | None:
    try:
        m = compiled.memory_analysis()
    except NotImplementedError:
        return None
    if m is None:
        return None
    # A donated argument shares its buffer with a result and is counted once.
    return int(m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes)


def _rounds(case: Case, round_s: float, *, quick: bool) -> int:
    seconds, least = (case.seconds / 5, min(case.min_rounds, 3)) if quick else (case.seconds, case.min_rounds)
    return int(np.clip(seconds / max(round_s, 1e-9), least, max(least, MAX_ROUNDS)))


def _ceiling(case: Case) -> tuple[float | None, dict[str, Any]]:
    """The shortest time the device's ceilings allow for the case's model, and the description of the device."""
    device = jax.devices()[0]
    described = records.describe_device()
    bounds = {}
    if case.bytes is not None:
        described["copy_bytes_per_s"] = ceilings.copy_bytes_per_s(device)
        bounds["copy"] = case.bytes / described["copy_bytes_per_s"]
    if case.flops is not None:
        described["matmul_flops_per_s"] = ceilings.matmul_flops_per_s(device, case.dtype)
        bounds["matmul"] = case.flops / described["matmul_flops_per_s"]
    if not bounds:
        return None, described
    described["ceiling"] = max(bounds, key=bounds.__getitem__)
    return bounds[described["ceiling"]], described
