"""The experiment numuon: what its optimizers share and where they differ, its tuning, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._machinery import loop
from experiments._machinery.errors import NonFiniteLossError
from experiments.methods import numuon
from experiments.tasks import compression, language_modelling

HIDDEN = ("blocks", 0, "mlp", "up", "kernel")


@pytest.fixture
def params(key):
    a, b = jax.random.split(key)
    block = {"mlp": {"up": {"kernel": jax.random.normal(a, (6, 4))}}, "norm1": {"scale": jnp.ones(4)}}
    return {"blocks": {0: block}, "embed": {"tokens": {"embedding": jax.random.normal(b, (8, 4))}}}


def one_update(name, params, learning_rate=0.01, gradients=None, **changes):
    optimizer = numuon.make_optimizer(name, numuon.Config(**numuon.SMOKE | {"weight_decay": 0.0} | changes), 1000)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to its int32 counter
        state = loop.init_state(params, optimizer, key=jax.random.key(0))
        opt_state = optax.tree_utils.tree_set(state.opt_state, step_size=jnp.float32(learning_rate))
        return optimizer.update(params if gradients is None else gradients, opt_state, params)[0]


def at(tree, path=HIDDEN):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


@pytest.mark.parametrize("name", ["muon", "numuon", "muon_without_nesterov"])
def test_all_optimizers_share_the_step_of_everything_but_the_hidden_matrices(name, params):
    ours, adamw = one_update(name, params), one_update("adamw", params)
    for path in (("embed", "tokens", "embedding"), ("blocks", 0, "norm1", "scale")):
        np.testing.assert_allclose(at(ours, path), at(adamw, path), rtol=1e-6)
    assert abs(at(ours) - at(adamw)).max() > 1e-5


def test_steps_of_the_hidden_matrices(params):
    first_rate = 0.01 / 60  # the warm-up takes 60 of 1,000 steps
    size = first_rate * 0.2 * math.sqrt(6)
    spectrum = lambda name, **changes: np.linalg.svd(at(one_update(name, params, **changes)), compute_uv=False) / size
    for name in ("muon", "muon_without_nesterov", "numuon"):  # rank 1 at first: Newton-Schulz for all
        values = spectrum(name)
        assert values.min() > 0.6 and values.max() < 1.25
    np.testing.assert_allclose(spectrum("numuon", rank_start=0.5, rank_end=0.5), [1, 1, 0, 0], atol=1e-3)
    np.testing.assert_allclose(at(one_update("adamw", params)), -first_rate * np.sign(at(params)), rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon", "numuon"])
def test_the_rate_in_the_state_scales_the_step_and_its_decay(name, params):
    slow, fast = (one_update(name, params, rate, weight_decay=0.1) for rate in (0.01, 0.03))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(3 * a, b, rtol=1e-5, atol=1e-8), slow, fast)


@pytest.mark.parametrize("name", ["adamw", "muon", "numuon"])
def test_weight_decay_acts_on_the_hidden_matrices_alone(name, params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    decayed = one_update(name, params, gradients=zeros, weight_decay=0.1)
    np.testing.assert_allclose(at(decayed), -0.01 / 60 * 0.1 * at(params), rtol=1e-4, atol=1e-9)
    for path in (("embed", "tokens", "embedding"), ("blocks", 0, "norm1", "scale")):
        assert not at(decayed, path).any()


class FakeTask:
    """Trains to a loss that is known for each learning rate; NaN stands for a divergence."""

    def __init__(self, params, losses):
        self.params, self.losses, self.seen = params, losses, []

    def start(self, optimizer, seed):
        return loop.init_state(self.params, optimizer, key=jax.random.key(seed))

    def fit(self, optimizer, seed, workdir, *, label, steps, state):
        rate = float(state.opt_state[-1].hyperparams["step_size"])
        (rate,) = (known for known in self.losses if math.isclose(known, rate, rel_tol=1e-6))
        self.seen.append((seed, steps, rate))
        if math.isnan(self.losses[rate]):
            raise NonFiniteLossError(label)
        return state, [{"validation_loss": self.losses[rate]}]


@pytest.mark.parametrize(
    ("losses", "best", "tried"),
    [
        ({1e-3: 2.0, 1e-2: 1.5, 1e-1: math.nan}, 1e-2, [1e-3, 1e-2, 1e-1]),
        ({1e-4: 9.0, 1e-3: 2.0, 1e-2: 1.5, 1e-1: 1.6, 1.0: 9.0}, 1e-2, [1e-3, 1e-2, 1e-1]),
        ({1e-4: 1.0, 1e-3: 1.1, 1e-2: 1.5, 1e-1: 1.6, 1.0: 9.0}, 1e-4, [1e-3, 1e-2, 1e-1, 1e-4]),
        ({1e-2: 1.0}, 1e-2, []),
    ],
)
def test_tuning_walks_the_grid_to_the_lowest_loss(losses, best, tried, tmp_path, params):
    task = FakeTask(params, losses)
    study = numuon.Study(numuon.Config(learning_rates=tuple(losses), seeds=2, tune_steps=9), task, None)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam raises a float to its int32 counter
        assert study.tune("adamw", tmp_path) == study.tune("adamw", tmp_path) == best
    assert task.seen == [(2, 9, rate) for rate in tried]  # once each, of a seed that is not reported


def test_equal_loss_is_where_the_better_curve_passes_the_end_of_the_other():
    better = [(3.0, 5.0), (2.0, 4.0), (1.0, 3.0)]
    worse = [(4.0, 4.0), (1.5, 2.5)]
    assert compression.at_equal_loss(better, worse) == (1.5, 3.5, 2.5)
    assert compression.at_equal_loss(worse, better) == (1.5, 2.5, 3.5)


def test_nothing_removed_changes_nothing():
    # 7 is prime and keeps to one of the eight fake devices: eight threads on two cores wait for one another.
    config = numuon.Config(**numuon.SMOKE | {"batch_size": 7})
    task = language_modelling.load(config)
    compressed = compression.Compression(task, config.calibration_windows)
    state = task.start(optax.sgd(0.1), 0)
    statistics = compressed.statistics(state.params)
    kinds = {path.split("/")[-2] for path in statistics}
    assert kinds == {"query", "key", "value", "out", "up", "gate", "down"}
    assert all(entry.tokens == 14 * 32 for entry in statistics.values())  # 16 windows are two batches of 7
    # Half the rank of a square kernel is kept even when no parameter is removed: two factors hold as many numbers.
    full = task.evaluate(state)["validation_loss"]
    for method in config.methods:
        assert abs(compressed.loss(state, method, 0.0, statistics) - full) < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": ()}, "optimizers is empty"),
        ({"removed": (0.2, 1.0)}, r"removed must lie in \[0, 1\), got 1.0; 0.4 removes 40 of 100"),
        ({"learning_rates": (0.0,)}, "learning_rates must be positive"),
        ({"rank_end": 0.0}, r"rank_end must lie in \(0, 1\], got 0.0"),
        ({"rank_start": 0.1}, "rank_end must be at most rank_start, 0.1, got 0.25"),
        ({"tune_steps": 0}, "tune_steps must be at least 1, got 0"),
        ({"preset": "gpt5"}, "preset must be one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        numuon.Config(**options)
