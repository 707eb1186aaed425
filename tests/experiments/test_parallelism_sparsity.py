"""The study of batch size and sparsity: the search's maps and points, optimizers, status of trials, resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments._machinery import device_data, runner
from experiments._machinery.records import Case
from experiments.methods import parallelism_sparsity
from experiments.tasks import metaparameters, steps_to_result, trials
from jaxlib_methods import models, pruning

SMALL = {"trials": 4, "interval": 10, "batch_sizes": (32,), "max_steps": 80, "goal_error": 0.5, "early_stop": False}


@pytest.fixture(scope="module")
def study():
    return steps_to_result.Study(parallelism_sparsity.Config(**SMALL))


def test_smoke_run_leaves_the_law_and_the_constants(tmp_path):
    config = parallelism_sparsity.Config(**parallelism_sparsity.SMOKE)
    (record,) = runner.run(parallelism_sparsity, config, tmp_path, smoke=True)["records"]
    assert record["variant"] == "sgd s=0.9" and {"c1", "c2", "lipschitz"} <= set(record["metrics"])
    assert all(value >= 0 for value in record["metrics"].values())
    assert (tmp_path / "steps_to_result.png").stat().st_size > 5000


def test_a_search_without_success_has_no_law_and_still_a_figure(study):
    results = {8: {"steps": None}, 16: {"steps": None}}
    assert parallelism_sparsity.fit(results) is None and parallelism_sparsity.fit(results | {8: {"steps": 40}}) is None
    variant = parallelism_sparsity.Variant("sgd", 0.9)
    case = Case("sgd s=0.9", variant, 0, {}, [], {"searches": results}, None)
    assert parallelism_sparsity.figures(study, [case])["steps_to_result"].axes


class TestSearch:
    def test_maps(self):
        u = np.array([0.5, 0.75, 0.25])
        np.testing.assert_allclose(metaparameters.RANGES["learning_rate"](u), [1e-2, 1e-1, 1e-3], rtol=1e-12)
        momentum = metaparameters.RANGES["momentum"](np.array([0, 0.5, 1]))
        np.testing.assert_allclose(momentum, [0.9999, 0.996838, 0.9], atol=5e-7)
        assert metaparameters.RANGES["decay_steps"](np.array([0.5, 0.00001])).tolist() == [45000, 30000]
        with pytest.raises(ValueError, match="scale must be log, reverse_log or linear"):
            metaparameters.Range(0, 1, "exp")
        with pytest.raises(ValueError, match="a log range cannot go from 0 to 1"):
            metaparameters.Range(0, 1, "log")

    def test_the_points_are_the_authors_in_the_first_two_coordinates(self):
        points = metaparameters.sobol_points(100, 4)
        assert points.shape == (100, 4) and points[0].tolist() == [0.5] * 4
        assert points[:6, 0].tolist() == [0.5, 0.75, 0.25, 0.375, 0.875, 0.625]
        assert points[1, :2].tolist() == [0.75, 0.25]  # both generators
        assert points[1, 2:].tolist() == [0.25, 0.25]  # Joe and Kuo's; the authors' has 0.75, 0.25
        assert metaparameters.sobol_points(7, 4).tolist() == points[:7].tolist()

    def test_the_stream_of_examples_straddles_epochs(self, key):
        rows = np.asarray(jax.jit(device_data.stream_indices, static_argnums=(2, 3))(key, jnp.arange(7), 10, 4)).ravel()
        assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
        assert rows[:10].tolist() != rows[10:20].tolist()


class TestOptimizers:
    @pytest.mark.parametrize("kind", ["sgd", "momentum", "nesterov"])
    @pytest.mark.parametrize("decay", ["constant", "linear"])
    def test_steps_are_tensorflows(self, kind, decay):
        chosen = {"learning_rate": 0.1, "momentum": 0.9, "decay_steps": 4, "end_learning_rate_factor": 0.2}
        values = {name: chosen[name] for name in metaparameters.searched(kind, decay)}
        optimizer = metaparameters.make_optimizer(kind, decay)(**values)
        w = jnp.array([1.0, -2.0])
        state, mine, v = optimizer.init(w), np.asarray(w, np.float64), 0.0
        for t in range(6):
            rate = 0.1 * (1 - 0.8 * min(t / 4, 1)) if decay == "linear" else 0.1
            g = 3 * mine
            v = 0.9 * v + g
            mine = mine - rate * {"sgd": g, "momentum": v, "nesterov": g + 0.9 * v}[kind]
            updates, state = optimizer.update(3 * w, state)
            w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w, mine, rtol=1e-4)

    def test_without_noise_the_steps_are_the_closed_form(self):
        """A quadratic with the rate 1 / L: the gradient of eigenvalue a shrinks by 1 - a / L a step."""
        a, tolerance = jnp.array([0.1, 1.0]), 1e-3
        optimizer = metaparameters.make_optimizer("sgd", "constant")(learning_rate=1.0)
        w, state, steps = jnp.ones(2), optimizer.init(a), 0
        while np.linalg.norm(a * w) > tolerance:
            updates, state = optimizer.update(a * w, state)
            w, steps = optax.apply_updates(w, updates), steps + 1
        assert steps == np.ceil(np.log(tolerance / 0.1) / np.log(1 - 0.1))


class TestTrials:
    def test_pruned_weights_stay_zero_under_momentum(self, study):
        start = study.start("nesterov", 0.9, slice(0, 4))
        state = study.program("nesterov", 32, 4).advance(start, goal_error=-1.0)
        for i in range(4):
            kept = [np.asarray(mask[i]) for mask in jax.tree.leaves(state.masks)]
            values, first = ([np.asarray(leaf[i]) for leaf in jax.tree.leaves(s.params)] for s in (state, start))
            assert sum(mask.sum() for mask in kept) == round(0.1 * 50_610)
            assert all((value[~mask] == 0).all() for value, mask in zip(values, kept, strict=True))
            assert any((a != b).any() for a, b in zip(values, first, strict=True))

    def test_status(self, study):
        program = study.program("nesterov", 32, 4)
        state = study.start("nesterov", 0.0, slice(0, 4))
        run = functools.partial(program.run, max_steps=20, early_stop=False)
        assert run(state, goal_error=1.0)[1].tolist() == [10] * 4
        assert run(state, goal_error=0.0)[1].tolist() == [trials.INCOMPLETE] * 4
        rates = jnp.array([1e3, 0.01, 1e30, 0.01])
        hyperparams = state.opt_state.hyperparams | {"learning_rate": rates, "momentum": jnp.full(4, 0.9)}
        wild = state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))
        assert run(wild, goal_error=0.0)[1].tolist() == [trials.INFEASIBLE, trials.INCOMPLETE] * 2

    def test_a_finished_trial_changes_no_more(self, study):
        program = study.program("nesterov", 32, 4)
        state = study.start("nesterov", 0.0, slice(0, 4))
        state = program.advance(state._replace(status=jnp.array([-1, 5, -2, -1], jnp.int32)), goal_error=-1.0)
        later = program.advance(state, goal_error=-1.0)
        kernels = [s.params["dense1"]["kernel"][...] for s in (state, later)]
        moved = [bool((a != b).any()) for a, b in zip(*kernels, strict=True)]
        assert moved == [True, False, False, True] and later.status.tolist() == [-1, 5, -2, -1]

    def test_together_alone_and_stopped_early_find_the_same(self, study):
        together = study.search("nesterov", 0.9, 32, None)
        assert together["statuses"] == study.search("nesterov", 0.9, 32, None)["statuses"]
        assert min(s for s in together["statuses"] if s > 0) == together["steps"]
        for change in ({"trials_at_once": 1}, {"early_stop": True}, {"trials_at_once": 1, "early_stop": True}):
            other = steps_to_result.Study.__new__(steps_to_result.Study)
            other.__dict__ |= study.__dict__ | {"options": parallelism_sparsity.Config(**SMALL | change)}
            found = other.search("nesterov", 0.9, 32, None)
            assert found["steps"] == together["steps"], change
            if "early_stop" not in change:
                assert found["statuses"] == together["statuses"]

    def test_an_interrupted_run_continues_to_the_same_bits(self, study, tmp_path):
        program = study.program("nesterov", 32, 4)
        run = functools.partial(program.run, goal_error=0.0, checkpoint_every=10)
        whole, _ = run(study.start("nesterov", 0.9, slice(0, 4)), max_steps=40)
        run(study.start("nesterov", 0.9, slice(0, 4)), max_steps=20, folder=tmp_path)
        fresh = study.start("nesterov", 0.9, slice(0, 4))
        blank = fresh._replace(params=jax.tree.map(jnp.zeros_like, fresh.params))  # only what was saved can be used
        resumed, _ = run(blank, max_steps=40, folder=tmp_path)
        assert int(resumed.step) == 40
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), resumed.params, whole.params))

    def test_the_check_counts_every_example_once(self, study, monkeypatch):
        monkeypatch.setattr(trials, "_EVALUATED_AT_ONCE", 50)  # 144 validation examples: three batches that overlap
        params = jax.tree.map(lambda x: x[0], study.start("nesterov", 0.0, slice(0, 1)).params)
        split = study.dataset.validation
        wrong, finite = jax.jit(lambda params: trials._check(study.logits, params, jax.tree.map(jnp.asarray, split)))(
            params
        )
        logits = np.asarray(study.logits(params, jnp.asarray(split.images)))
        assert int(wrong) == np.sum(logits.argmax(-1) != split.labels) and bool(finite)


def test_simple_cnn_keeps_6235_of_its_connections_and_no_bias():
    graph, params = nnx.split(models.small_convolutional.SimpleCNN(10, rngs=nnx.Rngs(0)))

    def loss(params, batch):
        images, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(images), labels).mean()

    batch = jax.random.normal(jax.random.key(1), (20, 28, 28, 1)), jnp.arange(20, dtype=jnp.int32) % 10
    scores = jax.jit(lambda params: pruning.connection_sensitivity(loss, params, batch, num_microbatches=2))(params)
    leaves = jax.tree.leaves(scores)
    np.testing.assert_allclose(sum(float(leaf.sum()) for leaf in leaves), 1, rtol=1e-4)
    silent = sum(int((leaf == 0).sum()) for leaf in leaves)
    assert 106 <= silent < 0.1 * 62_346
    for sparsity, kept in ((0.0, 62_346), (0.1, 56_111), (0.9, 6_235)):
        masks = pruning.prune_masks(scores, sparsity)
        rows = {row.path: row.kept for row in pruning.sparsity.summarize_sparsity(masks)}
        assert rows["total"] == kept
        if sparsity:
            assert rows["conv1/bias"] == rows["conv2/bias"] == rows["dense/bias"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsities": (1.0,)}, r"sparsities must lie in \[0, 1\), got 1.0"),
        ({"goal_error": 5}, r"goal_error must lie in \[0, 1\], got 5; 0.05 is five percent"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"batch_sizes": (0,)}, "batch_sizes must be at least 1"),
        ({"model": "lenet6"}, "model must be one of lenet300"),
        ({"lipschitz_every": 1}, "lipschitz_every must be at least 2, got 1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        parallelism_sparsity.Config(**options)


def test_models_with_batch_norm_are_refused():
    with pytest.raises(ValueError, match="'vgg_c' has state beside its parameters"):
        steps_to_result.Study(parallelism_sparsity.Config(model="vgg_c"))
