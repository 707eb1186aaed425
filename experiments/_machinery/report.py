"""Tables of results: one a run, rows are variants, columns metrics, targets beside with what they are."""

import json
import math
import pathlib
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments._machinery.errors import ExperimentError
from experiments._machinery.files import write_text
from experiments._machinery.records import Cell, Targets, pivot, targets_from_json

# Runs that differ in these alone are one.
POOLED = ("seed", "seeds", "data_dir", "download", "tensorboard")
RESULTS = pathlib.Path(__file__).parent.parent / "results"


class Table(NamedTuple):
    """The results of one configuration of an experiment."""

    experiment: str
    title: str  # the experiment's name, with what tells the configuration from its others
    rows: dict[str, dict[str, Cell]]
    targets: Targets
    metrics: Sequence[str]  # the columns

    def header(self) -> list[str]:
        """The first line; a metric with targets is followed by a column of them."""
        return header(self.metrics, self.aimed())

    def lines(self, metrics: Sequence[str] | None = None, aimed: Collection[str] | None = None) -> list[list[str]]:
        """One line a variant, as text; of other columns than the table's own where they are given."""
        metrics, aimed = metrics or self.metrics, self.aimed() if aimed is None else aimed
        found = []
        for variant, row in self.rows.items():
            cells = []
            for metric in metrics:
                cells.append(spread(row[metric]) if metric in row else "")
                if metric in aimed:
                    target = self.targets.get(variant, {}).get(metric)
                    cells.append(f"{number(target.value)} ({target.kind})" if target else "")
            shown = [row[metric].seeds for metric in metrics if metric in row]
            if shown:
                found.append([variant, *cells, str(max(shown))])
        return found

    def aimed(self) -> set[str]:
        """The shown metrics that have a target."""
        return {metric for row in self.targets.values() for metric in row if metric in self.metrics}

    def sources(self) -> list[str]:
        """Where the targets of the shown metrics stand, each once."""
        shown = (
            f"{target.kind}: {target.source}"
            for row in self.targets.values()
            for metric, target in row.items()
            if metric in self.metrics
        )
        return list(dict.fromkeys(shown))

    def markdown(self) -> str:
        """The table alone."""
        return as_markdown(self.header(), self.lines())


def header(metrics: Sequence[str], aimed: Collection[str]) -> list[str]:
    """The first line of a table with these columns; `aimed` are those with targets."""
    columns = [[name, "target"] if name in aimed else [name] for name in metrics]
    return ["variant", *(name for pair in columns for name in pair), "seeds"]


def as_markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lines of cells below a first line."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [head, rule, *lines])


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Every `result.json` under the folder and its own "folder"; one that cannot be read is named and left out."""
    if not folder.is_dir():
        raise ExperimentError(f"there is no folder {folder}; run an experiment first, or name another folder")
    results = []
    for path in sorted(folder.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            result["experiment"], result["records"], result["targets"], result["config"]
        except (ValueError, KeyError, TypeError) as error:
            print(f"left out {path}: not a result of this runner ({error!r})", file=sys.stderr)
        else:
            results.append(result | {"folder": str(path.parent)})
    return sorted(results, key=lambda result: result["experiment"])


def recorded() -> list[dict[str, Any]]:
    """The runs under `results/records`, each with its experiment's name."""
    found = []
    for path in sorted((RESULTS / "records").glob("*.json")):
        kept = json.loads(path.read_text())
        found += [run | {"experiment": kept["experiment"]} for run in kept["runs"]]
    return found


def configuration(run: Mapping[str, Any]) -> str:
    """What makes two runs one: the configuration without where the data lie and which seeds were drawn."""
    config = {name: value for name, value in run["config"].items() if name not in POOLED}
    return json.dumps(config, sort_keys=True)


def tables(results: Iterable[Mapping[str, Any]], *, everything: bool = False, with_smoke: bool = False) -> list[Table]:
    """One table for each configuration of each experiment; runs that differ in their seeds alone are pooled.

    The columns are what the method says it shows; else the metrics with a target; where there is none, or on request,
    all of them.
    """
    groups: dict[tuple[str, bool, str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        smoke = bool(result.get("smoke"))
        if with_smoke or not smoke:
            key = (result["experiment"], smoke, configuration(result), result.get("title", ""))
            groups.setdefault(key, []).append(result)
    found = []
    for (experiment, smoke, config, title), members in groups.items():
        members = sorted(members, key=lambda member: -len(member["records"]))
        targets: dict[str, Any] = {}
        for member in members:
            for variant, row in targets_from_json(member["targets"]).items():
                targets[variant] = {**targets.get(variant, {}), **row}
        rows = pivot(record for member in members for record in member["records"])
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        aimed = [metric for metric in metrics if any(metric in row for row in targets.values())]
        shown = [metric for metric in members[0].get("shown") or aimed or metrics if metric in metrics]
        others = [json.loads(key[2]) for key in groups if key[:2] == (experiment, smoke) and key[2] != config]
        about = title or what_differs(json.loads(config), others)
        label = experiment + (" (smoke)" if smoke else "") + (f": {about}" if about else "")
        found.append(Table(experiment, label, rows, targets, metrics if everything else shown))
    return found


def what_differs(config: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The options that tell a configuration from others, and their values."""
    names = [name for name, value in config.items() if any(other.get(name) != value for other in others)]
    # Lists (sparsities, scores) are what a run sweeps over, and its variants are named after them.
    names = [name for name in names if not isinstance(config[name], list)] or names
    return ", ".join(f"{name}={config[name]}" for name in names)


def number(value: float, digits: int = 4) -> str:
    """So many digits, or all in front of the point."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.{max(digits, _place(value) + 1)}g}"


def spread(cell: Cell) -> str:
    """The mean with as many digits as the standard deviation leaves it, four at most, and that with two."""
    if not cell.std or not cell.mean:
        return number(cell.mean) + ("" if cell.std is None else f" ± {number(cell.std, 2)}")
    digits = min(4, max(2, _place(cell.mean) - _place(cell.std) + 2))
    return f"{number(cell.mean, digits)} ± {number(cell.std, 2)}"


def _place(value: float) -> int:
    """The power of ten of the first digit."""
    return math.floor(math.log10(abs(value))) if value else 0


def print_tables(found: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Rich

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no right border to wrap at
    for table in found:
        shown = Rich(title=escape(table.title), title_justify="left")
        for i, name in enumerate(table.header()):
            shown.add_column(escape(name), justify="right" if i else "left", overflow="fold")
        for cells in table.lines():
            shown.add_row(*map(escape, cells))  # rich would read "[0, 1]" as a style
        console.print(shown)


def figure(found: Sequence[Table], path: pathlib.Path) -> None:
    """The same tables as a picture; one block of monospaced text, because drawing cell by cell takes seconds."""
    from experiments._machinery import plots

    body = []
    for table in found:
        cells = [table.header(), *table.lines()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        aligned = ["   ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
        body += [table.title, "\u2500" * len(aligned[0]), *aligned, ""]
    size = 0.075 * max(map(len, body)) + 0.4, 0.16 * len(body) + 0.3
    canvas, ((place,),) = plots.axes(size=size)
    place.axis("off")
    place.text(0, 1, "\n".join(body), family="monospace", fontsize=8, va="top", linespacing=1.3)
    plots.save(path, canvas)


def main(options: Any) -> int:
    """The `report` command."""
    from experiments._machinery import pages

    folder = pathlib.Path(options.folder or "runs")
    if options.folder is None and not folder.is_dir():
        results = recorded()
        print(f"there is no folder runs; these are the results under {RESULTS}")
    else:
        results = collect(folder)
    found = tables(results, everything=options.all, with_smoke=options.all)
    if not found:
        raise ExperimentError(f"no finished run under {folder} (smoke runs show with --all)")
    print_tables(found)
    if folder.is_dir():
        text = "\n".join(f"### {table.title}\n\n{table.markdown()}" for table in found)
        write_text(folder / "report.md", text)
        figure(found, folder / "report.png")
        print(f"also as {folder / 'report.md'} and {folder / 'report.png'}")
    if options.write:
        kept = [result for result in results if not result.get("smoke")] if folder.is_dir() else []
        written = pages.write(pathlib.Path(options.write), kept, allow_dirty=options.allow_dirty)
        print(f"wrote {', '.join(shlex.quote(str(path)) for path in written)}")
    return 0
