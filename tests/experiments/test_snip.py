"""The SNIP experiment: its smoke run from end to end, what it compares with, and what it refuses."""

import json

import pytest

from experiments import snip
from experiments._machinery import runner


def test_smoke_run_leaves_results_figures_and_exact_masks(tmp_path):
    config = snip.Config(**snip.SMOKE)
    result = runner.run(snip, config, tmp_path, smoke=True)
    assert tuple(result) == runner.RESULT_KEYS
    assert {"test_error dense", "test_error snip 90%", "test_error random 90%"} <= set(result["metrics"])
    assert result["metrics"]["test_error dense"] < 20
    for figure in ("error_vs_sparsity", "training", "connections"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000
    kept = json.loads((tmp_path / "cases/snip-0.9-100-seed0/metrics.json").read_text())["kept"]
    assert kept["total"] == round(50_610 * 0.1)  # LeNet-300-100 on 8 x 8 pixels
    assert kept["dense1/bias"] == kept["dense2/bias"] == kept["dense3/bias"] == 0


def test_the_enlarged_digits_fit_lenet5():
    dataset = snip._for_model(snip.data.load("digits"), "lenet5")
    assert dataset.train.images.shape[1:] == dataset.test.images.shape[1:] == (28, 28, 1)


def test_published_numbers_stand_beside_the_runs_they_belong_to():
    paper = snip.PAPER(snip.Config(dataset="mnist", model="lenet5", sparsity=(0.98,)))
    assert paper == {"test_error dense": 0.9, "test_error snip 98%": 0.8, "test_error snip 99%": 1.1}
    assert snip.PAPER(snip.Config()) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": (1.2,)}, r"sparsity must lie in \[0, 1\), got 1.2"),
        ({"sparsity": ()}, "sparsity is empty"),
        ({"model": "lenet6"}, "unknown model 'lenet6'; known are lenet300"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"steps": -1}, "steps must be positive, got -1"),
        ({"scoring_batch_sizes": (0,)}, "scoring_batch_sizes must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        snip.Config(**options)
