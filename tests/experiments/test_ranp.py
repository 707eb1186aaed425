"""The experiment RANP: its volumes, the loading of voxel files, the intersection over union, one short run."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments._machinery import cases, runner
from experiments._machinery.errors import DataError
from experiments.data import volumes
from experiments.methods import ranp
from experiments.tasks import volume_segmentation


class TestVolumes:
    def test_are_drawn_from_the_seed_alone_and_hold_every_part(self):
        first, again, other = (volumes.parts(12, 16, seed=seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first[0], again[0])
        np.testing.assert_array_equal(first[1], again[1])
        assert (first[1] != other[1]).any()
        x, y = first
        assert (x.shape, y.shape, x.dtype, y.dtype) == ((12, 16, 16, 16, 1), (12, 16, 16, 16), np.uint8, np.uint8)
        assert set(np.unique(y)) == {*range(7), volumes.IGNORED}
        inside = y != volumes.IGNORED
        assert not x[..., 0][~inside].any()  # nothing outside of an object
        assert 0.9 < x[..., 0][inside].mean() < 0.98  # one in twenty voxels is missing
        assert all(len(np.unique(volume)) >= 3 for volume in y)  # two parts at least, and the rest

    def test_a_file_comes_back_as_it_was_written(self, tmp_path):
        x, y = volumes.parts(4, 16, seed=0)
        path = tmp_path / "voxels.npz"
        np.savez(path, x_train=x[:3, ..., 0], y_train=y[:3], x_test=x[3:, ..., 0], y_test=y[3:])
        found = volumes.load(str(path))
        np.testing.assert_array_equal(found.train.volumes, x[:3])
        np.testing.assert_array_equal(found.test.labels, y[3:])
        assert found.num_classes == max(label for label in np.unique(y) if label != volumes.IGNORED) + 1

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"y_test": None}, "lacks y_test"),
            ({"x_train": np.zeros((2, 8, 8), np.uint8)}, r"volumes must be \[n, D, H, W"),
            ({"x_train": np.zeros((2, 8, 8, 8), np.float32)}, "must be uint8, got float32"),
            ({name: np.zeros((2, 8, 8, 12), np.uint8) for name in volumes.images.NPZ_KEYS}, "must be multiples of 8"),
            ({"y_train": np.full((2, 8, 8, 8), 255, np.uint8)}, "no labels but 255"),
        ],
    )
    def test_unusable_files(self, tmp_path, changed, message):
        arrays = {name: np.zeros((2, 8, 8, 8), np.uint8) for name in volumes.images.NPZ_KEYS}
        if "y_train" in changed:
            arrays["y_test"] = changed["y_train"]
        path = tmp_path / "voxels.npz"
        np.savez(path, **{name: a for name, a in (arrays | changed).items() if a is not None})
        with pytest.raises(DataError, match=message):
            volumes.load(str(path))

    def test_unknown_names(self, tmp_path):
        with pytest.raises(DataError, match="unknown volumes 'shapenet'"):
            volumes.load("shapenet")
        with pytest.raises(DataError, match="there is no file"):
            volumes.load(str(tmp_path / "none.npz"))


def test_mean_intersection_over_union_against_a_loop():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (3, 2, 2, 2)).astype(np.uint8)
    logits = rng.standard_normal((3, 2, 2, 2, 4)).astype(np.float32)

    class Given(nnx.Module):
        def __call__(self, x):
            return jnp.asarray(logits)

    graph, params, state = nnx.split(Given(), nnx.Param, ...)
    batch = volumes.Split(jnp.zeros((3, 2, 2, 2, 1), jnp.uint8), jnp.asarray(labels))
    found = volume_segmentation.overlaps(graph, 4, params, state, batch)
    means = {f"test_{name}": float(np.mean(value)) for name, value in found.items()}
    both, either = np.zeros(4), np.zeros(4)
    for label, row in zip(labels.ravel(), logits.reshape(-1, 4), strict=True):
        if label != 255:
            both[label] += label == row.argmax()
            for c in {int(label), int(row.argmax())}:
                either[c] += 1
    expected = 100 * np.mean([b / e for b, e in zip(both, either, strict=True) if e])
    np.testing.assert_allclose(volume_segmentation.mean_iou(means, 4), expected, rtol=1e-6)


def test_a_short_run(tmp_path):
    (record,) = runner.run(ranp, ranp.Config(**ranp.SMOKE), tmp_path, smoke=True)["records"]
    metrics = record["metrics"]
    assert 0 <= metrics["test_miou"] <= 100
    assert all(0 < metrics[f"{name}_reduction"] < 100 for name in ranp.COSTS)
    assert metrics["flops_ratio"] == pytest.approx(100 / (100 - metrics["flops_reduction"]))
    assert 0 < metrics["sparsity"] <= metrics["max_sparsity"] < 100
    case = json.loads((cases.folder(tmp_path, "ranp_f", 0) / "metrics.json").read_text())
    widths = case["details"]["widths"]
    assert widths["head"] == 7 and len(widths) == 3  # classes stay
    assert (tmp_path / "kept_neurons.png").stat().st_size > 1000


def test_bad_settings():
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\), got 1.0; 0.78 removes"):
        ranp.Config(sparsity=1.0)
    with pytest.raises(ValueError, match="samples must be at most 4"):
        ranp.load(ranp.Config(volumes=4, samples=5, stages=1, width=2))
