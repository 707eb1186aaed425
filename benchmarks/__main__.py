"""Runs benchmarks and compares their records.

python -m benchmarks list
python -m benchmarks run NAME --out FILE.json [--case PATTERN] [--quick]
python -m benchmarks compare OLD.json NEW.json
python -m benchmarks report [--write]
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._machinery import compare, results

HERE = pathlib.Path(__file__).resolve().parent
CASES = HERE / "cases"
EXIT_SLOWER = 1
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None, *, folder: pathlib.Path = CASES) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures jaxlib_methods beside its peers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show the benchmarks")
    run = commands.add_parser("run", help="measure, show a table and write the records")
    run.add_argument("name", metavar="NAME", help="a benchmark of `list`")
    run.add_argument("--out", type=pathlib.Path, metavar="FILE.json", help="write the records here (default: nowhere)")
    run.add_argument("--case", default="*", metavar="PATTERN", help="only the cases that match this shell pattern")
    run.add_argument("--quick", action="store_true", help="few samples, and no large cases")
    against = commands.add_parser(
        "compare", help="what got slower or faster; exit code 1 when something got clearly slower"
    )
    against.add_argument("old", type=pathlib.Path, metavar="OLD.json")
    against.add_argument("new", type=pathlib.Path, metavar="NEW.json")
    report = commands.add_parser("report", help="show the table of RESULTS.md, made from the records that are kept")
    report.add_argument("--write", action="store_true", help="put it into RESULTS.md")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            return _list(folder)
        if options.command == "compare":
            return _compare(_read(options.old), _read(options.new))
        if options.command == "report":
            return _report(folder, options.write)
        return _run(folder, options.name, options.out, options.case, options.quick)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


class UsageError(Exception):
    """What the user can put right; shown as one line."""


def _list(folder: pathlib.Path) -> int:
    table = Table("benchmark", "measures")
    for name, benchmark in results.discover(folder).items():
        table.add_row(name, benchmark.line)
    _console().print(table)
    return 0


def _run(folder: pathlib.Path, name: str, out: pathlib.Path | None, pattern: str, quick: bool) -> int:
    found = results.discover(folder)
    if name not in found:
        raise UsageError(f"NAME must be a benchmark, got {name!r}; there are: {', '.join(found)}")
    if out is not None:
        _check_writable(out)
    import jax  # after the checks: a mistyped name is told at once

    from benchmarks.timing import Options

    # Times to compile are part of the records, so nothing may come from a cache of earlier runs.
    jax.config.update("jax_enable_compilation_cache", False)
    options = Options(case=pattern, quick=quick)
    records = []
    for record in _load(name, found[name].path).run(options):
        records.append(dataclasses.asdict(record))
        if out is not None:  # after every record: what a long run has measured survives its end
            _write(out, records)
    if not records:
        raise UsageError(f"--case must match a case of {name}, got {pattern!r}, which left nothing to measure")
    for table in _tables(records):
        _console().print(table)
    for message in options.notes:
        print(f"note: {message}")
    return 0


def _compare(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> int:
    for warning in compare.differences(old, new):
        print(f"warning: {warning}", file=sys.stderr)
    changes = compare.compare(old, new)
    table = Table("benchmark", "case", "implementation", title="time, then and now")
    for title in ("old ms", "new ms", "new/old", "against peers", "noise"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    colours = {"slower": "red", "faster": "green"}
    for c in changes:
        growth = None if c.old_ms is None or c.new_ms is None else c.new_ms / c.old_ms
        noise = "" if c.noise is None else f"±{c.noise:.0%}"
        numbers = (_short(c.old_ms), _short(c.new_ms), _short(growth), _short(c.against_peers), noise)
        table.add_row(c.benchmark, c.case, c.implementation, *numbers, c.verdict, style=colours.get(c.verdict))
    _console().print(table)
    slower = sum(c.verdict == "slower" for c in changes)
    print(f"{slower} of {len(changes)} clearly slower")
    return EXIT_SLOWER if slower else 0


def _report(folder: pathlib.Path, write: bool) -> int:
    """RESULTS.md is a head that people write and the table, which ends it."""
    table = results.table(results.discover(folder), HERE / "records")
    if write:
        file = HERE / "RESULTS.md"
        head = file.read_text(encoding="utf-8").partition("| benchmark |")[0]
        file.write_text(head + table, encoding="utf-8")
    else:
        print(table, end="")
    return 0


def _load(name: str, path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks.cases.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by its name
    spec.loader.exec_module(module)
    return module


def _tables(records: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """One table for each case; the ratios of the first row, ours, to all others, and of the others to it."""
    for case, group in itertools.groupby(records, key=lambda r: r["case"]):
        rows = list(group)
        table = Table(title=f"{records[0]['benchmark']}  {case}", title_justify="left")
        table.add_column("implementation", no_wrap=True)
        for title in ("median ms", "lower ms", "compile ms", "peak MiB", "ceiling", "error"):
            table.add_column(title, justify="right")
        table.add_column("other's time / this", no_wrap=True)
        for r in rows:
            peak = None if r["peak_bytes"] is None else r["peak_bytes"] / 2**20
            ceiling = ""
            if r["fraction_of_ceiling"] is not None:
                ceiling = f"{r['fraction_of_ceiling']:.2g} {r['device']['ceiling']}"
            numbers = (_short(r["median_ms"]), _short(r["lower_ms"]), _short(r["compile_ms"]), _short(peak), ceiling)
            shown = {
                name: ratio
                for name, ratio in r["ratios"].items()
                if rows[0]["implementation"] in (name, r["implementation"])
            }
            ratios = "\n".join(f"{_short(ratio):>6} {name}" for name, ratio in shown.items())
            table.add_row(r["implementation"], *numbers, _short(r["error"]), ratios)
        yield table


def _console() -> Console:
    """Wide enough for the tables where there is no terminal that says how wide it is."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _short(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}"


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    needed = {"benchmark", "case", "implementation", "samples_ms", "median_ms", "versions", "device"}
    if not isinstance(records, list) or not all(isinstance(r, dict) and needed <= r.keys() for r in records):
        raise UsageError(f"{path} is not a list of benchmark records; write one with `run NAME --out {path}`")
    return records


def _check_writable(out: pathlib.Path) -> None:
    """Before any measurement, not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    if out.is_dir():
        raise UsageError(f"--out must be a file, got the folder {out}")


def _write(out: pathlib.Path, records: Sequence[Mapping[str, Any]]) -> None:
    """All of the file or nothing of it: a reader never sees half a list. One record a line, times to the nanosecond."""
    lines = [json.dumps(_rounded(record), allow_nan=False) for record in records]
    with tempfile.NamedTemporaryFile("w", dir=out.parent, prefix=f".{out.name}.", delete=False, encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(lines) + "\n]\n")
    os.chmod(f.name, 0o644)  # temporary files are for their owner only
    os.replace(f.name, out)


def _rounded(record: Mapping[str, Any]) -> dict[str, Any]:
    clock = lambda value: [round(ms, 6) for ms in value] if isinstance(value, list) else value and round(value, 6)
    return {key: clock(value) if key.endswith("_ms") else value for key, value in record.items()}


if __name__ == "__main__":
    sys.exit(main())
