"""The results that are kept: records that hold together, and a page for each experiment that says what they show."""

import json
import re
import shutil

import pytest

from experiments._machinery import pages, registry
from experiments._machinery.records import pivot, targets_from_json
from experiments._machinery.report import RESULTS

NAMES = sorted(path.stem for path in (RESULTS / "records").glob("*.json"))


def test_every_experiment_has_records_and_a_page():
    assert [entry.name for entry in registry.entries()] == NAMES
    assert {path.stem for path in RESULTS.glob("*.md")} == {*NAMES, "README"}


@pytest.mark.parametrize("name", NAMES)
def test_records_have_one_value_of_a_metric_and_targets_for_what_was_measured(name):
    kept = json.loads((RESULTS / "records" / f"{name}.json").read_text())
    headline, found = kept["headline"], []
    for run in kept["runs"]:
        rows = pivot(run["records"])
        values = [(r["variant"], r.get("seed"), metric) for r in run["records"] for metric in r["metrics"]]
        assert len(values) == len(set(values))
        for record in run["records"]:
            assert record.get("std", {}).keys() <= record["metrics"].keys() and (
                "std" not in record or record["seeds"] > 1
            )
        for variant, targets in targets_from_json(run["targets"]).items():
            assert targets.keys() <= rows[variant].keys()
        assert set(run.get("shown", ())) <= {metric for row in rows.values() for metric in row}
        found.append(headline["metric"] in rows.get(headline["variant"], {}))
    assert any(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_a_claim_a_verdict_and_at_most_eighty_lines(name):
    page = (RESULTS / f"{name}.md").read_text()
    assert page.startswith(f"# {name}: ") and pages.said(page, "Claim") and "\n## What differs from the paper" in page
    assert re.match(rf"\*({'|'.join(pages.VERDICTS)})\*: .+\.$", pages.said(page, "Verdict"))
    assert len(page.splitlines()) <= 80 and "](figures/" in page
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (RESULTS / link).exists(), link


def test_tables_and_commands_of_the_pages_are_those_of_the_records(tmp_path):
    copy = shutil.copytree(RESULTS, tmp_path / "results")
    for path in pages.write(copy, [], allow_dirty=False):
        assert path.read_text() == (RESULTS / path.name).read_text(), path.name
