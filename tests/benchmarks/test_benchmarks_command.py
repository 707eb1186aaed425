import json
import subprocess
import sys

import pytest

from benchmarks import __main__ as command
from benchmarks._machinery import results
from benchmarks._machinery.compare import compare, differences
from benchmarks._machinery.records import KEYS

TINY = '''"""Sums of a few numbers."""

import jax.numpy as jnp
import jax
import numpy as np

from benchmarks.timing import Case, Implementation, measure, peer


def run(options):
    for n in (10, 20):
        if options.selects(f"n={n}"):
            x = np.ones(n, np.float32)
            implementations = {
                "jax": Implementation(jax.jit(jnp.sum), (x,)),
                "numpy": Implementation(np.sum, (x,)),
                "absent": peer("no_such_module_at_all", lambda module: Implementation(module.sum, (x,))),
            }
            yield from measure(Case("tiny", f"n={n}", implementations, reference="numpy", seconds=0), options)
'''


@pytest.fixture
def folder(tmp_path):
    """Benchmarks of a test: one that works, one that cannot be imported, one module that is no benchmark."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "tiny.py").write_text(TINY)
    (folder / "broken.py").write_text('"""Cannot be imported."""\nimport no_such_module\n\ndef run(options): ...\n')
    (folder / "helper.py").write_text("def run_faster(): ...\n")
    return folder


@pytest.fixture
def keep_cache(monkeypatch):
    """`run` turns the compilation cache off for its process; here the process is the test's."""
    import jax

    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_list_shows_benchmarks_without_importing_them(folder, capsys):
    assert command.main(["list"], folder=folder) == 0
    shown = capsys.readouterr().out
    assert "tiny" in shown and "Sums of a few numbers." in shown and "broken" in shown
    assert "helper" not in shown


def test_run_writes_records_and_shows_them_with_the_notes(folder, tmp_path, capsys, keep_cache):
    out = tmp_path / "new folder" / "tiny.json"
    assert command.main(["run", "tiny", "--quick", "--case", "*=20", "--out", str(out)], folder=folder) == 0
    records = json.loads(out.read_text())
    assert [(r["case"], r["implementation"]) for r in records] == [("n=20", "jax"), ("n=20", "numpy")]
    assert all(tuple(r) == KEYS for r in records)
    assert [f.name for f in out.parent.iterdir()] == ["tiny.json"]  # no temporary file is left
    shown = capsys.readouterr().out
    assert "numpy" in shown and "note: tiny [n=20]: absent skipped" in shown
    assert command.main(["compare", str(out), str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "tinny"], "NAME must be a benchmark, got 'tinny'; there are: broken, tiny"),
        (["run", "tiny", "--case", "n=3"], "--case must match a case of tiny, got 'n=3'"),
        (["run", "tiny", "--out", "{folder}"], "--out must be a file"),
        (["run", "tiny", "--out", "{folder}/tiny.py/x.json"], "cannot be written"),
        (["compare", "{folder}/none.json", "{folder}/none.json"], "cannot be read"),
        (["compare", "{folder}/tiny.py", "{folder}/tiny.py"], "is not JSON"),
    ],
)
def test_mistakes_end_with_one_sentence(arguments, message, folder, capsys, keep_cache):
    assert command.main([a.format(folder=folder) for a in arguments], folder=folder) == 2
    shown = capsys.readouterr().err
    assert message in shown and len(shown.splitlines()) == 1


def test_module_lists_the_benchmarks_of_the_checkout():
    shown = [sys.executable, "-m", "benchmarks", "list"]
    done = subprocess.run(shown, cwd=command.HERE.parent, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("training_loop", "start_up"))


def test_the_table_of_results_is_what_report_makes_of_the_records(capsys):
    assert command.main(["report"]) == 0
    table = capsys.readouterr().out
    assert (command.HERE / "RESULTS.md").read_text().endswith("\n" + table)


@pytest.mark.parametrize("name", results.discover(command.CASES))
def test_every_benchmark_has_a_row_and_a_page_that_says_how_to_run_it(name):
    assert f"[{name}](results/{name}.md)" in (command.HERE / "RESULTS.md").read_text()
    assert f"python -m benchmarks run {name}\n" in (command.HERE / "results" / f"{name}.md").read_text()


def record(implementation="ours", median=10.0, spread=0.01, samples=21, case="c", platform="cpu", jax="0.10.2"):
    """A record whose samples lie evenly within median * (1 ± spread)."""
    half = samples // 2
    return {
        "benchmark": "b",
        "case": case,
        "implementation": implementation,
        "samples_ms": [median * (1 + spread * i / max(half, 1)) for i in range(-half, half + 1)],
        "median_ms": median,
        "versions": {"jax": jax, "commit": "abc"},
        "device": {"platform": platform, "kind": "a chip", "count": 1, "cores": 2},
    }


def verdicts(old, new):
    return {c.implementation: c.verdict for c in compare(old, new)}


@pytest.mark.parametrize(
    ("new", "verdict"), [(20.0, "slower"), (5.0, "faster"), (10.4, "same"), (9.7, "same"), (11.0, "slower")]
)
def test_verdict_of_a_change_without_peers(new, verdict):
    assert verdicts([record()], [record(median=new)]) == {"ours": verdict}


def test_noise_comes_from_the_spread_of_both_runs():
    # Samples within ±40 % have an interquartile range of 40 % of the median: a change of 30 % says nothing.
    for old, new in ((0.4, 0.01), (0.01, 0.4)):
        assert verdicts([record(spread=old)], [record(median=13.0, spread=new)]) == {"ours": "same"}
    (change,) = compare([record(spread=0.4)], [record(spread=0.3)])
    assert change.noise == pytest.approx(0.5, rel=1e-6)


def test_a_busy_machine_makes_nothing_slower_on_cpu():
    old = [record("ours"), record("peer", 30.0)]
    new = [record("ours", 20.0), record("peer", 60.0)]
    assert verdicts(old, new) == {"ours": "same", "peer": "same"}


def test_an_accelerator_is_not_shared_and_its_times_count():
    old = [record("ours", platform="gpu"), record("peer", 30.0, platform="gpu")]
    new = [record("ours", 20.0, platform="gpu"), record("peer", 60.0, platform="gpu")]
    assert verdicts(old, new) == {"ours": "slower", "peer": "slower"}


def test_a_faster_peer_makes_nothing_else_slower():
    old = [record("ours"), record("peer", 30.0)]
    assert verdicts(old, [record("ours"), record("peer", 10.0)]) == {"ours": "same", "peer": "faster"}
    assert verdicts(old, [record("ours", 20.0), record("peer", 30.0)]) == {"ours": "slower", "peer": "same"}


def test_too_few_samples_new_and_gone_are_said():
    assert verdicts([record(samples=1)], [record(median=50.0, samples=1)]) == {"ours": "unclear"}
    assert verdicts([record("a")], [record("b")]) == {"a": "gone", "b": "new"}


def test_other_devices_and_versions_are_warned_of_and_other_commits_are_not():
    assert differences([record()], [record()]) == []
    old, new = record(), record(platform="gpu", jax="0.12.0")
    new["versions"]["commit"] = "def"
    assert differences([old], [new]) == [
        "device platform differs: cpu then, gpu now",
        "version jax differs: 0.10.2 then, 0.12.0 now",
    ]


@pytest.mark.parametrize(("median", "code"), [(20.0, 1), (10.0, 0), (5.0, 0)])
def test_exit_code_of_compare(median, code, tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps([record()]))
    (tmp_path / "new.json").write_text(json.dumps([record(median=median, jax="0.12.0")]))
    assert command.main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == code
    shown = capsys.readouterr()
    assert "version jax differs" in shown.err
    assert f"{code} of 1 clearly slower" in shown.out
