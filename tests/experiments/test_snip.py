"""The SNIP experiment: its masks are exact, and what it compares with stands beside the runs it belongs to."""

import pytest

from experiments.methods import snip


def test_targets_stand_beside_the_runs_they_belong_to():
    found = snip.targets(snip.Config(dataset="mnist", model="lenet5", sparsity=(0.98,)))
    assert {row: target["test_error"].value for row, target in found.items()} == {
        "dense": 0.9, "snip 98%": 0.8, "snip 99%": 1.1,
    }  # fmt: skip
    reproduced = snip.targets(snip.Config(dataset="mnist"))["snip 90% scored on 10"]["test_error"]
    assert (reproduced.value, reproduced.kind) == (2.39, "reproduction")
    assert snip.targets(snip.Config()) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": (1.2,)}, r"sparsity must lie in \[0, 1\), got 1.2; 0.98 removes"),
        ({"sparsity": ()}, "sparsity is empty"),
        ({"model": "lenet6"}, "model must be one of lenet300"),
        ({"scoring_batch_sizes": (0,)}, "scoring_batch_sizes must be at least 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        snip.Config(**options)
