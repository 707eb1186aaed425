"""The experiment on unextractable models: a smoke run, and what it refuses."""

import math

import jax
import pytest

from experiments import unextractable
from experiments._machinery import runner


def test_smoke_run_leaves_numbers_of_all_parts_and_figures(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # optax.contrib.muon needs it
        config = unextractable.Config(**unextractable.SMOKE, seeds=1)
        metrics = runner.run(unextractable, config, tmp_path, smoke=True)["metrics"]
    plain = metrics["validation_loss no transforms"]
    assert 3 < plain < math.log(256) + 0.1
    assert metrics["validation_loss orthogonal"] == pytest.approx(plain, abs=0.02)
    assert abs(metrics["perplexity change float32 master"]) < 1e-2
    assert metrics["JS drift bfloat16 in place"] > metrics["JS drift bfloat16 master"]
    trained = metrics["perplexity trained"]
    assert metrics["perplexity known bridge k=2"] == pytest.approx(trained, rel=1e-4)
    assert metrics["perplexity bridge from same inputs k=2"] == pytest.approx(trained, rel=1e-3)
    assert abs(metrics["perplexity stitched k=2"] - trained) > 0.5
    for figure in ("drift", "training"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "gpt_tiny"}, "transforms need norm='rms', got 'layer'"),
        ({"layers": 1}, "stitching needs two blocks or more, got 1"),
        ({"transforms": 0}, "transforms must be at least 1, got 0"),
        ({"evaluate_every": 7}, "evaluate_every must divide steps, got 7 and 600"),
        ({"margin": 0.0}, "margin must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        unextractable.Config(**options)
