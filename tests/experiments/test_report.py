"""Results: pooled over seeds, pivoted, written into records and pages whose hand-written text stays."""

import json
import re
import shutil
import types

import numpy as np
import pytest

from experiments._machinery import pages, report
from experiments._machinery.cli import main
from experiments._machinery.errors import ExperimentError
from experiments._machinery.files import write_json
from experiments._machinery.records import Cell, Target, pivot, targets_to_json

TARGETS = {"snip 90%": {"error": Target(1.6, "Lee et al., table 1", "paper")}}


def made(folder, name, rows, *, model="lenet", seeds=(0,), smoke=False, targets=TARGETS, commit="abc"):
    """The result of a run: rows are {variant: {metric: one value a seed}}."""
    records = [
        {"variant": variant, "seed": seed, "metrics": {metric: values[i] for metric, values in row.items()}}
        for variant, row in rows.items()
        for i, seed in enumerate(seeds)
    ]
    about = {"versions": {"jax": "1", "commit": commit}, "device": "1 x cpu", "wall_s": 90.0, "shown": []}
    about["command"] = f"python -m experiments run {name} --model {model}"
    config = {"model": model, "seeds": list(seeds), "scores": ["snip"]}
    result = {"experiment": name, "config": config, "smoke": smoke, "records": records}
    write_json(folder / "result.json", result | {"targets": targets_to_json(targets)} | about)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")


def test_pivot_pools_single_seeds_with_means_of_several():
    errors = [1.0, 2.0, 4.0, 8.0, 9.0]
    single = [{"variant": "snip", "seed": s, "metrics": {"error": e}} for s, e in enumerate(errors[:3])]
    rest = np.array(errors[3:])
    several = {"variant": "snip", "seeds": 2, "metrics": {"error": rest.mean()}, "std": {"error": rest.std(ddof=1)}}
    again = {"variant": "snip", "seed": 1, "metrics": {"error": 100.0, "time": 3.0}}
    assert pivot([*single, several, again, {"variant": "dense", "seed": 0, "metrics": {"error": 2.5}}]) == {
        "snip": {
            "error": Cell(pytest.approx(np.mean(errors)), pytest.approx(np.std(errors, ddof=1)), 5),
            "time": Cell(3.0, None, 1),
        },
        "dense": {"error": Cell(2.5, None, 1)},
    }


def test_a_target_says_what_it_is():
    with pytest.raises(ValueError, match="kind must be one of paper, authors' code, reproduction, ours, got 'rumour'"):
        Target(1.0, "heard", "rumour")


def test_report_pools_seeds_and_tells_configurations_apart(tmp_path, capsys):
    runs = tmp_path / "runs"
    made(runs / "a", "snip", {"snip 90%": {"error": [1.0, 2.0, 4.0], "time": [1.0, 1.0, 1.0]}}, seeds=(0, 1, 2))
    made(runs / "b", "snip", {"snip 90%": {"error": [8.0, 9.0]}, "dense": {"error": [3.0, 3.0]}}, seeds=(3, 4))
    made(runs / "repeat", "snip", {"snip 90%": {"error": [100.0]}}, seeds=(1,))
    made(runs / "vgg", "snip", {"snip 90%": {"error": [7.27]}}, model="vgg")
    made(runs / "smoke", "snip", {"snip 90%": {"error": [50.0]}}, smoke=True)
    made(runs / "other", "icm", {"icm": {"energy": [12345.6]}}, targets={})
    write_json(runs / "broken" / "result.json", {})
    found = report.tables(report.collect(runs))
    assert "left out" in capsys.readouterr().err
    assert [table.title for table in found] == ["icm", "snip: model=lenet", "snip: model=vgg"]
    assert found[1].header() == ["variant", "error", "target", "seeds"]  # the time has no target
    assert found[1].lines() == [["snip 90%", "4.8 ± 3.6", "1.6 (paper)", "5"], ["dense", "3 ± 0", "", "2"]]
    assert found[1].sources() == ["paper: Lee et al., table 1"]
    assert main(["report"]) == 0
    text = (runs / "report.md").read_text()
    assert "### snip: model=vgg\n" in text and "| snip 90% | 7.27 | 1.6 (paper) | 1 |" in text and " 50 " not in text
    assert (runs / "report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", "--all"]) == 0
    text = (runs / "report.md").read_text()
    assert "snip (smoke)" in text and "| variant | error | target | time | seeds |" in text


def test_report_writes_records_and_pages_and_keeps_what_is_written_by_hand(tmp_path, capsys):
    made(tmp_path / "runs" / "a", "snip", {"snip 90%": {"error": [1.5]}})
    made(tmp_path / "runs" / "b", "bsn", {"gpn": {"error": [2.5]}}, targets={})
    (tmp_path / "runs" / "a" / "snip.png").write_bytes(b"a figure")
    (tmp_path / "runs" / "a" / "other.png").write_bytes(b"another")
    results = tmp_path / "results"
    assert main(["report", "--write", "results"]) == 0
    assert [path.name for path in (results / "figures").iterdir()] == ["snip.png"]  # what the page shows
    kept = json.loads((results / "records/snip.json").read_text())
    assert kept["headline"] == {"variant": "snip 90%", "metric": "error"} and "folder" not in kept["runs"][0]
    page = results / "snip.md"
    written = page.read_text().replace(" | ".join(pages.VERDICTS), "direction shown")
    written = written.replace("What the run is:", "By hand:")
    claim = "**Claim.** One cut is\nenough.\n\n**Verdict.**"
    page.write_text(re.sub(r"\*\*Claim.*?\*\*Verdict\.\*\*", claim, written, flags=re.DOTALL))
    shutil.rmtree(tmp_path / "runs")
    made(tmp_path / "runs" / "a", "snip", {"snip 90%": {"error": [0.5]}})
    made(tmp_path / "runs" / "vgg", "snip", {"snip 90%": {"error": [7.0]}}, model="vgg")
    assert main(["report", "--write", "results"]) == 0
    text = page.read_text()
    assert "By hand:" in text and "| **model=lenet** |" in text and "| **model=vgg** |" in text
    assert "| snip 90% | 0.5 | 1.6 (paper) | 1 |" in text and "1.5" not in text.partition("<!-- commands -->")[0]
    assert "Target, paper: Lee et al., table 1." in text and text.count("- `python -m experiments run snip") == 2
    index = (results / "README.md").read_text().splitlines()
    (line,) = [line for line in index if line.startswith("| [snip]")]
    assert line == (
        "| [snip](snip.md) | One cut is enough. | 1.6 (paper) | 0.5 (error, snip 90%) | 1 "
        "| *direction shown*: the reason. |"
    )
    assert any(line.startswith("| [bsn](bsn.md)") for line in index)  # its run is elsewhere by now
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    assert main(["report"]) == 0
    shown = capsys.readouterr().out
    assert "there is no folder runs" in shown and "snip: model=vgg" in shown and "gpn" in shown


def test_runs_that_show_one_metric_without_targets_are_columns(tmp_path):
    for model, error in (("lenet", 1.5), ("vgg", 7.0)):
        made(tmp_path / "runs" / model, "bsn", {"gpn": {"error": [error]}}, model=model, targets={})
    made(tmp_path / "runs" / "raw", "bsn", {"raw": {"error": [2.0, 3.0]}}, seeds=(0, 1), targets={})
    assert pages.page_tables(report.tables(report.collect(tmp_path / "runs"))).splitlines() == [
        "| error | model=lenet | model=vgg |",
        "| --- | ---: | ---: |",
        "| raw | 2.5 ± 0.71 |  |",
        "| gpn | 1.5 | 7 |",
        "| seeds | 2 | 1 |",
    ]


def test_runs_of_a_tree_with_changes_are_recorded_on_demand_alone(tmp_path):
    made(tmp_path / "runs" / "a", "snip", {"snip 90%": {"error": [1.5]}}, commit="abc-dirty")
    assert main(["report", "--write", "results"]) == 1
    assert not (tmp_path / "results").exists()
    assert main(["report", "--write", "results", "--allow-dirty"]) == 0
    assert "(with changes that were not committed)" in (tmp_path / "results/snip.md").read_text()
    (record,) = json.loads((tmp_path / "results/records/snip.json").read_text())["runs"]
    assert record["versions"]["commit"] == "abc-dirty"


def test_a_page_without_its_marks_is_named():
    with pytest.raises(ExperimentError, match="the page '# snip' lacks the marks <!-- table --> and <!-- /table -->"):
        pages.with_block("# snip\n\ntext\n", "table", "")


def test_report_of_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(ExperimentError, match="no finished run"):
        report.main(types.SimpleNamespace(folder=tmp_path, all=False, write=None))
