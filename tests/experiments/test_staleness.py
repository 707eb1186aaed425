"""The staleness study: a smoke run, the layer map, what its diagnostics measure, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import staleness
from experiments._machinery import runner
from experiments.tasks import language_modelling as language_model


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # scale_by_adam and MultiSteps need it
        yield


# 11 is prime and keeps to one of the eight fake devices: eight threads on two cores wait for one another.
SMALL = staleness.SMOKE | {"batch_size": 11}


def test_smoke_run_leaves_losses_and_figures(tmp_path):
    config = staleness.Config(**SMALL)
    metrics = runner.run(staleness, config, tmp_path, smoke=True)["metrics"]
    for name in ("nadam P=1", "gpipe P=1", "nadam P=3"):
        assert 2 < metrics[f"validation_loss {name}"] < math.log(256) + 0.5
        assert metrics[f"diverged {name}"] == 0
    assert "validation_loss gpipe P=3" not in metrics
    assert -1 <= metrics["alignment nadam P=3"] <= 1 and metrics["gap nadam P=3"] > 0
    for figure in ("staleness", "alignment"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000


def test_stages_hold_what_the_layer_map_says_and_join_undoes_split(key):
    task = language_model.load(staleness.Config(**SMALL | {"layers": 4}))
    params, P = task.init(key), 3
    staged = staleness.Staged(task, P)
    vectors = staged.split(params)
    jax.tree.map(np.testing.assert_array_equal, staged.join(vectors), params)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    block = size(params["blocks"][0])
    assert [vectors[f"stage{j:02d}"].size for j in range(P)] == [
        size(params["embed"]) + 2 * block,
        block,
        block + size(params["head"]),
    ]
    windows = jax.random.randint(key, (2, 17), 0, 256)
    ours, _ = staged.loss_fn(vectors, (), windows, key)
    np.testing.assert_allclose(ours, task.loss_fn(params, (), windows, key)[0], rtol=1e-6)


def test_alignment_of_a_straight_walk_is_one_and_its_gap_is_its_length():
    history = staleness.optimizers.ParamHistoryState
    walk = lambda v: jnp.float32(v) * jnp.array([1.0, 2.0])
    m, tau = 9, 4
    ring = jnp.stack([walk(next(v for v in range(m - tau, m) if v % tau == slot)) for slot in range(tau)])
    state = history(jnp.int32(m), {"stage00": ring, "stage01": None})
    measured = staleness.staleness(state, {"stage00": walk(m), "stage01": jnp.zeros(2)})
    assert measured["alignment"] == pytest.approx(1.0)
    assert measured["gap"] == pytest.approx(tau * math.sqrt(2.5))
    assert staleness.staleness(state._replace(count=jnp.int32(7)), {"stage00": walk(m), "stage01": jnp.zeros(2)}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (1, 32)}, r"stages must lie between 1 and the number of blocks, 16, got \(1, 32\)"),
        ({"methods": ()}, "methods is empty"),
        ({"learning_rates": (0.0,)}, "learning_rates must be positive"),
        ({"clip": -1.0}, "clip must be positive, got -1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        staleness.Config(**options)
