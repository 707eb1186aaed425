"""The experiment with all four plug-ins: a smoke run, the same on two processes, and what it refuses."""

import json
import math

import jax
import numpy as np
import pytest

from experiments._machinery import cases, runner
from experiments.methods import decentralised
from tests.experiments import processes


@pytest.mark.slow
def test_all_four_train_on_one_process_and_alike_on_two(tmp_path):
    """Two stages of two replicas: on four devices of this process, then one stage in each of two, over gloo."""
    config = decentralised.Config(**decentralised.SMOKE)
    cluster = processes.start_cluster("decentralised", tmp_path / "cluster", "--smoke", devices=2)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        (record,) = runner.run(decentralised, config, tmp_path / "alone", smoke=True)["records"]
    processes.finish(*cluster)
    metrics = record["metrics"]
    assert 2 < metrics["validation_loss"] < math.log(256) + 0.5
    assert 0 < metrics["spread"] < 0.1 and metrics["bans"] == 0
    assert metrics["bytes per token"] == 4 * config.rank + 1  # and the id, below 256
    logs = []
    for run in ("alone", "cluster"):
        lines = (cases.folder(tmp_path / run, "transforms", 0) / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    assert [line["updates"] for line in logs[0]] == [2, 4, 6, 8, 10, 12]
    for name in ("loss", "validation_loss", "spread"):
        alone, together = ([line[name] for line in log if name in line] for log in logs)
        np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_each_method_adds_a_plug_in():
    assert [len(decentralised.plug_ins(method)) for method in decentralised.METHODS] == [0, 1, 2, 3, 4, 4, 3]
    assert decentralised.plug_ins("unprotected") == {"averaging", "subspace", "transforms"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3}, "divide the 4 blocks, got 3"),
        ({"stages": 2}, "an attack needs 3 stages, got 2"),
        ({"replicas": 5}, "divide the batch size 12, got 5"),
        ({"methods": ()}, "methods is empty"),
        ({"fraction": 0.0}, r"fraction must lie in \(0, 1\], got 0.0"),
        ({"tau": -1}, "tau must not be negative, got -1"),
        ({"rank": 65}, "subspace must not exceed width"),
        ({"morph_every": 0}, "morph_every must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        decentralised.Config(**options)
