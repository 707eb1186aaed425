"""The batch-size law and the local Lipschitz constant: the paper's numbers, quadratics, brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import training_dynamics as td

THEORY = {"loss_gap": 1, "smoothness": 2, "variance": 0.5, "alignment": 1, "eps": 0.1, "learning_rate": 0.05}


class TestLaw:
    @pytest.mark.contract
    def test_exact_data_give_back_their_constants(self):
        B = 2.0 ** np.arange(1, 15)
        law = td.fit_steps_to_result(B, 409600 / B + 500)
        np.testing.assert_allclose(law, (409600, 500), rtol=1e-12)
        np.testing.assert_allclose(law.critical_batch_size, 819.2, rtol=1e-12)
        np.testing.assert_allclose(law.steps(law.critical_batch_size), 1000, rtol=1e-12)
        np.testing.assert_allclose(law.steps(4) / law.steps(2), 0.50122, atol=5e-6)

    @pytest.mark.parametrize("steps", [(100, 90, 80, 300), (4000, 1000, 200, 20), (990, 260, 80, 33)])
    def test_noisy_data_give_the_least_squares_of_the_relative_errors(self, steps):
        B, K = np.array([4.0, 16, 64, 256]), np.array(steps, float)
        law = td.fit_steps_to_result(B, K)
        assert law.c1 >= 0 and law.c2 >= 0
        loss = lambda c1, c2: np.sum(((c1 / B + c2) / K - 1) ** 2, axis=-1)
        c1, c2 = np.linspace(0, 20000, 401)[:, None, None], np.linspace(0, 400, 401)[:, None]
        assert loss(*law) <= loss(c1, c2).min() + 1e-12

    def test_constants_on_an_axis(self):
        steeper, rising = td.fit_steps_to_result([1, 2, 4], [9, 4, 1]), td.fit_steps_to_result([1, 2, 4], [5, 6, 7])
        assert steeper.c2 == 0 and steeper.critical_batch_size == np.inf
        assert rising.c1 == rising.critical_batch_size == 0

    def test_the_theory_and_its_expansion(self):
        B = np.array([4, 64, 1024])
        np.testing.assert_allclose(td.sgd_steps_to_result(B, **THEORY), [457.143, 403.149, 400.195], atol=2e-3)
        law = td.sgd_batch_size_law(**THEORY)
        np.testing.assert_allclose(law.steps(B), [450, 403.125, 400.195], atol=1e-3)
        assert td.sgd_steps_to_result(0.4, **THEORY) == np.inf
        sparser = td.sgd_batch_size_law(**THEORY | {"smoothness": 4, "learning_rate": 0.025})
        assert sparser.c1 == 2 * law.c1 and sparser.c2 == 2 * law.c2

    @pytest.mark.parametrize(
        ("B", "K", "message"),
        [
            ([1, 2], [1.0], "two lists of one length"),
            ([1, 2], [5, np.inf], "leave out batch sizes whose trials"),
            ([2, 2], [5, 6], "two different batch sizes"),
        ],
    )
    def test_bad_measurements_are_named(self, B, K, message):
        with pytest.raises(ValueError, match=message):
            td.fit_steps_to_result(B, K)


class TestLipschitz:
    @pytest.fixture
    def quadratic(self, x64):
        rng = np.random.default_rng(0)
        A = rng.standard_normal((5, 5))
        A = A @ A.T
        return A, jnp.asarray(A), jnp.asarray(rng.standard_normal(5)), jnp.asarray(rng.standard_normal(5))

    def test_a_quadratic_has_one_ratio_at_every_point(self, quadratic):
        A, Aj, w, d = quadratic
        gradient = lambda w: Aj @ w
        expected = np.linalg.norm(A @ d) / np.linalg.norm(d)
        for gamma in td.STEP_FRACTIONS:
            np.testing.assert_allclose(td.local_lipschitz(gradient, w, w + d, fractions=(gamma,)), expected, rtol=1e-9)
        values, vectors = np.linalg.eigh(A)
        np.testing.assert_allclose(td.local_lipschitz(gradient, w, w + d), expected, rtol=1e-9)
        assert expected < values[-1]
        top = td.local_lipschitz(gradient, w, w + jnp.asarray(vectors[:, -1]))
        np.testing.assert_allclose(top, values[-1], rtol=1e-9)
        assert td.local_lipschitz(gradient, w, w) == 0

    def test_a_network_against_the_definition_whatever_the_chunks(self):
        params = {"W": jax.random.normal(jax.random.key(0), (4, 3)), "v": jnp.arange(3.0)}
        x, y = jax.random.normal(jax.random.key(1), (10, 4)), jnp.linspace(-1, 1, 10)
        loss = lambda p, batch: jnp.mean((jnp.tanh(batch[0] @ p["W"]) @ p["v"] - batch[1]) ** 2)
        gradient = jax.grad(loss)(params, (x, y))
        after = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
        flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        d, ratios = flat(after) - flat(params), []
        for gamma in td.STEP_FRACTIONS:
            between = jax.tree.map(lambda p, q: p + gamma * (q - p), params, after)
            change = flat(jax.grad(loss)(between, (x, y))) - flat(gradient)
            ratios.append(np.linalg.norm(change) / np.linalg.norm(gamma * d))
        before = jax.tree.map(np.array, params)
        for chunk_size in (10, 4, 100):
            whole = jax.jit(lambda p: td.mean_gradient(loss, p, (x, y), chunk_size=chunk_size))
            np.testing.assert_allclose(flat(whole(params)), flat(gradient), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(td.local_lipschitz(whole, params, after), max(ratios), rtol=1e-3)
        assert all((before[name] == params[name]).all() for name in params)

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match=r"fractions must lie in \(0, 1\], got \(0.0,\)"):
            td.local_lipschitz(lambda w: w, jnp.ones(2), jnp.ones(2), fractions=(0.0,))
        with pytest.raises(ValueError, match="chunk_size be at least 1, got 2 and 0"):
            td.mean_gradient(lambda w, x: w, jnp.ones(()), jnp.ones(2), chunk_size=0)
