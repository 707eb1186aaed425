"""The recorded results: `records/NAME.json`, a page `NAME.md` an experiment, and `README.md` with one line for each.

What stands between `<!-- table -->` and `<!-- /table -->`, and the same with `commands`, is written here. The rest of
a page is written by hand and kept: its claim, its verdict, what differs from the paper.
"""

import json
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from experiments._machinery import registry
from experiments._machinery.errors import ExperimentError
from experiments._machinery.files import write_json, write_text
from experiments._machinery.report import Table, as_markdown, configuration, header, number, spread, tables

VERDICTS = ("reproduced", "direction shown", "not shown at this size", "contradicted")
INDEX_HEAD = "| experiment | claim | target | ours | seeds | verdict |\n| --- | --- | ---: | ---: | ---: | --- |\n"
PAGE = """\
# {name}: what is measured

**Claim.** {claim}

**Verdict.** *{verdicts}*: the reason.

What the run is: the paper, data, network, steps, and what the numbers are.

<!-- table -->
<!-- /table -->

![what the figure shows](figures/{name}.png)

## What differs from the paper

<!-- commands -->
<!-- /commands -->
"""
INDEX = """\
# Results

One line an experiment; its page has the table, a figure and what differs from the paper.

<!-- table -->
<!-- /table -->
"""


def write(folder: pathlib.Path, results: Sequence[Mapping[str, Any]], *, allow_dirty: bool) -> list[pathlib.Path]:
    """Takes runs into the records, and writes the pages of all records and their index anew.

    Raises:
      ExperimentError: a run was made from a tree with changes that were not committed, and `allow_dirty` is False.
    """
    for result in results:
        commit = result["versions"].get("commit", "unknown")
        if not allow_dirty and (commit == "unknown" or commit.endswith("-dirty")):
            raise ExperimentError(
                f"the run `{result['command']}` was made from a tree with changes that were not committed "
                f"(commit {commit}); commit and run it again, or say --allow-dirty, and the record will say it too"
            )
    for name in dict.fromkeys(result["experiment"] for result in results):
        _record(folder / "records" / f"{name}.json", name, [r for r in results if r["experiment"] == name])
    records = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "records").glob("*.json"))}
    written = []
    for name, kept in records.items():
        path = folder / f"{name}.md"
        text = path.read_text() if path.exists() else skeleton(name)
        runs = [run | {"experiment": name} for run in kept["runs"]]
        text = with_block(text, "table", page_tables(tables(runs)))
        text = with_block(text, "commands", "".join(provenance(run) for run in runs if run.get("command")))
        write_text(path, text)
        written.append(path)
        _take_figures(folder, text, [result["folder"] for result in results if result["experiment"] == name])
    index = folder / "README.md"
    text = index.read_text() if index.exists() else INDEX
    lines = [_line(name, kept, (folder / f"{name}.md").read_text()) for name, kept in records.items()]
    write_text(index, with_block(text, "table", INDEX_HEAD + "".join(lines)))
    return [*written, index]


def skeleton(name: str) -> str:
    """A page whose claim and verdict are still to be written."""
    claims = {entry.name: entry.description for entry in registry.entries()}
    return PAGE.format(name=name, claim=claims.get(name, ""), verdicts=" | ".join(VERDICTS))


def with_block(text: str, name: str, content: str) -> str:
    """The text with other content between its marks `name`; all else stays.

    Raises:
      ExperimentError: the marks are missing.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, opened, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise ExperimentError(f"the page {text.partition(chr(10))[0]!r} lacks the marks {begin.strip()} and {end}")
    return before + begin + content + end + after


def said(page: str, what: str) -> str:
    """What a page says after `**Claim.**` or `**Verdict.**`, as one line."""
    found = re.search(rf"^\*\*{what}\.\*\*(.*?)(?:\n\s*\n|\Z)", page, re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


def page_tables(found: Sequence[Table]) -> str:
    """One Markdown table of an experiment, its runs below one another under their titles, with the targets' sources.

    Where runs show one and the same metric without targets, each is a column instead.
    """
    metrics = list(dict.fromkeys(metric for table in found for metric in table.metrics))
    aimed = {metric for table in found for metric in table.aimed()}
    titles = [table.title.partition(": ")[2] or table.title for table in found]
    if len(metrics) == 1 and len(found) > 1 and not aimed:
        return _by_run(metrics[0], titles, found)
    head, lines = header(metrics, aimed), []
    for title, table in zip(titles, found, strict=True):
        if len(found) > 1:
            lines.append([f"**{title}**", *[""] * (len(head) - 1)])
        lines += table.lines(metrics, aimed)
    sources = dict.fromkeys(source for table in found for source in table.sources())
    return as_markdown(head, lines) + "".join(f"\nTarget, {source}.\n" for source in sources)


def _by_run(metric: str, titles: Sequence[str], found: Sequence[Table]) -> str:
    cells = [{variant: row[metric] for variant, row in table.rows.items() if metric in row} for table in found]
    variants = dict.fromkeys(variant for column in cells for variant in column)
    lines = [[name, *(spread(column[name]) if name in column else "" for column in cells)] for name in variants]
    seeds = ["seeds", *(str(max(cell.seeds for cell in column.values())) for column in cells)]
    return as_markdown([metric, *titles], [*lines, seeds])


def provenance(run: Mapping[str, Any]) -> str:
    """The command, the device, the time and the versions that made a run's numbers, as an entry of a Markdown list."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    dirty = " (with changes that were not committed)" if run["versions"].get("commit", "").endswith("-dirty") else ""
    return f"- `{run['command']}`\n  {run['device']}, {run['wall_s'] / 60:.1f} min; {versions}{dirty}\n"


def _record(path: pathlib.Path, name: str, results: Sequence[Mapping[str, Any]]) -> None:
    """A run of a recorded configuration takes the place of the earlier one; its title stays."""
    kept = json.loads(path.read_text()) if path.exists() else {"experiment": name, "runs": []}
    earlier = {configuration(run): run for run in kept["runs"]}
    fresh: dict[str, list[Any]] = {}
    for result in results:
        fresh.setdefault(configuration(result), []).append(result)
    runs = []
    for key, members in fresh.items():
        about = {field: value for field, value in members[0].items() if field not in ("experiment", "folder")}
        title = {"title": earlier[key]["title"]} if earlier.get(key, {}).get("title") else {}
        runs.append(title | about | {"records": [record for member in members for record in member["records"]]})
    others = [run for run in kept["runs"] if configuration(run) not in fresh]
    record = runs[0]["records"][0]
    shown = runs[0]["shown"] or list(record["metrics"])
    headline = {"headline": {"variant": record["variant"], "metric": shown[0]}}  # until another is chosen by hand
    write_json(path, headline | kept | {"runs": [*others, *runs]})


def _take_figures(folder: pathlib.Path, page: str, runs: Sequence[str]) -> None:
    """Copies the figures that a page shows from the first of the runs that has drawn them."""
    for name in re.findall(r"\]\(figures/([^)]+)\)", page):
        drawn = [path for run in runs if (path := pathlib.Path(run) / name).exists()]
        if drawn:
            (folder / "figures").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(drawn[0], folder / "figures" / name)


def _line(name: str, kept: Mapping[str, Any], page: str) -> str:
    """The line of the index: claim and verdict as the page has them, numbers of the headline or the first target."""
    found = tables(run | {"experiment": name} for run in kept["runs"])
    headline = kept.get("headline")
    aimed = [(variant, metric) for table in found for variant, row in table.targets.items() for metric in row]
    wanted = [(headline["variant"], headline["metric"])] if headline else aimed
    target, ours, seeds = "", "", ""
    for table in found:
        for variant, metric in wanted:
            if not ours and metric in table.rows.get(variant, {}):
                cell, aim = table.rows[variant][metric], table.targets.get(variant, {}).get(metric)
                ours, seeds = f"{spread(cell)} ({metric}, {variant})", str(cell.seeds)
                target = f"{number(aim.value)} ({aim.kind})" if aim else ""
    cells = [f"[{name}]({name}.md)", said(page, "Claim"), target, ours, seeds, said(page, "Verdict")]
    return "| " + " | ".join(cells) + " |\n"
