"""The command line: list, run, report; every refusal is one sentence on stderr."""

import json
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

from experiments._machinery import cases, records, registry
from experiments._machinery.checkpoint import claim
from experiments._machinery.cli import main
from experiments._machinery.errors import WorkdirError

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
    program = "import sys; from experiments._machinery.cli import main; main(['list']); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=registry.FOLDER.parent, check=True, timeout=20)


def test_helpers_are_not_experiments(tmp_path, monkeypatch, capsys):
    (tmp_path / "methods").mkdir()
    shutil.copy(EXPERIMENT, tmp_path / "methods" / "logistic.py")
    (tmp_path / "methods" / "helper.py").write_text("class Config: pass\n")
    monkeypatch.setattr(registry, "FOLDER", tmp_path)
    description = "Logistic regression on the bundled digits: the smallest experiment, private to the tests."
    assert registry.entries() == [("logistic", description, "none")]
    assert main(["list"]) == 0
    assert "Logistic regression on the bundled digits" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("entry", registry.entries(), ids=lambda entry: entry.name)
def test_every_experiment_has_what_the_runner_needs(entry):
    module = registry.load(entry.name)
    assert entry.description and entry.paper, f"{entry.name}: its docstring needs a first line and a line Paper:"
    config = module.Config(**module.SMOKE)
    rows = module.variants(config)
    assert rows and all(isinstance(name, str) for name in rows)
    records.targets_to_json(module.targets(config))


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    """One smoke run with an explicit option on top; read by several tests."""
    workdir = tmp_path_factory.mktemp("run")
    assert main(["run", EXPERIMENT, "--smoke", "--seeds", "3", "--workdir", str(workdir)]) == 0
    return workdir


def test_result_has_exactly_the_agreed_keys(smoke_run):
    result = json.loads((smoke_run / "result.json").read_text())
    assert tuple(result) == records.KEYS
    assert result["experiment"] == "logistic_on_digits" and result["smoke"] is True
    target = {"value": 5.0, "source": "made up", "kind": "ours"}
    assert result["shown"] == ["test_error"] and result["targets"] == {"logistic": {"test_error": target}}
    assert result["config"]["steps"] == 40 and result["config"]["seeds"] == 3  # SMOKE, and the option above it
    assert result["command"].startswith("python -m experiments run ") and result["command"].endswith(str(smoke_run))
    assert {"jax", "python", "commit"} <= set(result["versions"]) and "cpu" in result["device"]
    for seed, record in enumerate(result["records"]):
        case = json.loads((smoke_run / f"cases/logistic-seed{seed}/metrics.json").read_text())
        assert record == {"variant": "logistic", "seed": seed, "metrics": case["metrics"]}
    assert len(result["records"]) == 3 and (smoke_run / "error.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_read_back_and_its_checkpoints_are_gone(smoke_run, capsys):
    before = (smoke_run / "result.json").stat().st_mtime_ns
    assert main(["run", EXPERIMENT, "--smoke", "--seeds", "3", "--workdir", str(smoke_run)]) == 0
    assert "holds the finished run" in capsys.readouterr().out
    assert (smoke_run / "result.json").stat().st_mtime_ns == before
    assert not (smoke_run / "cases/logistic-seed0" / "checkpoints").exists()


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


def test_the_first_seed_tries_every_candidate_and_the_others_take_the_best(tmp_path):
    asked = []

    def run(shared, variant, seed, workdir, rate):
        asked.append((variant, seed, rate))
        return records.Outcome({"loss": abs(rate - variant) + seed} if rate < 3 else {"diverged": 1.0})

    method = types.SimpleNamespace(
        variants=lambda config: {"near one": 1.0, "near two": 2.0},
        candidates=lambda config, name, chosen: (1.0, 2.0, 3.0) if not chosen else (chosen["near one"], 2.0),
        TUNED_BY="loss",
        run=run,
    )
    config = types.SimpleNamespace(seeds=2)
    found = list(cases.run_all(method, config, None, tmp_path))
    assert [(case.name, case.seed, case.metrics) for case in found] == [
        ("near one", 0, {"loss": 0.0}), ("near one", 1, {"loss": 1.0}),
        ("near two", 0, {"loss": 0.0}), ("near two", 1, {"loss": 1.0}),
    ]  # fmt: skip
    assert asked == [(1, 0, 1), (1, 0, 2), (1, 0, 3), (1, 1, 1), (2, 0, 1), (2, 0, 2), (2, 1, 2)]
    assert found[0].folder == cases.folder(tmp_path, "near one", 0, 1.0) == tmp_path / "cases" / "near-one-seed0-1"
    list(cases.run_all(method, config, None, tmp_path))
    assert len(asked) == 7  # read back
