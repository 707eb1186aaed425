"""The experiment on subspace networks: moves of the basis, equal parameters, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._machinery import loop
from experiments._machinery.records import Case
from experiments.methods import subspace
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import models
from jaxlib_methods.parallel import boundaries


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # scale_by_adam needs it
        yield


def test_a_move_projects_the_constrained_weights_onto_the_new_subspace_and_changes_nothing_else():
    """Z U^T becomes Z U^T U' U'^T: the moved network is the dense one with these weights."""
    config = subspace.Config(**subspace.SMOKE | {"batch_size": 11})
    task = language_model.load(config)
    runs = subspace.training(config, task, "subspace_moving")
    rng = np.random.default_rng(0)
    draw = lambda tree: jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=0.3, size=p.shape), p.dtype), tree)
    params = draw(jax.eval_shape(runs.network.init, jax.random.key(0)))
    state = loop.init_state(params, runs.optimizer, key=jax.random.key(1), model_state=runs.network.states())
    state = state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, m=draw(params)))
    windows = task.calibration(22).reshape(2, 11, -1)
    captured, moved = runs.move(state, windows)
    U, V = state.model_state[0], moved.model_state[0]
    np.testing.assert_allclose(V.T @ V, np.eye(4), atol=1e-5)
    assert float(captured) < float(runs.move(moved, windows)[0]) < 1

    decoder = dataclasses.replace(config.subspace_model(task.config.vocab_size), subspace=None)
    fns = models.gpt_stages(decoder)
    fixed = boundaries.random_subspace(key=jax.random.key(0), vocab_size=256, width=16, rank=4).T_fixed

    def dense_loss(params, windows):
        of_embed, of_blocks, of_head = models.split_gpt_params(decoder, params)
        x = fns.embed(of_embed, windows[:, :-1], None, fixed[windows[:, :-1]])
        for of_block in of_blocks:
            x = fns.block(of_block, x)
        return language_model.cross_entropy(fns.head(of_head, x), windows[:, 1:]).mean()

    coordinates = runs.network.coordinates
    times = lambda tree, M: jax.tree.map(lambda p, z: p @ M if z else p, tree, coordinates)
    losses = jax.jit(lambda state, windows: runs.network.losses(state.params, state.model_state, windows)[0].mean())
    batch = jnp.asarray(windows[0], jnp.int32)
    predicted = [float(jax.jit(dense_loss)(times(params, M), batch)) for M in (U.T, U.T @ V @ V.T)]
    np.testing.assert_allclose([float(losses(s, batch)) for s in (state, moved)], predicted, rtol=1e-5)
    assert abs(predicted[0] - predicted[1]) > 1e-3

    moments = lambda name: [optax.tree_utils.tree_get(s.opt_state, name) for s in (state, moved)]
    for (before, after), M in ((moments("m"), U.T @ V), (moments("r"), None)):
        expected = before if M is None else times(before, M)
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6)


def test_the_subspace_network_has_the_parameters_of_the_dense_one():
    config = subspace.Config()
    dense, constrained = (
        language_model.decoder_parameters(config.model()),
        language_model.decoder_parameters(config.subspace_model()),
    )
    half_a_unit = config.model().layers * 3 * config.width / 2
    assert abs(dense - constrained) <= half_a_unit
    assert constrained != language_model.decoder_parameters(config.subspace_model(300))


def test_steps_ratio_is_read_off_the_curve():
    def case(name, seed, *losses):
        curve = [{"step": 10 * (i + 1), "validation_loss": loss} for i, loss in enumerate(losses)]
        return Case(name, name, seed, {"validation_loss": losses[-1]}, curve, {}, None)

    cases = [case("dense", seed, 3.0, 2.0) for seed in (0, 1)]
    cases += [case("subspace_long", 0, 4.0, 3.0, 2.5, 1.9), case("subspace_long", 1, 4.0, 3.0, 2.5, 2.1)]
    shared = subspace.Shared(subspace.Config(steps=20), None)
    assert subspace.compare(shared, cases) == [("subspace_long", 0, {"steps_ratio": 2.0})]
    assert subspace.compare(shared, cases[2:]) == []
    published = subspace.Config(preset="llama_small", layers=8, width=1024, heads=8, rank=160)
    assert subspace.targets(published)["subspace_long"]["steps_ratio"].value == pytest.approx(3.12, abs=0.005)
    assert not subspace.targets(subspace.Config())


def test_errors_name_the_option():
    for options, message in (
        ({"rank": 97}, "must not exceed width"),
        ({"layers": 1}, "layers must be at least 2"),
        ({"longer": 0}, "longer must be at least 1"),
        ({"basis_every": 0}, "basis_every must be at least 1"),
        ({"learning_rates": ()}, "learning_rates is empty"),
        ({"preset": "gpt2_small"}, "set tied=False"),
    ):
        with pytest.raises(ValueError, match=message):
            subspace.Config(**options)
