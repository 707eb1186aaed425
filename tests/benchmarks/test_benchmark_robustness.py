"""The robustness benchmark: all implementations attack the same network, and reach the same."""

import dataclasses

from benchmarks.cases import robustness as benchmark
from benchmarks.timing import Options, measure


def test_attacks_succeed_alike():
    case = benchmark._case("case", "lenet300", 40, 1.0)
    assert list(case.implementations) == ["ours", "ours, njs", "ours, hns", "python loop", "foolbox"]
    some = {name: case.implementations[name] for name in ("ours", "python loop", "foolbox")}  # each costs seconds
    options = Options(quick=True)
    case = dataclasses.replace(case, implementations=some)
    records = {r.implementation: r for r in measure(case, options, clock=iter(range(10**6)).__next__)}
    assert {"ours", "python loop"} <= set(records)
    assert "foolbox" in records or any("pip install" in note for note in options.notes)
    assert all(record.error < 0.1 for record in records.values())
