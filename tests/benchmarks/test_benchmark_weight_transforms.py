"""The benchmark of transforms compares one function: with the matrices, without them, and after a morph."""

import numpy as np

from benchmarks.cases import _weight_transforms as weight_transforms


def test_models_and_morph_compute_the_same(monkeypatch):
    monkeypatch.setattr(weight_transforms, "LAYERS", 1)
    monkeypatch.setattr(weight_transforms, "BLOCK", 8)
    of_case = weight_transforms.transforms_case(32).implementations
    call = lambda name, *args: of_case[name].function(*(args or of_case[name].args))
    logits = call("forward")
    np.testing.assert_allclose(logits, call("forward, plain"), atol=1e-5)
    params, ids = of_case["forward"].args
    morphed, _ = call("morph, momentum")
    assert np.max(np.abs(morphed[1][0]["transforms"]["Q1"] - params[1][0]["transforms"]["Q1"])) > 0.1
    np.testing.assert_allclose(call("forward", morphed, ids), logits, atol=1e-5)
    assert set(call("draw")) == {("boundary", 0), ("boundary", 1), ("middle", 0)}
