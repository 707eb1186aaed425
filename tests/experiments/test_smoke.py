"""Every experiment at its smallest: `SMOKE` runs through, and its records, targets and figures are in order.

What a method promises beyond that stands in `smoke_checks.py`, a function of its name.
"""

import json
import math

import jax
import pytest

from experiments._machinery import registry, runner
from tests.experiments import smoke_checks

NAMES = [entry.name for entry in registry.entries() if (registry.FOLDER / "methods" / f"{entry.name}.py").exists()]
# Their own test runs the same, and more.
ELSEWHERE = {"decentralised": "test_decentralised.py runs it in one process and in two"}
RESUMED = ("learned_mrf", "snip", "unconstrained_features")


def smoke_config(module):
    """`SMOKE`, with a prime batch: that keeps to one of the eight fake devices, which on two cores mostly wait."""
    config = module.Config(**module.SMOKE)
    options = smoke_checks.OPTIONS.get(module.__name__.rpartition(".")[2], {})
    batch = getattr(config, "batch_size", None)  # None: the method's own
    if batch and not hasattr(module, "devices"):
        prime = lambda n: all(n % k for k in range(2, math.isqrt(n) + 1))
        options = {"batch_size": next(n for n in range(batch, 1, -1) if prime(n))} | options
    return module.Config(**module.SMOKE | options)


def run(module, config, workdir):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as in `python -m experiments`
        return runner.run(module, config, workdir, smoke=True, command="test")


@pytest.mark.parametrize("name", NAMES)
def test_smoke_run(name, tmp_path):
    if name in ELSEWHERE:
        pytest.skip(ELSEWHERE[name])
    module = registry.load(name)
    config = smoke_config(module)
    result = run(module, config, tmp_path)
    rows = {record["variant"]: record["metrics"] for record in result["records"]}
    assert rows
    for row, metrics in rows.items():
        assert all(math.isfinite(value) for value in metrics.values()), (row, metrics)
    for row, targets in result["targets"].items():
        for metric, target in targets.items():
            assert math.isfinite(target["value"]) and target["source"] and target["kind"], (row, metric)
    figures = [*tmp_path.glob("*.png")]
    assert figures and all(figure.stat().st_size > 1000 for figure in figures)
    if hasattr(smoke_checks, name):
        getattr(smoke_checks, name)(rows, tmp_path)
    if name in RESUMED:
        *_, last = sorted(tmp_path.glob("cases/*/metrics.json"))
        written = last.read_bytes()
        last.unlink()
        (tmp_path / "result.json").unlink()
        assert run(module, config, tmp_path)["records"] == result["records"]
        assert json.loads(last.read_bytes())["metrics"] == json.loads(written)["metrics"]


def test_checks_and_exceptions_belong_to_experiments():
    own = {name for name, value in vars(smoke_checks).items() if getattr(value, "__module__", "").endswith("checks")}
    checks = {name for name in own if not name.startswith("_")}
    assert checks <= {*NAMES} and {*smoke_checks.OPTIONS, *ELSEWHERE, *RESUMED} <= {*NAMES}
