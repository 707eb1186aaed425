"""The SENTINEL experiment: a smoke run, its plans and scores, and what it refuses."""

import numpy as np
import pytest

from experiments.methods import sentinel
from jaxlib_methods.parallel.integrity import Attack


def test_a_plan_has_the_share_of_every_inner_stage_and_scores_are_those_of_workers():
    config = sentinel.Config(share=0.375)
    attacks = sentinel.plan(config, "mixed")
    assert {a.stage for a in attacks} == {1, 2, 3, 4} and len(attacks) == 12
    assert len({(a.stage, a.replica) for a in attacks}) == 12
    assert {a.kind for a in attacks} >= {"constant", "random", "scale", "delay"}
    forward, backward = np.zeros((2, 9, 5, 8), int)
    forward[6:, 1, 0] = 1  # stage 1, at the seventh step
    backward[4:, 0, 0] = 1  # stage 1 as well, at the fifth
    backward[8:, 3, 2] = 1  # stage 4
    malicious = (Attack("bias", 1, 0), Attack("bias", 2, 5))
    assert sentinel.scores([forward, backward], malicious) == {
        "precision": 50.0,
        "recall": 50.0,
        "F1": 50.0,
        "steps to ban": 5.0,
    }
    nobody = sentinel.scores([0 * forward, 0 * backward], malicious)
    assert nobody["F1"] == 0 and nobody["precision"] is None and nobody["steps to ban"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.5}, r"share must lie in \(0, 0.5\), got 0.5"),
        ({"share": 0.01}, "share must name at least one of 8 replicas, got 0.01"),
        ({"layers": 2}, "layers must be at least 3, got 2"),
        ({"clean_steps": 10}, "clean_steps must be no less than steps"),
        ({"votes": 9}, r"num_votes must lie in \[1, 4\]"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sentinel.Config(**options)
