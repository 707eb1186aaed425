"""The table of all benchmarks in `RESULTS.md`: what each case calls its headlines, from the newest records kept."""

import ast
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Headline(NamedTuple):
    """One row of the table: an implementation beside its peers.

    `aim` is for the first peer: its time over ours is to be at least this; None where no aim was set.
    """

    case: str
    ours: str
    peers: tuple[str, ...]
    aim: float | None = None


class Benchmark(NamedTuple):
    """What is read of a case's file without importing it."""

    path: pathlib.Path
    line: str  # the first of its docstring
    headlines: tuple[Headline, ...]


def discover(folder: pathlib.Path) -> dict[str, Benchmark]:
    """Benchmark's name -> what its file says: every module of the folder that defines `run(options)`.

    The files are parsed, not imported, so that `list` is quick and one broken benchmark does not hide the others.
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in module.body):
            line = (ast.get_docstring(module) or "").partition("\n")[0]
            found[path.stem] = Benchmark(path, line, tuple(Headline(*row) for row in _constant(module, "HEADLINES")))
    return found


def newest(folder: pathlib.Path, benchmark: str) -> list[dict[str, Any]]:
    """The records of the benchmark in the last of the folders `<date>-<device>` that has any."""
    files = sorted(folder.glob(f"*/{benchmark}.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else []


def table(benchmarks: Mapping[str, Benchmark], folder: pathlib.Path) -> str:
    """The Markdown table: each headline's ratios as recorded, its aim, and whether it was met."""
    titles = ("benchmark", "case", "ours", "a peer's time over ours", "aim", "met", "device", "date")
    rows = [titles, ("---",) * len(titles)]
    for name, benchmark in benchmarks.items():
        rows += _rows(name, benchmark.headlines, newest(folder, name))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _rows(name: str, headlines: tuple[Headline, ...], records: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    first = f"[{name}](results/{name}.md)"
    by_key = {(record["case"], record["implementation"]): record for record in records}
    if not records:
        yield first, "", "", "not measured", "", "", "", ""
        return
    for headline in headlines:
        record = by_key[headline.case, headline.ours]
        ratios, device = record["ratios"], record["device"]
        shown = ", ".join(f"{peer} {_short(ratios[peer])}" for peer in headline.peers)
        aim = met = ""
        if headline.aim is not None:
            aim = f"{headline.peers[0]} ≥ {headline.aim:g}"
            met = "yes" if ratios[headline.peers[0]] >= headline.aim else "no"
        cores = f"{device['cores']} core{'s' * (device['cores'] > 1)}"
        where = f"CPU, {cores}" if device["platform"] == "cpu" else device["kind"]
        yield first, headline.case, headline.ours, shown, aim, met, where, record["date"][:10]
        first = ""  # a benchmark's rows stand together under its name


def _short(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:,.0f}"


def _constant(module: ast.Module, name: str) -> Any:
    """The literal that the module binds to the name; empty without one."""
    for node in module.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    return ()
