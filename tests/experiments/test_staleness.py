"""The staleness study: what runs at which P, the layer map, what its diagnostics measure, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.methods import staleness
from experiments.tasks import language_modelling
from experiments.tasks.staged_decoder import StagedDecoder, measure_staleness
from jaxlib_methods.optimizers.delays import ParamHistoryState


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # scale_by_adam and MultiSteps need it
        yield


def test_the_synchronous_methods_run_on_one_stage_and_gpipe_on_no_more():
    config = staleness.Config(stages=(1, 4), methods=("adamw", "no_discount", "gpipe"))
    assert list(staleness.variants(config)) == ["adamw P=1", "gpipe P=1", "adamw P=4", "no_discount P=4"]


def test_stages_hold_what_the_layer_map_says_and_join_undoes_split(key):
    task = language_modelling.load(staleness.Config(**staleness.SMOKE | {"layers": 4, "batch_size": 11}))
    params, P = task.init(key), 3
    staged = StagedDecoder(task, P)
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
    walk = lambda v: jnp.float32(v) * jnp.array([1.0, 2.0])
    m, tau = 9, 4
    ring = jnp.stack([walk(next(v for v in range(m - tau, m) if v % tau == slot)) for slot in range(tau)])
    state = ParamHistoryState(jnp.int32(m), {"stage00": ring, "stage01": None})
    measured = measure_staleness(state, {"stage00": walk(m), "stage01": jnp.zeros(2)})
    assert measured["alignment"] == pytest.approx(1.0)
    assert measured["gap"] == pytest.approx(tau * math.sqrt(2.5))
    assert measure_staleness(state._replace(count=jnp.int32(7)), {"stage00": walk(m), "stage01": jnp.zeros(2)}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (1, 32)}, r"stages must be at most the number of blocks, 16, got \(1, 32\)"),
        ({"stages": (0,)}, "stages must be at least 1, got 0"),
        ({"methods": ()}, "methods is empty"),
        ({"learning_rates": (0.0,)}, "learning_rates must be positive"),
        ({"clip": -1.0}, "clip must be positive, got -1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        staleness.Config(**options)
