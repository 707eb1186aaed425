"""The command line: list, run, report; every refusal is one sentence on stderr."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from experiments.__main__ import main
from experiments._machinery import cases, registry, report, runner
from experiments._machinery.checkpoint import claim
from experiments._machinery.errors import ExperimentError, WorkdirError

EXPERIMENT = str(pathlib.Path(__file__).parent / "logistic_on_digits.py")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "set by conftest")
    monkeypatch.chdir(tmp_path)


def sentence(capsys):
    """The one line that a refused command prints, and nothing else."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_list_is_instant_because_it_imports_neither_jax_nor_the_experiments():
    program = "import sys; from experiments.__main__ import main; main(['list']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=registry.FOLDER.parent, check=True, timeout=20)


def test_helpers_are_not_experiments(tmp_path, monkeypatch, capsys):
    shutil.copy(EXPERIMENT, tmp_path / "logistic.py")
    (tmp_path / "helper.py").write_text("class Config: pass\n")
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    description = "Logistic regression on the bundled digits: the smallest experiment, private to the tests."
    assert registry.entries() == [("logistic", description, "none")]
    assert main(["list"]) == 0
    assert "Logistic regression on the bundled digits" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_every_experiment_has_what_the_runner_needs(entry):
    module = registry.load(entry.name)
    assert entry.description and entry.paper, f"{entry.name}: its docstring needs a first line and a line Paper:"
    assert isinstance(module.SMOKE, dict) and module.PAPER is not None
    assert dataclasses.fields(module.Config(**module.SMOKE))


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """One smoke run with an explicit option on top; read by several tests."""
    workdir = tmp_path_factory.mktemp("run")
    assert main(["run", EXPERIMENT, "--smoke", "--seeds", "3", "--workdir", str(workdir)]) == 0
    return workdir


def test_result_has_exactly_the_agreed_keys(smoke_run):
    result = json.loads((smoke_run / "result.json").read_text())
    assert tuple(result) == runner.RESULT_KEYS
    assert result["experiment"] == "logistic_on_digits" and result["smoke"] is True
    assert result["seeds"] == [0, 1, 2] and result["paper"] == {"test_error": 5.0}
    assert result["config"]["steps"] == 40 and result["config"]["seeds"] == 3  # SMOKE, and the option above it
    assert result["command"].startswith("python -m experiments run ") and result["command"].endswith(str(smoke_run))
    assert {"jax", "python", "commit"} <= set(result["versions"]) and "cpu" in result["device"]
    errors = [json.loads((smoke_run / f"seed-{s}" / "metrics.json").read_text())["test_error"] for s in range(3)]
    assert result["metrics"]["test_error"] == pytest.approx(np.mean(errors))
    assert result["metrics"]["test_error_std"] == pytest.approx(np.std(errors, ddof=1))


def test_a_finished_run_is_read_back_and_its_checkpoints_are_gone(smoke_run, capsys):
    before = (smoke_run / "result.json").stat().st_mtime_ns
    assert main(["run", EXPERIMENT, "--smoke", "--seeds", "3", "--workdir", str(smoke_run)]) == 0
    assert "holds the finished run" in capsys.readouterr().out
    assert (smoke_run / "result.json").stat().st_mtime_ns == before
    assert not (smoke_run / "seed-0" / "checkpoints").exists()


def test_another_configuration_is_refused_with_the_fields_that_differ(smoke_run, capsys):
    assert main(["run", EXPERIMENT, "--smoke", "--workdir", str(smoke_run), "--learning-rate", "0.5"]) == 1
    message = sentence(capsys)
    assert "learning_rate was 0.02 and is now 0.5; seeds was 3 and is now 2" in message and "batch_size" not in message


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", EXPERIMENT, "--learning-rate", "-1"], 2, "learning_rate must be positive, got -1.0; try 0.02"),
        (["run", "snop"], 1, "unknown experiment 'snop'; known are"),
        (["run", "no/such.py"], 1, "there is no file no/such.py"),
        (["run", EXPERIMENT, "--dataset", "minst"], 1, "unknown data set 'minst'"),
        (["run", EXPERIMENT, "--workdir", "/dev/null/run"], 1, "the workdir /dev/null/run cannot be written"),
        (["report", "nowhere"], 1, "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_sentence(arguments, code, message, capsys):
    assert main(arguments) == code
    assert message in sentence(capsys)


@pytest.mark.parametrize(
    "arguments", [["run", EXPERIMENT, "--learning-rate", "much"], ["run", EXPERIMENT, "--rate", "1"]]
)
def test_options_that_do_not_parse_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(WorkdirError, match=r"disk of the workdir .* is full \(1000 bytes free\)"):
        claim(tmp_path / "run", {})


def test_where_the_data_lie_is_not_part_of_a_configuration(tmp_path):
    claim(tmp_path, {"steps": 3, "data_dir": "/a", "path": pathlib.Path("x"), "sizes": (1, 2)})
    claim(tmp_path, {"steps": 3, "data_dir": "/b", "path": pathlib.Path("x"), "sizes": (1, 2)})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WorkdirError, match="is not JSON"):
        claim(tmp_path, {})


def test_a_finished_case_is_not_run_again(tmp_path):
    calls = []

    def case(folder):
        calls.append(folder)
        return {"error": 1.5, "sizes": (1, 2)}

    first, second = (cases.run_or_load(tmp_path / "a", case) for _ in range(2))
    assert first == second == {"error": 1.5, "sizes": [1, 2]} and calls == [tmp_path / "a"]
    (tmp_path / "a" / "metrics.json").write_text("{")
    with pytest.raises(WorkdirError, match="delete it to run this case again"):
        cases.run_or_load(tmp_path / "a", case)


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "lenet"
    seeds: tuple[int, ...] = (0,)


def made(folder, name, errors, *, model="lenet", seeds=(0,), smoke=False, paper=None):
    values = {"experiment": name, "config": Config(model, tuple(seeds)), "metrics": errors, "paper": paper or {}}
    command = f"python -m experiments run {name} --model {model}"
    return runner.write_result(folder, **values, command=command, wall_s=90.0, smoke=smoke)


def test_report_pools_seeds_and_tells_configurations_apart(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    errors = [1.0, 2.0, 4.0, 8.0, 9.0]
    made(runs / "a", "snip", {"error": errors[:3], "time": 1.0}, seeds=(0, 1, 2), paper={"error": 1.6})
    made(runs / "b", "snip", {"error": errors[3:], "time": 1.0}, seeds=(3, 4), paper={"error": 1.6})
    made(runs / "repeat", "snip", {"error": 100.0}, seeds=(1,), paper={"error": 1.6})
    made(runs / "vgg", "snip", {"error": 7.27}, model="vgg", paper={"error": 7.27})
    made(runs / "smoke", "snip", {"error": 50.0}, smoke=True, paper={"error": 1.6})
    made(runs / "other", "icm", {"energy": 12345.6})
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{}")
    table = report.rows(report.collect(runs))
    assert "left out" in capsys.readouterr().err
    assert [(row.experiment, row.metric) for row in table] == [
        ("icm", "energy"), ("snip [model=lenet]", "error"), ("snip [model=vgg]", "error"),
    ]  # fmt: skip
    assert table[1].mean == pytest.approx(np.mean(errors)) and table[1].std == pytest.approx(np.std(errors, ddof=1))
    assert table[1].seeds == 5 and table[2].std is None
    assert table[1].cells() == ("snip [model=lenet]", "error", "4.8 ± 3.564", "1.6", "+3.2", "5")

    assert main(["report", "runs", "--write", "RESULTS.md"]) == 0
    results = pathlib.Path("RESULTS.md").read_text()
    assert "python -m experiments report runs --write RESULTS.md" in results
    with pathlib.Path("RESULTS.md").open("a") as file:
        file.write("\n## Notes\n\nWritten by hand.\n")
    assert main(["report", "runs", "--write", "RESULTS.md"]) == 0
    assert pathlib.Path("RESULTS.md").read_text() == results + "\n## Notes\n\nWritten by hand.\n"
    assert "### snip [model=vgg]\n" in results and "| error | 7.27 | 7.27 | +0 | 1 |" in results
    assert "snip [model=vgg]" in capsys.readouterr().out
    assert "`python -m experiments run snip --model vgg`" in results and "1.5 min" in results
    assert " 50 " not in results
    assert (runs / "report.md").read_text() in results
    assert (runs / "report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", "runs", "--all"]) == 0
    assert "snip (smoke)" in (runs / "report.md").read_text() and "time" in (runs / "report.md").read_text()


def test_report_keeps_rows_of_runs_that_are_elsewhere(tmp_path, capsys):
    for name, value in (("snip", 1.5), ("bsn", 2.5)):
        made(tmp_path / "runs" / name, name, {"error": value})
    assert main(["report", "runs", "--write", "RESULTS.md"]) == 0
    with pathlib.Path("RESULTS.md").open("a") as file:
        file.write("\n## Notes\n\n| a | table |\n")
    both = pathlib.Path("RESULTS.md").read_text()
    shutil.rmtree(tmp_path / "runs" / "bsn")
    shutil.rmtree(tmp_path / "runs" / "snip")
    made(tmp_path / "runs" / "snip", "snip", {"error": 0.5})
    made(tmp_path / "runs" / "icm", "icm", {"energy": 9.0})
    assert main(["report", "runs", "--keep", "--write", "RESULTS.md"]) == 0
    kept = pathlib.Path("RESULTS.md").read_text()
    tables = [line for line in kept.splitlines() if line.startswith(("### ", "| e"))]
    assert [line.removesuffix(" |  |  | 1 |") for line in tables] == [
        "### bsn", "| error | 2.5", "### icm", "| energy | 9", "### snip", "| error | 0.5",
    ]  # fmt: skip
    assert kept.endswith("\n## Notes\n\n| a | table |\n") and "--keep" in kept
    commands = lambda text: [line for line in text.splitlines() if line.startswith("- `")]
    assert [line.split()[5] for line in commands(kept)] == ["bsn", "icm", "snip"]
    assert set(commands(both)) < set(commands(kept))
    made(tmp_path / "runs" / "vgg", "icm", {"energy": 8.0}, model="vgg")  # the other one's label grows
    assert main(["report", "runs", "--keep", "--write", "RESULTS.md"]) == 0
    labels = [line for line in pathlib.Path("RESULTS.md").read_text().splitlines() if line.startswith("### ")]
    assert labels == ["### bsn", "### icm [model=lenet]", "### icm [model=vgg]", "### snip"]
    assert main(["report", "runs", "--write", "RESULTS.md"]) == 0
    assert "bsn" not in pathlib.Path("RESULTS.md").read_text()


def test_report_of_a_folder_without_results_says_so(tmp_path):
    with pytest.raises(ExperimentError, match="no finished run"):
        report.main(types.SimpleNamespace(folder=tmp_path, all=False, write=None))
