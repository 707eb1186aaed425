"""CPU seconds of the tests by family, against `tests/budgets.json`.

    pytest --write-budgets     after a whole run with an empty compilation cache: what it took becomes the budgets
    pytest --check-budgets     a whole run fails where a family took far more; `make test` does this

CPU seconds, those of child processes included, hardly depend on what else runs on the machine, and a loop of plain
Python tells a slow processor from a fast one. MARGIN is for shared caches and other releases of XLA. A new method may
add 8 CPU seconds to its family, and its smoke run 6 to `experiments`.
"""

import collections
import json
import os
import pathlib
import time

import pytest

TESTS = pathlib.Path(__file__).parent
BUDGETS = TESTS / "budgets.json"
MARGIN, SLACK = 2.5, 20.0  # a family may take MARGIN * budget + SLACK seconds
STARTED = pytest.StashKey[float]()


def cpu_seconds() -> float:
    """Of this process and its finished children."""
    return sum(os.times()[:4])


def calibration() -> float:
    """CPU seconds of a loop of plain Python, the best of five."""

    def loop():
        start, total = time.process_time(), 0
        for number in range(1_000_000):
            total += number & 7
        return time.process_time() - start

    return min(loop() for _ in range(5))


def family(nodeid: str) -> str:
    """`tests/jaxlib_methods/pruning/test_x.py::test_y` -> `jaxlib_methods/pruning`: two levels of folders."""
    folders = nodeid.partition("::")[0].split("/")[1:-1]
    return "/".join(folders[:2]) or "whole library"


def over_budget(seconds: dict[str, float], budgets: dict, speed: float) -> list[str]:
    """What took more than it may, as sentences. `speed`: calibration here over that of the machine of the budgets."""
    lines = []
    for name, used in sorted(seconds.items()):
        limit = speed * (MARGIN * budgets["cpu_s"].get(name, 0) + SLACK)
        if used > limit:
            lines.append(
                f"{name} took {used:.0f} CPU s and may take {limit:.0f}; make its tests cheaper, or write new budgets"
            )
    return lines


class Recorder:
    """Adds up the seconds that the reports carry, on the process that all reports reach."""

    def __init__(self, write: bool, check: bool):
        self.write, self.check = write, check
        self.seconds: dict[str, float] = collections.Counter()
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report):
        self.seconds[family(report.nodeid)] += dict(report.user_properties).get("cpu_s", 0.0)

    def pytest_sessionfinish(self, session):
        if self.write:
            measured = {name: round(used, 1) for name, used in sorted(self.seconds.items())}
            data = {"calibration_s": round(calibration(), 4), "cpu_s": measured}
            BUDGETS.write_text(json.dumps(data, indent=2) + "\n")
        elif self.check and session.exitstatus == pytest.ExitCode.OK:
            budgets = json.loads(BUDGETS.read_text())
            self.lines = over_budget(self.seconds, budgets, calibration() / budgets["calibration_s"])
            if self.lines:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.check or self.write:
            terminalreporter.section("CPU seconds by family")
            for name, used in sorted(self.seconds.items(), key=lambda item: -item[1]):
                terminalreporter.line(f"{used:8.0f}  {name}")
            terminalreporter.line(f"{sum(self.seconds.values()):8.0f}  together")
        for line in self.lines:
            terminalreporter.line(f"over budget: {line}", red=True)


def pytest_addoption(parser):
    group = parser.getgroup("budgets")
    group.addoption("--write-budgets", action="store_true", help="write what each family took into tests/budgets.json")
    group.addoption("--check-budgets", action="store_true", help="fail where a family takes far more than its budget")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(
            Recorder(config.getoption("--write-budgets"), config.getoption("--check-budgets")), "budget recorder"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[STARTED] = cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "teardown":
        report.user_properties.append(("cpu_s", cpu_seconds() - item.stash[STARTED]))
    return report
