"""What the smoke run of a method shows beyond its form: `method(rows, workdir)`, called by `test_smoke.py`.

`rows` are the metrics by variant. `OPTIONS` are changes to `SMOKE`, for speed or for what a check needs.
"""

import json
import math

import numpy as np
import pytest
from PIL import Image

from experiments._machinery import cases
from experiments.methods import stereo as stereo_method
from experiments.tasks.grid_solvers import labels_of

OPTIONS = {
    "bsn": {"batch_size": 127, "normalisations": ("gpn",), "depths": (3,), "learning_rates": (1e-3, 0.3, 1e4)},
    "learned_mrf": {"methods": ("trwp",)},
    "numuon": {
        "batch_size": 7,
        "optimizers": ("muon", "numuon"),
        "learning_rates": (1e-2,),
        "calibration_windows": 14,
        "steps": 10,
        "methods": ("svd", "svd_llm"),
        "removed": (0.2, 0.6),
    },
    "quantize": {"batch_size": 97},
    "sentinel": {"seeds": 1},
    "unconstrained_features": {"methods": ("standard", "fixed")},
    "unextractable": {"seeds": 1},
}


def _case(workdir, row):
    return json.loads((cases.folder(workdir, row, 0) / "metrics.json").read_text())


def bsn(rows, workdir):
    """The learning rate with the smallest validation error is kept."""
    ((row, metrics),) = rows.items()
    assert row == "tanh gpn L=3"
    assert metrics["learning_rate"] == pytest.approx(0.3)
    assert metrics["validation_error"] < 60 and metrics["orthogonality_error"] < 1e-3
    assert abs(metrics["log10 forward ratio"]) < 0.2
    assert '"diverged"' in (workdir / "cases" / "tanh-gpn-L=3-seed0-10000" / "metrics.json").read_text()


def denoise(rows, workdir):
    assert rows["photograph/trwp-4"]["psnr"] > 17 and rows["photograph/median_filter"]["psnr"] > 17
    assert rows["photograph/trwp-4"]["bound@1"] <= rows["photograph/trwp-4"]["sequential@1"]
    restored = np.asarray(Image.open(workdir / "restored/photograph-trwp-4.png"))
    assert restored.shape == (26, 40) and restored.std() > 10


def learned_mrf(rows, workdir):
    assert [*rows] == ["trwp"] and rows["trwp"]["test_pixel_error"] < 60


def sentinel(rows, workdir):
    assert rows["sign flip"]["F1"] == 100 and rows["clean"]["bans"] == 0
    assert 5 <= rows["sign flip"]["steps to ban"] <= 10
    assert all(3 < metrics["validation loss"] < 8 for metrics in rows.values()) and len(rows) == 3


def snip(rows, workdir):
    assert {*rows} == {"dense", "snip 90%", "random 90%"} and rows["dense"]["test_error"] < 20
    kept = _case(workdir, "snip 90%")["details"]["kept"]
    assert kept["total"] == round(50_610 * 0.1)  # LeNet-300-100 on 8 x 8 pixels
    assert kept["dense1/bias"] == kept["dense2/bias"] == kept["dense3/bias"] == 0


def stereo(rows, workdir):
    assert rows["synthetic/trwp-4"]["bad_pixels"] < 0.1 < 0.4 < rows["synthetic/no_smoothness"]["bad_pixels"]
    sgm, trwp = (_case(workdir, f"synthetic/{solver}")["curve"] for solver in ("sgm-4", "trwp-4"))
    assert trwp[-1]["energy"] < sgm[-1]["energy"]
    assert trwp[-1]["bound"] <= min(point["sequential"] for point in trwp)
    grey = np.asarray(Image.open(workdir / "disparity/synthetic-trwp-4.png"))
    labels = labels_of(cases.folder(workdir, "synthetic/trwp-4", 0))[0]
    np.testing.assert_array_equal(grey, labels * stereo_method.SCALES["synthetic"])


def unconstrained_features(rows, workdir):
    """Free features collapse under a learned and a fixed head."""
    assert [*rows] == ["standard K=10", "fixed K=10"]
    assert all(metrics["train_error"] == 0 and metrics["nc1"] < 0.2 for metrics in rows.values())
    assert rows["fixed K=10"]["nc2"] < 1e-12


def unextractable(rows, workdir):
    plain = rows["no transforms"]["validation_loss"]
    assert 3 < plain < math.log(256) + 0.1
    assert rows["orthogonal"]["validation_loss"] == pytest.approx(plain, abs=0.02)
    assert abs(rows["float32 master"]["perplexity change"]) < 1e-2
    assert rows["bfloat16 in place"]["JS drift"] > rows["bfloat16 master"]["JS drift"]
    trained = rows["trained"]["perplexity"]
    assert rows["known bridge k=2"]["perplexity"] == pytest.approx(trained, rel=1e-4)
    assert rows["bridge from same inputs k=2"]["perplexity"] == pytest.approx(trained, rel=1e-3)
    assert abs(rows["stitched k=2"]["perplexity"] - trained) > 0.5
    assert not {"drift", "stitching", "learning"} & {*rows}
