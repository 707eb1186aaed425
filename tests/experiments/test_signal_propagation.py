"""The signal-propagation experiment: its smoke run from end to end, its deep networks, and what it refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._machinery import cases, runner
from experiments.data import images as data
from experiments.methods import signal_propagation
from experiments.tasks import deep_mlp, pruned_networks
from jaxlib_methods import pruning


def test_smoke_run_repairs_what_pruning_destroyed(tmp_path):
    config = signal_propagation.Config(**signal_propagation.SMOKE)
    records = runner.run(signal_propagation, config, tmp_path, smoke=True)["records"]
    metrics = {record["variant"].removeprefix("tanh L=5 orthogonal "): record["metrics"] for record in records}
    dense, pruned, repaired = (metrics[name]["singular_values"] for name in ("dense", "snip", "snip repaired"))
    assert pruned < 0.5 * dense and repaired > 2 * pruned
    assert metrics["dense"]["test_error"] < 40
    for figure in ("singular_values", "layers", "training"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000
    case = cases.folder(tmp_path, "tanh L=5 orthogonal snip", 0, 0.01) / "metrics.json"
    kept = json.loads(case.read_text())["details"]["kept"]
    weights = [64 * 16, 16 * 16, 16 * 16, 16 * 16, 16 * 10]
    assert np.dot(kept, weights) == round(0.1 * (sum(weights) + 4 * 16 + 10))  # zero biases go first


def test_stacked_networks_are_their_layers_one_after_the_other(key):
    sizes = {"depth": 3, "width": 6, "inputs": 9, "outputs": 3, "kind": "orthogonal"}
    params = deep_mlp.init(key, **sizes, gain=2.0)
    x = jax.random.normal(key, (5, 3, 3))
    h = np.asarray(x).reshape(5, 9)
    layers = deep_mlp.unstack(params)
    for i, layer in enumerate(layers):
        h = h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        if i < 2:
            np.testing.assert_allclose(np.linalg.norm(layer["kernel"], axis=0), 2, rtol=1e-5)
            h = np.tanh(h)
    np.testing.assert_allclose(deep_mlp.apply(params, x, jnp.tanh), h, rtol=1e-4, atol=1e-6)
    same = deep_mlp.stack(layers)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, params))


def test_unsupervised_pruning_reads_no_labels(key):
    params = deep_mlp.init(key, depth=3, width=6, inputs=9, outputs=3, kind="orthogonal")
    logits, same = functools.partial(deep_mlp.apply, activation=jnp.tanh), lambda images: images
    images, labels = jax.random.normal(key, (20, 9)), jnp.arange(20, dtype=jnp.int32) % 3

    def masks(score, labels):
        scores = pruned_networks.sensitivity(logits, same, score, params, data.Split(images, labels), 2)
        return jax.tree.leaves(pruning.prune_masks(scores, 0.7))

    changed = lambda score: any(
        (a != b).any() for a, b in zip(masks(score, labels), masks(score, 2 - labels), strict=True)
    )
    assert changed("snip") and not changed("unsupervised")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must lie in \(0, 1\), got 1.0"),
        ({"depths": (2,)}, "depths must be at least 3"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"repair_steps": -1}, "repair_steps must not be negative, got -1"),
        ({"width": 0}, "width must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        signal_propagation.Config(**options)
