"""The experiment on unextractable models: a smoke run, and what it refuses."""

import math

import jax
import pytest

from experiments._machinery import records, runner
from experiments.methods import unextractable


def test_smoke_run_leaves_numbers_of_all_parts_and_figures(tmp_path):
    with jax.numpy_dtype_promotion("standard"):  # optax.contrib.muon needs it
        config = unextractable.Config(**unextractable.SMOKE, seeds=1)
        found = runner.run(unextractable, config, tmp_path, smoke=True)["records"]
    rows = records.pivot(found)
    plain = rows["no transforms"]["validation_loss"].mean
    assert 3 < plain < math.log(256) + 0.1
    assert rows["orthogonal"]["validation_loss"].mean == pytest.approx(plain, abs=0.02)
    assert abs(rows["float32 master"]["perplexity change"].mean) < 1e-2
    assert rows["bfloat16 in place"]["JS drift"].mean > rows["bfloat16 master"]["JS drift"].mean
    trained = rows["trained"]["perplexity"].mean
    assert rows["known bridge k=2"]["perplexity"].mean == pytest.approx(trained, rel=1e-4)
    assert rows["bridge from same inputs k=2"]["perplexity"].mean == pytest.approx(trained, rel=1e-3)
    assert abs(rows["stitched k=2"]["perplexity"].mean - trained) > 0.5
    assert not {"drift", "stitching", "learning"} & {*rows}  # they are parts, not rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "gpt_tiny"}, "transforms need norm='rms', got 'layer'"),
        ({"layers": 1}, "layers must be at least 2, got 1; stitching needs two blocks"),
        ({"transforms": 0}, "transforms must be at least 1, got 0"),
        ({"evaluate_every": 7}, "evaluate_every must divide steps, got 7 and 600"),
        ({"margin": 0.0}, "margin must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        unextractable.Config(**options)
