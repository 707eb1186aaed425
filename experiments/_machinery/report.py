"""One table of all results under a folder: ours, the paper's, the difference, the seeds; terminal, Markdown and PNG."""

import itertools
import json
import pathlib
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from experiments._machinery.errors import ExperimentError
from experiments._machinery.files import write_text

# Runs that differ in these alone are one experiment.
POOLED = ("seed", "seeds", "data_dir", "download", "tensorboard")
HEADER = ("experiment", "metric", "ours", "paper", "difference", "seeds")


class Row(NamedTuple):
    experiment: str
    metric: str
    mean: float
    std: float | None  # over seeds
    paper: float | None
    seeds: int

    def cells(self) -> tuple[str, ...]:
        ours = _number(self.mean) + (f" ± {_number(self.std)}" if self.std is not None else "")
        if self.paper is None:
            return self.experiment, self.metric, ours, "", "", str(self.seeds)
        return (
            self.experiment, self.metric, ours, _number(self.paper), f"{self.mean - self.paper:+.4g}", str(self.seeds),
        )  # fmt: skip


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Every `result.json` under the folder, by experiment; one that cannot be read is named on stderr and left out."""
    if not folder.is_dir():
        raise ExperimentError(f"there is no folder {folder}; run an experiment first, or name another folder")
    results = []
    for path in sorted(folder.rglob("result.json")):
        try:
            result = json.loads(path.read_text())
            result["experiment"], result["metrics"], result["paper"], result["seeds"], result["config"]
        except (ValueError, KeyError, TypeError) as error:
            print(f"left out {path}: not a result of this runner ({error!r})", file=sys.stderr)
        else:
            results.append(result)
    return sorted(results, key=lambda result: result["experiment"])


def rows(results: Iterable[dict[str, Any]], *, everything: bool = False, with_smoke: bool = False) -> list[Row]:
    """The table's rows, grouped by experiment and configuration; runs that differ in the seed alone are pooled.

    Metrics that the paper gives come first. Those it does not give are shown where the experiment has no number of the
    paper at all, or on request.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        if with_smoke or not result.get("smoke"):
            config = {name: value for name, value in result["config"].items() if name not in POOLED}
            label = result["experiment"] + (" (smoke)" if result.get("smoke") else "")
            groups.setdefault((label, json.dumps(config, sort_keys=True)), []).append(result)
    table = []
    for (experiment, config), members in sorted(groups.items()):
        members = _disjoint(members)
        others = [json.loads(other) for name, other in groups if name == experiment and other != config]
        label = experiment + _what_differs(json.loads(config), others)
        paper = {name: value for member in members for name, value in member["paper"].items()}
        names = dict.fromkeys(name for member in members for name in member["metrics"])
        names = [name for name in names if not (name.endswith("_std") and name.removesuffix("_std") in names)]
        shared = [name for name in names if name in paper]
        rest = [name for name in names if name not in paper] if everything or not shared else []
        table += [_pooled(label, name, members, paper.get(name)) for name in shared + rest]
    return table


def _disjoint(members: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with the most seeds first, without those that repeat a seed."""
    chosen: list[dict[str, Any]] = []
    for member in sorted(members, key=lambda member: -len(member["seeds"])):
        if not any(set(member["seeds"]) & set(other["seeds"]) for other in chosen):
            chosen.append(member)
    return chosen


def _pooled(label: str, name: str, members: list[dict[str, Any]], paper: float | None) -> Row:
    members = [member for member in members if name in member["metrics"]]
    seeds = sum(len(member["seeds"]) for member in members)
    if len(members) == 1:
        metrics = members[0]["metrics"]
        return Row(label, name, metrics[name], metrics.get(f"{name}_std"), paper, seeds)
    weights = [len(member["seeds"]) for member in members]
    values = [member["metrics"][name] for member in members]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / seeds
    # Within-run and between-run sums of squares: the standard deviation over all seeds together.
    within = sum(
        (w - 1) * member["metrics"].get(f"{name}_std", 0.0) ** 2 for w, member in zip(weights, members, strict=True)
    )
    between = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    return Row(label, name, mean, ((within + between) / (seeds - 1)) ** 0.5, paper, seeds)


def _what_differs(config: dict[str, Any], others: list[dict[str, Any]]) -> str:
    names = [name for name, value in config.items() if any(other.get(name) != value for other in others)]
    # Lists (sparsities, scores) are what a run sweeps over, and its metrics are named after them.
    names = [name for name in names if not isinstance(config[name], list)] or names
    return " [" + ", ".join(f"{name}={config[name]}" for name in names) + "]" if names else ""


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def print_table(table: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log has no right border to wrap at
    shown = Table()
    for i, name in enumerate(HEADER):
        shown.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    last = None
    for row in table:
        if last not in (None, row.experiment):
            shown.add_section()
        cells = row.cells() if row.experiment != last else ("", *row.cells()[1:])
        shown.add_row(*map(escape, cells))  # rich would read "[model=lenet5]" as a style
        last = row.experiment
    console.print(shown)


def markdown(table: list[Row], earlier: Mapping[str, list[str]] | None = None) -> str:
    """A table for each experiment; those `earlier` ones (label -> rows, lines of Markdown) are put in by name."""
    groups = {**(earlier or {}), **_lines(table)}
    head = "| " + " | ".join(HEADER[1:]) + " |\n| --- | ---: | ---: | ---: | ---: |"
    return "\n".join(f"### {label}\n\n{head}\n" + "\n".join(groups[label]) + "\n" for label in sorted(groups))


def _lines(table: list[Row]) -> dict[str, list[str]]:
    """Rows by label, as lines of Markdown."""
    groups: dict[str, list[str]] = {}
    for row in table:
        groups.setdefault(row.experiment, []).append("| " + " | ".join(row.cells()[1:]) + " |")
    return groups


def provenance(results: list[dict[str, Any]], earlier: Iterable[str] = ()) -> str:
    """Per run: the command, the device, the time, the versions that made its numbers."""
    lines = []
    for result in results:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        minutes = result["wall_s"] / 60
        lines.append(f"- `{result['command']}`\n  {result['device']}, {minutes:.1f} min; {versions}")
    name = lambda line: line.partition(" run ")[2].partition(" ")[0]
    return "\n".join(sorted([*lines, *earlier], key=name)) + "\n"


def earlier_rows(
    path: pathlib.Path, table: list[Row], results: list[dict[str, Any]]
) -> tuple[dict[str, list[str]], list[str]]:
    """Tables (label -> rows) and commands in `path` that the new ones do not replace, as lines of Markdown."""
    text = path.read_text() if path.exists() else ""
    body, _, commands = text.removesuffix(notes(path)).partition("## Commands\n")
    new, made = _lines(table), {result["command"] for result in results}
    groups = {}
    for section in body.split("\n### ")[1:]:
        label, *lines = section.splitlines()
        groups[label] = [line for line in lines if line.startswith("| ")][2:]
    entries = ["- " + entry.rstrip() for entry in commands.strip().removeprefix("- ").split("\n- ") if entry]
    # A further run of an experiment may give its earlier ones longer labels: the same rows under another label.
    kept = {label: rows for label, rows in groups.items() if label not in new and rows not in new.values()}
    return kept, [entry for entry in entries if entry.split("`")[1] not in made]


def notes(path: pathlib.Path) -> str:
    """The hand-written section `## Notes` at the end of an earlier table, which a new one keeps."""
    text = path.read_text() if path.exists() else ""
    at = text.find("\n## Notes\n")
    return text[at:] if at >= 0 else ""


def figure(table: list[Row], path: pathlib.Path) -> None:
    """The same table as a picture; one block of monospaced text, because drawing cell by cell takes seconds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cells = [HEADER, *(row.cells() for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    align = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.rjust]
    lines = ["   ".join(f(text, w) for f, text, w in zip(align, row, widths, strict=True)) for row in cells]
    rule = "\u2500" * len(lines[0])
    groups = [rule if above.experiment != below.experiment else "" for above, below in itertools.pairwise(table)]
    body = [text for line, after in zip(lines[1:], [*groups, rule], strict=True) for text in (line, after) if text]
    canvas = pyplot.figure(figsize=(0.075 * len(rule) + 0.4, 0.16 * (len(body) + 2) + 0.3))
    text = "\n".join([lines[0], rule, *body])
    canvas.text(0.5, 0.5, text, family="monospace", fontsize=8, ha="center", va="center", linespacing=1.3)
    canvas.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)
    pyplot.close(canvas)


def main(options: Any) -> int:
    """The `report` command."""
    folder = pathlib.Path(options.folder)
    results = collect(folder)
    table = rows(results, everything=options.all, with_smoke=options.all)
    if not table:
        raise ExperimentError(f"no finished run under {folder} (smoke runs show with --all)")
    print_table(table)
    kept = [result for result in results if options.all or not result.get("smoke")]
    text = markdown(table)
    write_text(folder / "report.md", text)
    figure(table, folder / "report.png")
    print(f"also as {folder / 'report.md'} and {folder / 'report.png'}")
    if options.write:
        flags = [f"--{name}" for name in ("all", "keep") if getattr(options, name)]
        made = "python -m experiments report " + shlex.join([str(folder), *flags, "--write", options.write])
        head = (
            "# Results\n\nWritten by a command, but for the notes at the end. `difference` is ours minus the paper's; "
            "± is the standard deviation over seeds.\n"
        )
        path = pathlib.Path(options.write)
        old_rows, old_commands = earlier_rows(path, table, kept) if options.keep else ({}, [])
        text = markdown(table, old_rows)
        body = f"{head}\n    {made}\n\n{text}\n## Commands\n\n{provenance(kept, old_commands)}"
        write_text(path, body + notes(path))
        print(f"wrote {options.write}")
    return 0
