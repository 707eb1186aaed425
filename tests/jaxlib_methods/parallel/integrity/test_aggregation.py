"""Robust aggregation against NumPy loops, and against attackers of every size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.parallel.integrity.aggregation import (
    centered_clip,
    coordinate_median,
    geometric_median,
    krum_scores,
    multi_krum,
    trimmed_mean,
)

N, F = 9, 3


@pytest.fixture(scope="module")
def gradients():
    a, b = jax.random.split(jax.random.key(0))
    return {"w": jax.random.normal(a, (N, 3, 4)), "b": jax.random.normal(b, (N, 5))}


def rows(tree):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(N, -1) for leaf in jax.tree.leaves(tree)], axis=1)


def row(tree):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


@pytest.mark.contract
def test_krum_against_a_loop(gradients):
    g = rows(gradients)
    scores = [sum(sorted(((g[i] - g[j]) ** 2).sum() for j in range(N) if j != i)[: N - F - 2]) for i in range(N)]
    np.testing.assert_allclose(krum_scores(gradients, num_malicious=F), scores, rtol=1e-5)
    best = np.argsort(scores)
    np.testing.assert_allclose(row(multi_krum(gradients, num_malicious=F, num_keep=1)), g[best[0]], rtol=1e-6)
    np.testing.assert_allclose(
        row(multi_krum(gradients, num_malicious=F)), g[best[: N - F]].mean(0), rtol=1e-5, atol=1e-6
    )


def test_median_and_trimmed_mean_against_a_loop(gradients):
    g = rows(gradients)
    np.testing.assert_allclose(row(coordinate_median(gradients)), np.median(g, axis=0), rtol=1e-6)
    np.testing.assert_allclose(
        row(coordinate_median(jax.tree.map(lambda x: x[:8], gradients))), np.median(g[:8], axis=0), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        row(trimmed_mean(gradients, num_trimmed=2)), np.sort(g, axis=0)[2:-2].mean(0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(row(trimmed_mean(gradients, num_trimmed=0)), g.mean(0), rtol=1e-5, atol=1e-6)


def test_geometric_median_has_the_least_sum_of_distances(gradients):
    g = rows(gradients)
    cost = lambda v: np.linalg.norm(g - v, axis=1).sum()
    v = row(geometric_median(gradients, num_steps=300))
    steps = np.random.default_rng(0).normal(size=(50, len(v)))
    assert all(cost(v) <= cost(v + 1e-2 * d / np.linalg.norm(d)) for d in steps)


def test_centered_clip_against_a_loop(gradients):
    g, v = rows(gradients), np.zeros(17)
    for _ in range(3):
        v = v + np.mean([(x - v) * min(1, 2.0 / np.linalg.norm(x - v)) for x in g], axis=0)
    centre = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), gradients)
    np.testing.assert_allclose(row(centered_clip(gradients, centre, radius=2.0)), v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [1e6, -1e6, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("rule", ["median", "trimmed", "krum", "multi_krum", "geometric", "clip"])
def test_a_third_of_malicious_replicas_does_not_move_the_result_far(rule, poison):
    honest = 1.0 + 0.1 * jax.random.normal(jax.random.key(1), (N, 6))
    poisoned = honest.at[jnp.array([0, 4, 8])].set(poison)
    rules = {
        "median": coordinate_median,
        "trimmed": lambda g: trimmed_mean(g, num_trimmed=F),
        "krum": lambda g: multi_krum(g, num_malicious=F, num_keep=1),
        "multi_krum": lambda g: multi_krum(g, num_malicious=F),
        "geometric": geometric_median,
        "clip": lambda g: centered_clip(g, jnp.full(6, 0.9), radius=0.5),
    }
    assert np.abs(rules[rule](poisoned) - 1.0).max() < (0.6 if rule == "clip" else 0.3)


def test_sizes_that_guarantee_nothing_are_refused(gradients):
    with pytest.raises(ValueError, match=r"Krum needs n >= 2 f \+ 3 replicas, got n=9 and f=4"):
        krum_scores(gradients, num_malicious=4)
    with pytest.raises(ValueError, match=r"num_keep must lie in \[1, 9\], got 10"):
        multi_krum(gradients, num_malicious=1, num_keep=10)
    with pytest.raises(ValueError, match=r"num_trimmed must lie in \[0, 4\.5\), got 5"):
        trimmed_mean(gradients, num_trimmed=5)
    with pytest.raises(ValueError, match="the same leading axis of replicas"):
        coordinate_median({"a": jnp.zeros((3, 1)), "b": jnp.zeros((4, 1))})
    for rule in (
        lambda: geometric_median(gradients, num_steps=-1),
        lambda: centered_clip(gradients, {}, radius=1, num_steps=-1),
    ):
        with pytest.raises(ValueError, match="steps must not be negative, got -1"):
            rule()
