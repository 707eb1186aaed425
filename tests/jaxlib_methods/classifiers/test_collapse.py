"""Neural-collapse metrics against their definitions on all features at once; streaming, merging, perfect collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlib_methods.classifiers import neural_collapse, simplex_etf
from jaxlib_methods.classifiers.class_statistics import (
    init_class_statistics,
    merge_class_statistics,
    update_class_statistics,
)
from jaxlib_methods.classifiers.collapse import collapse_metrics

K, D, N = 4, 7, 60


def data(seed=0, noise=0.7):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(K), rng.integers(0, K, N - K)]).astype(np.int32)
    means = 2 * rng.standard_normal((K, D)) + 1
    features = means[labels] + noise * rng.standard_normal((N, D))
    return features, labels, rng.standard_normal((D, K)), rng.standard_normal(K)


def definitions(F, y, kernel, b):
    """Every metric from the whole matrix of features, with loops over classes and examples."""
    W = kernel.T
    mu = np.stack([F[y == c].mean(0) for c in range(K)])
    mu_G = F.mean(0)
    H = (mu - mu_G).T
    Sigma_W = np.mean([np.outer(f - mu[c], f - mu[c]) for f, c in zip(F, y, strict=True)], axis=0)
    Sigma_B = np.mean([np.outer(h, h) for h in H.T], axis=0)
    etf = (np.eye(K) - 1 / K) / np.sqrt(K - 1)
    cv = lambda x: np.std(x, ddof=1) / np.mean(x)
    cos = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    off = lambda A: np.linalg.norm(A / np.linalg.norm(A) - etf)
    margins, mismatch = [], []
    for f, c in zip(F, y, strict=True):
        cosines = np.array([cos(f - mu_G, w - W.mean(0)) for w in W])
        margins.append(cosines[c] - np.delete(cosines, c).max())
        mismatch.append(np.argmax(W @ f + b) != np.argmin(np.linalg.norm(f - mu, axis=1)))
    ranks = []
    for c in range(K):
        s = np.linalg.svd(F[y == c], compute_uv=False)
        ranks.append((s.sum() / np.linalg.norm(s)) ** 2)
    return {
        "nc1": np.trace(Sigma_W @ np.linalg.pinv(Sigma_B, rcond=1e-10)) / K,
        "vci": 1 - np.trace(np.linalg.pinv(Sigma_B + Sigma_W) @ Sigma_B) / min(D, K - 1),
        "nc2": off(W @ W.T),
        "equinorm": abs(cv(np.linalg.norm(W, axis=1)) - cv(np.linalg.norm(H, axis=0))),
        "nc3": off(W @ H),
        "nc4_bias": np.linalg.norm(W @ mu_G + b),
        "numerical_rank": np.mean(ranks),
        "cosine_margin": np.mean(margins),
        "nc4_mismatch": 100 * np.mean(mismatch),
    }


def batches(F, y, dtype=np.float32):
    for start in range(0, N, 17):
        yield F[start : start + 17].astype(dtype), y[start : start + 17]


@pytest.mark.contract
@pytest.mark.parametrize("passes", ["kept in memory", "two passes"])
def test_streamed_metrics_equal_their_definitions(passes):
    F, y, kernel, b = data()
    F, kernel, b = (x.astype(np.float32) for x in (F, kernel, b))
    source = batches(F, y) if passes == "kept in memory" else lambda: batches(F, y)
    metrics = neural_collapse(source, jnp.asarray(kernel), jnp.asarray(b), by_class=True)
    for name, expected in definitions(*(x.astype(np.float64) for x in (F,)), y, kernel, b).items():
        np.testing.assert_allclose(metrics[name], expected, rtol=2e-5, atol=1e-6, err_msg=name)
    assert 0 < metrics["nc4_mismatch"] < 100  # the mismatch is really compared


def test_float64_features_are_measured_in_float64(x64):
    F, y, kernel, b = data()
    metrics = neural_collapse(batches(F, y, np.float64), jnp.asarray(kernel), jnp.asarray(b), by_class=True)
    for name, expected in definitions(F, y, kernel, b).items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-10, err_msg=name)


def test_perfect_collapse_gives_zeros_and_margin_k_over_k_minus_1():
    W = simplex_etf(K, D, key=jax.random.key(0))
    shift = jnp.full((1, D), 0.5)
    labels = np.arange(N, dtype=np.int32) % K
    F = np.asarray(3 * W + shift)[labels]
    metrics = neural_collapse(batches(F, labels), W.T, -(W @ shift[0]), by_class=True)
    for name in ("nc1", "vci", "nc2", "nc3", "nc4_bias", "equinorm", "etf_distance_weights", "etf_distance_means"):
        assert abs(metrics[name]) < 2e-6, (name, metrics[name])
    assert metrics["nc4_mismatch"] == 0
    np.testing.assert_allclose(metrics["cosine_margin"], K / (K - 1), rtol=1e-6)
    np.testing.assert_allclose(metrics["numerical_rank"], 1, atol=1e-3)


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_nearly_collapsed_features_far_from_the_origin_lose_no_digits(noise):
    """E[f f^T] - mu mu^T would be round-off alone here: the scatter is 1e-10 of the second moment."""
    F, y, kernel, b = data(noise=noise)
    F = (F + 10).astype(np.float32)
    metrics = neural_collapse(batches(F, y), jnp.asarray(kernel, jnp.float32), jnp.asarray(b, jnp.float32))
    expected = definitions(F.astype(np.float64), y, kernel, b)["nc1"]
    np.testing.assert_allclose(metrics["nc1"], expected, rtol=2e-2)


@pytest.mark.parametrize("by_class", [False, True])
def test_order_and_sharding_of_the_data_do_not_matter(by_class):
    F, y, _, _ = data()
    F, y = jnp.asarray(F[:56], jnp.float32), jnp.asarray(y[:56])
    empty = init_class_statistics(K, D, by_class=by_class)
    whole = update_class_statistics(empty, F, y)
    a, b = update_class_statistics(empty, F[:20], y[:20]), update_class_statistics(empty, F[20:], y[20:])
    close = lambda s: jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-4), whole, s)
    close(merge_class_statistics(a, b))
    close(merge_class_statistics(b, a))
    jax.tree.map(np.testing.assert_array_equal, merge_class_statistics(a, empty), a)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharded(F, y):
        parts = jax.lax.all_gather(update_class_statistics(empty, F, y), "data")
        total, _ = jax.lax.scan(
            lambda s, part: (merge_class_statistics(s, part), None), jax.lax.pcast(empty, "data", to="varying"), parts
        )
        return jax.tree.map(lambda x: x[None], total)

    parts = jax.shard_map(sharded, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(F, y)
    close(jax.tree.map(lambda x: x[3], parts))


def test_padding_with_label_minus_one_is_left_out():
    F, y, _, _ = data()
    F, y = jnp.asarray(F, jnp.float32), jnp.asarray(y)
    empty = init_class_statistics(K, D)
    padded = update_class_statistics(
        empty, jnp.pad(F, ((0, 5), (0, 0)), constant_values=9), jnp.pad(y, (0, 5), constant_values=-1)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded, update_class_statistics(empty, F, y))


def test_fewer_features_than_the_etf_needs_has_no_etf_distance():
    F, y, kernel, b = data()
    statistics = update_class_statistics(
        init_class_statistics(K, 2), jnp.asarray(F[:, :2], jnp.float32), jnp.asarray(y)
    )
    metrics = collapse_metrics(statistics, kernel[:2], b)
    assert "etf_distance_means" not in metrics and np.isfinite(list(metrics.values())).all()


def test_errors_name_the_argument_and_its_value():
    F, y, kernel, b = data()
    kernel = jnp.asarray(kernel, jnp.float32)
    with pytest.raises(ValueError, match=r"none of \[2\]"):
        neural_collapse([(F[y != 2], y[y != 2])], kernel)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), got 4"):
        neural_collapse([(F, y + 1)], kernel)
    with pytest.raises(ValueError, match="features must be finite"):
        neural_collapse([(np.where(np.arange(N)[:, None] == 3, np.nan, F), y)], kernel)
    with pytest.raises(ValueError, match=r"none of \[0, 1, 2, 3\]"):
        neural_collapse([], kernel)
    with pytest.raises(ValueError, match=r"kernel must be \(7, 4\)"):
        collapse_metrics(init_class_statistics(K, D), kernel.T, b)
