"""The async_mesh experiment: a smoke run, and what it refuses."""

import json
import math

import jax
import pytest

from experiments import async_mesh
from experiments._machinery import runner


@pytest.mark.slow
def test_smoke_run_leaves_losses_of_the_mean_and_spreads(tmp_path):
    config = async_mesh.Config(**async_mesh.SMOKE)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        metrics = runner.run(async_mesh, config, tmp_path, smoke=True)["metrics"]
    for method in config.methods:
        assert 2 < metrics[f"validation_loss {method}"] < math.log(256) + 0.5
    assert 0 < metrics["spread ema"] < 0.1
    assert metrics["averaged share per update ema"] == 0.05
    lines = (tmp_path / "cases" / "P2-ema-lr0.003-seed0" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["updates"] for line in lines] == [4, 8]
    assert (tmp_path / "async_mesh.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3}, "stages must divide the 8 blocks, got 3"),
        ({"replicas": 1}, "replicas must be at least 2, got 1"),
        ({"replicas": 3}, "replicas must divide the batch size 8, got 3"),
        ({"methods": ()}, "methods is empty"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\], got 1.5"),
        ({"tau": -1}, "tau must be at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        async_mesh.Config(**options)
