"""Initialisers, isometry and its repair, spectra and scores by layer, held against NumPy and the paper's numbers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import pruning
from jaxlib_methods.pruning import initializers, signal_propagation as propagation


def mlp(params, x, phi=lambda z: z):
    """Logits of one example."""
    *hidden, last = params
    for layer in hidden:
        x = phi(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def logits(params, x, phi=lambda z: z):
    return jax.vmap(lambda x: mlp(params, x, phi))(x)


def zeros_mlp(*widths):
    return [{"kernel": jnp.zeros((n, k)), "bias": jnp.full(k, 0.5)} for n, k in itertools.pairwise(widths)]


def cross_entropy(params, batch):
    x, labels = batch
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits(params, x, jnp.tanh)), labels[:, None], axis=1))


@pytest.fixture(scope="module")
def network():
    params = pruning.reinitialize(zeros_mlp(6, 8, 5, 3), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (40, 6))
    return params, (x, jnp.arange(40, dtype=jnp.int32) % 3)


class TestInitializers:
    @pytest.mark.contract
    def test_orthogonal_matrices_have_orthonormal_columns_or_rows(self, key):
        params = pruning.reinitialize(
            {"tall": jnp.zeros((50, 20)), "wide": jnp.zeros((20, 50))}, key=key, kind="orthogonal"
        )
        tall, wide = (np.asarray(params[name], np.float64) for name in ("tall", "wide"))
        assert np.linalg.norm(tall.T @ tall - np.eye(20)) < 1e-5 * 20
        assert np.linalg.norm(wide @ wide.T - np.eye(20)) < 1e-5 * 50

    def test_a_linear_network_has_ten_singular_values_of_one(self, key):
        params = pruning.reinitialize(zeros_mlp(784, 100, 100, 10), key=key)
        assert all(not layer["bias"].any() for layer in params)
        inputs = jax.random.normal(jax.random.key(1), (3, 784))
        s = propagation.jacobian_singular_values(logits, params, inputs)
        assert s.shape == (3, 10)
        np.testing.assert_allclose(s, 1, atol=1e-5)
        assert propagation.summarize_spectrum(s).std < 1e-5
        normal = pruning.reinitialize(params, key=key, kind="lecun_normal")
        spread = propagation.summarize_spectrum(propagation.jacobian_singular_values(logits, normal, inputs))
        assert spread.condition > 1.5 and spread.std > 0.1

    @pytest.mark.parametrize(("size", "inputs", "outputs"), [(2, 4, 4), (3, 3, 5)])
    def test_orthogonal_kernels_keep_the_norm_of_any_image(self, key, size, inputs, outputs):
        kernel = np.asarray(initializers.orthogonal_convolution()(key, (size, size, inputs, outputs)), np.float64)
        image = np.random.default_rng(0).standard_normal((7, 7, inputs))
        out = np.zeros((7, 7, outputs))
        for i in range(size):  # circular padding
            for j in range(size):
                out += np.roll(image, (-i, -j), axis=(0, 1)) @ kernel[i, j]
        np.testing.assert_allclose(np.linalg.norm(out), np.linalg.norm(image), rtol=1e-5)
        C = kernel.reshape(-1, outputs)
        np.testing.assert_allclose(np.trace(C.T @ C), inputs, rtol=1e-5)  # fewer than outputs: no minimiser of F
        if inputs == outputs:
            assert pruning.isometry.isometry_loss(jnp.asarray(kernel, jnp.float32)) < 1e-4

    def test_projections_and_blocks(self, key):
        P, Q = (np.asarray(initializers._symmetric_projection(k, 8, jnp.float32)) for k in jax.random.split(key))
        np.testing.assert_allclose(P @ P, P, atol=1e-5)
        np.testing.assert_allclose(P, P.T, atol=1e-6)
        assert np.round(np.trace(P)) not in (0, 8)
        K = np.asarray(initializers._isometric_block(jnp.asarray(P), jnp.asarray(Q)))
        np.testing.assert_allclose(sum(K[i, j].T @ K[i, j] for i in (0, 1) for j in (0, 1)), np.eye(8), atol=1e-5)

    @pytest.mark.parametrize(("kind", "fan"), [("lecun_normal", 90), ("glorot_normal", 909 / 2), ("he_normal", 45)])
    def test_normals_have_the_variance_of_the_fans_and_no_bound(self, key, kind, fan):
        variance = 1 / fan
        kernel = np.asarray(pruning.reinitialize(jnp.zeros((3, 3, 10, 91)), key=key, kind=kind), np.float64)
        np.testing.assert_allclose(kernel.var(), variance, rtol=0.06)
        assert np.abs(kernel).max() > 3 * np.sqrt(variance)  # a truncated normal ends at 2.3 of its deviations

    def test_normalisation_layers_stay_and_kernels_without_isometry_are_refused(self, key):
        bn = {"scale": jnp.full(3, 2.0), "bias": jnp.ones(3)}
        params = {"conv": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.ones(4)}, "bn": bn}
        drawn = pruning.reinitialize(params, key=key, kind="delta_orthogonal", gain=2.0)
        assert drawn["bn"]["scale"].tolist() == [2] * 3 and drawn["bn"]["bias"].tolist() == [1] * 3
        assert (
            not drawn["conv"]["bias"].any() and not np.delete(drawn["conv"]["kernel"].reshape(9, -1), 4, axis=0).any()
        )
        np.testing.assert_allclose(jnp.sum(drawn["conv"]["kernel"] ** 2), 8, rtol=1e-5)  # gain^2 x inputs
        with pytest.raises(ValueError, match=r"conv_orthogonal cannot draw 'conv/kernel'.*\(3, 3, 4, 2\).*orthogonal"):
            pruning.reinitialize({"conv": {"kernel": jnp.zeros((3, 3, 4, 2))}}, key=key)
        with pytest.raises(ValueError, match=r"kind must be one of 'orthogonal', .*, got 'he'"):
            pruning.reinitialize(params, key=key, kind="he")


class TestIsometry:
    def test_the_gradient_is_the_papers_and_zero_at_an_isometry(self, key):
        W, mask = jax.random.normal(key, (6, 4)), jax.random.bernoulli(jax.random.key(1), 0.6, (6, 4))
        gradient = jax.grad(pruning.isometry.isometry_loss)(W, mask)
        C, M = np.where(mask, np.asarray(W, np.float64), 0), np.asarray(mask)
        R = C.T @ C - np.eye(4)
        np.testing.assert_allclose(gradient, M * (2 * C @ R) / np.linalg.norm(R), rtol=1e-5, atol=1e-6)
        moved = pruning.repair_isometry(W, mask, num_steps=1).params
        np.testing.assert_allclose((pruning.apply_masks(W, mask) - moved) / 0.1, gradient, rtol=1e-3, atol=1e-5)
        identity = jnp.eye(6, 4)
        assert not jax.grad(pruning.isometry.isometry_loss)(identity).any()
        repaired, losses = pruning.repair_isometry(identity, jnp.ones((6, 4), bool), num_steps=3)
        assert (repaired == identity).all() and losses.tolist() == [0] * 4

    def test_wide_layers_end_at_the_root_of_the_surplus_and_descend_as_the_definition_says(self, key):
        wide = pruning.reinitialize(jnp.zeros((3, 3, 3, 64)), key=key, kind="orthogonal")
        np.testing.assert_allclose(pruning.isometry.isometry_loss(wide), np.sqrt(37), rtol=1e-5)  # 6.0828
        W, mask = jax.random.normal(key, (3, 5)), jax.random.bernoulli(jax.random.key(1), 0.7, (3, 5))
        moved, losses = pruning.repair_isometry(W, mask, num_steps=4)
        C, M, expected = np.where(mask, np.asarray(W, np.float64), 0), np.asarray(mask), []
        for _ in range(4):
            R = C.T @ C - np.eye(5)
            expected.append(np.linalg.norm(R))
            C = C - 0.1 * M * (2 * C @ R) / expected[-1]
        np.testing.assert_allclose(losses[:4], expected, rtol=1e-5)
        np.testing.assert_allclose(moved, C, rtol=1e-4, atol=1e-6)

    def test_layers_of_one_network_are_repaired_as_if_alone(self):
        rng = np.random.default_rng(0)
        shapes = {"a": (12, 6), "b": (12, 6), "conv": (2, 3, 2, 6), "c": (6, 9)}  # three of one shape as matrices
        params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
        masks = {name: jnp.asarray(rng.random(shape) < 0.5) for name, shape in shapes.items()} | {"b": None}
        params["bias"], masks["bias"] = jnp.array([1.0, 2.0]), jnp.array([True, False])
        together = pruning.repair_isometry(params, masks, num_steps=20)
        losses = 0
        for name in shapes:
            as_one = lambda tree, name=name: (
                None if tree[name] is None else tree[name].reshape(-1, tree[name].shape[-1])
            )
            alone = pruning.repair_isometry(as_one(params), as_one(masks), num_steps=20)
            np.testing.assert_allclose(as_one(together.params), alone.params, rtol=1e-3, atol=1e-5)
            assert masks[name] is None or not together.params[name][~masks[name]].any()
            losses = losses + alone.losses
        np.testing.assert_allclose(together.losses, losses, rtol=1e-5)
        assert together.params["bias"].tolist() == [1, 0]

    def test_the_papers_example_of_a_pruned_layer(self):
        """300 x 100, 90 % removed at random: F from 9.0 to about 0.2, singular values from 0.297 to 1.00."""
        rng = np.random.default_rng(0)
        W = jnp.asarray(np.linalg.qr(rng.standard_normal((300, 100)))[0], jnp.float32)
        mask = jnp.asarray(rng.random((300, 100)) < 0.1)
        before = propagation.summarize_spectrum(propagation.weight_singular_values(W, mask))
        repaired, losses = pruning.repair_isometry(W, mask)
        after = propagation.summarize_spectrum(propagation.weight_singular_values(repaired, mask))
        assert losses.shape == (10_001,)
        np.testing.assert_allclose(losses[0], 9.04, atol=0.1)
        np.testing.assert_allclose(losses[-1], 0.2, atol=0.05)
        np.testing.assert_allclose(before.mean, 0.297, atol=0.01)
        np.testing.assert_allclose(after.mean, 1, atol=0.01)
        assert after.std < 0.03 and not repaired[~mask].any()

    def test_columns_without_entries_bound_the_loss_and_lone_entries_become_one(self, key):
        mask = np.asarray(jax.random.bernoulli(key, 0.4, (30, 8))).copy()
        mask[:, :2] = False  # two empty columns
        mask[:, 2], mask[0] = False, False
        mask[0, 2] = True  # a column's only entry, and its row's
        W = jax.random.normal(key, (30, 8)) / 5
        for objective, tolerance in (("frobenius", 0.15), ("squared", 1e-4)):
            repaired, losses = pruning.repair_isometry(W, jnp.asarray(mask), num_steps=2000, objective=objective)
            assert (np.asarray(losses) >= np.sqrt(2) - 1e-5).all() and losses[-1] < losses[0]
            np.testing.assert_allclose(abs(repaired[0, 2]), 1, atol=tolerance)
            np.testing.assert_allclose(losses[-1], np.sqrt(2), atol=tolerance)

    def test_a_decaying_rate_ends_the_oscillation_of_the_unsquared_norm(self, key):
        W, mask = jax.random.normal(key, (50, 20)) / 5, jnp.ones((50, 20), bool)
        constant = pruning.repair_isometry(W, mask, num_steps=2000).losses
        decayed = pruning.repair_isometry(
            W, mask, num_steps=2000, learning_rate=optax.exponential_decay(0.1, 1, 0.995)
        ).losses
        assert 0.05 < constant[-1] < 0.3 and decayed[-1] < 1e-3

    def test_bad_arguments_are_named(self):
        W, mask = jnp.eye(2), jnp.ones((2, 2), bool)
        with pytest.raises(ValueError, match="objective must be one of 'frobenius', 'squared', got 'l1'"):
            pruning.repair_isometry(W, mask, objective="l1")
        with pytest.raises(ValueError, match="steps must not be negative, got -1"):
            pruning.repair_isometry(W, mask, num_steps=-1)


class TestScores:
    def test_accumulation_is_the_mean_of_the_signed_gradients_of_one_pass(self, network):
        params, (x, labels) = network
        gradient = jax.jit(jax.grad(cross_entropy))
        parts = [gradient(params, (x[i : i + 10], labels[i : i + 10])) for i in range(0, 40, 10)]
        mean = jax.tree.map(lambda w, *g: np.abs(np.asarray(w) * np.mean(g, axis=0)), params, *parts)
        total = sum(leaf.sum() for leaf in jax.tree.leaves(mean))
        score = functools.partial(pruning.connection_sensitivity, cross_entropy, num_microbatches=4)
        scores = jax.jit(score)(params, (x, labels))
        for score, expected in zip(jax.tree.leaves(scores), jax.tree.leaves(mean), strict=True):
            np.testing.assert_allclose(score, expected / total, rtol=1e-4, atol=1e-8)

    def test_signed_sums_are_conserved_from_layer_to_layer(self, network):
        params, batch = network
        loss = lambda params, batch: -jnp.mean(jax.nn.log_softmax(logits(params, batch[0], jax.nn.relu))[:, 0])
        signed = jax.jit(functools.partial(pruning.scores.gate_gradient, loss))(params, batch)
        sums = [float(layer["kernel"].sum()) for layer in signed]
        np.testing.assert_allclose(sums, sums[0], rtol=1e-4)

    def test_the_uniform_target_is_that_of_the_divergence_and_survives_a_zero_layer(self, network):
        params, (x, _) = network
        loss = lambda params, x: propagation.uniform_cross_entropy(logits(params, x, jnp.tanh))
        z = jax.random.normal(jax.random.key(2), (4, 3))
        kl = lambda z: jnp.mean(jnp.sum(jnp.log(1 / 3 / jax.nn.softmax(z)) / 3, axis=-1))
        np.testing.assert_allclose(propagation.uniform_cross_entropy(z), kl(z) + np.log(3), rtol=1e-5)
        assert not jax.grad(propagation.uniform_cross_entropy)(jnp.zeros((4, 3))).any()
        blind = [*params[:-1], jax.tree.map(jnp.zeros_like, params[-1])]
        score = jax.jit(functools.partial(pruning.connection_sensitivity, loss))
        assert all(not leaf.any() for leaf in jax.tree.leaves(score(blind, x)))
        assert any(leaf.any() for leaf in jax.tree.leaves(score(params, x)))

    def test_rows_by_layer(self, network):
        params, batch = network
        scores = jax.jit(functools.partial(pruning.connection_sensitivity, cross_entropy))(params, batch)
        rows = propagation.layer_sensitivity(scores)
        assert [row.path for row in rows][:2] == ["0/bias", "0/kernel"] and rows[1].size == 48
        np.testing.assert_allclose(sum(row.share for row in rows), 1, rtol=1e-6)
        np.testing.assert_allclose(rows[1].mean, np.mean(scores[0]["kernel"]), rtol=1e-5)

    def test_spectra_are_numpys(self, network):
        params, (x, _) = network
        J = np.asarray(jax.jacfwd(functools.partial(mlp, params, phi=jnp.tanh))(x[0]))
        s = propagation.jacobian_singular_values(functools.partial(logits, phi=jnp.tanh), params, x[:5], batch_size=2)
        np.testing.assert_allclose(s[0], np.linalg.svd(J, compute_uv=False), rtol=1e-5)
        kernel = jax.random.normal(jax.random.key(3), (2, 2, 3, 5))
        values = propagation.weight_singular_values({"conv": kernel, "bias": jnp.zeros(5)})
        assert values["bias"] is None
        np.testing.assert_allclose(
            values["conv"], np.linalg.svd(np.reshape(kernel, (12, 5)), compute_uv=False), rtol=1e-5
        )
