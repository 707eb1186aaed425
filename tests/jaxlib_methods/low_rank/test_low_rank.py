"""Low-rank compression: optimality against random competitors, the SVD-LLM identity, a model layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlib_methods import trees
from jaxlib_methods.low_rank import (
    asvd,
    collect_inputs,
    compress_kernels,
    effective_rank,
    factorize_kernels,
    linear_inputs,
    sensitivity_search,
    stable_rank,
    svd_llm,
    truncated_svd,
)
from jaxlib_methods.low_rank.decompositions import rank_for_keep, whitening_factor


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def layer(tokens=200, fan_in=14, fan_out=10):
    """A kernel, and inputs with correlated channels of very different size."""
    mix = gaussian(fan_in, fan_in, seed=2) * 10.0 ** np.linspace(-2, 1, fan_in)
    return gaussian(fan_in, fan_out, seed=1), gaussian(tokens, fan_in, seed=3) @ mix


def loss(W, factors, X):
    return np.linalg.norm(X @ W - X @ np.asarray(factors.A) @ np.asarray(factors.B)) ** 2


@pytest.mark.contract
@pytest.mark.parametrize("k", [1, 4, 9])
def test_svd_llm_loses_exactly_the_discarded_singular_values(k, x64):
    W, X = layer()
    S = whitening_factor(X.T @ X)
    np.testing.assert_allclose(S @ S.T, X.T @ X, rtol=1e-10)
    discarded = np.linalg.svd(S.T @ W, compute_uv=False)[k:]
    factors = svd_llm(W, X.T @ X, k)
    assert factors.A.shape == (14, k) and factors.B.shape == (k, 10)
    np.testing.assert_allclose(loss(W, factors, X), np.sum(discarded**2), rtol=1e-8)


def test_svd_llm_is_the_best_rank_k_kernel_for_the_outputs(x64):
    """Alternating least squares from random starts, and the other methods, never do better."""
    W, X = layer()
    best = loss(W, svd_llm(W, X.T @ X, 3), X)
    assert best < 0.9 * loss(W, asvd(W, np.abs(X).mean(0), 3), X) < loss(W, truncated_svd(W, 3), X)
    for seed in range(5):
        B = gaussian(3, 10, seed=seed)
        for _ in range(300):
            A = np.linalg.lstsq(X, X @ W @ np.linalg.pinv(B), rcond=None)[0]
            B = np.linalg.lstsq(X @ A, X @ W, rcond=None)[0]
        reached = np.linalg.norm(X @ (W - A @ B)) ** 2
        assert best * (1 - 1e-9) <= reached < best * 1.01


def test_white_inputs_and_alpha_zero_give_the_plain_svd(x64):
    W, _ = layer()
    plain = truncated_svd(W, 4)
    np.testing.assert_allclose(svd_llm(W, 7.0 * np.eye(14), 4).kernel, plain.kernel, atol=1e-10)
    np.testing.assert_allclose(asvd(W, np.arange(14.0), 4, exponent=0.0).kernel, plain.kernel, atol=1e-10)
    np.testing.assert_allclose(plain.kernel, np.asarray(plain.A) @ np.asarray(plain.B), atol=1e-12)
    discarded = np.linalg.svd(W, compute_uv=False)[4:]
    np.testing.assert_allclose(np.linalg.norm(W - plain.kernel) ** 2, np.sum(discarded**2), rtol=1e-10)


def test_asvd_is_the_svd_of_the_scaled_kernel(x64):
    W, X = layer()
    s = np.diag(np.abs(X).mean(0) ** 0.5)
    U, sigma, Vt = np.linalg.svd(s @ W)
    np.testing.assert_allclose(
        asvd(W, np.abs(X).mean(0), 4).kernel, np.linalg.inv(s) @ (U[:, :4] * sigma[:4]) @ Vt[:4], atol=1e-10
    )


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_degenerate_inputs_are_shifted_and_lose_nothing_that_they_see(scale, x64):
    """Fewer tokens than channels, dead channels: X^T X is singular, and S^-T must not blow up what X never shows."""
    W, X = layer(tokens=6)
    X = scale * X
    X[:, 3] = 0
    factors = svd_llm(W, X.T @ X, 6)
    assert np.isfinite(factors.kernel).all() and np.abs(factors.kernel).max() < 10 * np.abs(W).max()
    assert loss(W, factors, X) < 1e-4 * np.linalg.norm(X @ W) ** 2
    assert np.isfinite(svd_llm(W, np.zeros((14, 14)), 6).kernel).all()
    assert np.isfinite(asvd(W, np.zeros(14), 6).kernel).all() and np.isfinite(asvd(W, np.eye(14)[0], 6).kernel).all()


def test_ranks_of_a_share_of_the_parameters():
    assert rank_for_keep(768, 3072, 0.8) == 491 and rank_for_keep(768, 768, 0.5) == 192
    assert rank_for_keep(2, 2, 0.1) == 1 and rank_for_keep(768, 3072, 1.0) == 614
    for m, n, keep in [(768, 3072, 0.8), (30, 20, 0.4), (64, 64, 0.6)]:
        k = rank_for_keep(m, n, keep)
        assert k * (m + n) <= keep * m * n < (k + 1) * (m + n)


def test_half_precision_kernels_keep_their_type():
    W, X = layer()
    factors = svd_llm(jnp.asarray(W, jnp.bfloat16), X.T @ X, 8)
    assert factors.A.dtype == factors.B.dtype == factors.kernel.dtype == jnp.bfloat16


def test_stable_and_effective_rank(x64):
    s = np.array([4.0, 2.0, 1.0, 1.0])
    U, V = (np.linalg.qr(gaussian(n, 4, seed=n))[0] for n in (9, 6))
    W = jnp.asarray((U * s) @ V.T)
    p = s / s.sum()
    batch = jnp.stack([W, 1e-30 * W, jnp.zeros_like(W)])
    np.testing.assert_allclose(stable_rank(batch), [22 / 16, 22 / 16, 0], rtol=1e-9)
    np.testing.assert_allclose(effective_rank(batch), [np.exp(-np.sum(p * np.log(p)))] * 2 + [0], rtol=1e-9)
    np.testing.assert_allclose([stable_rank(jnp.eye(5)), effective_rank(jnp.eye(5))], 5)


# ------------------------------------------------------------------------------------------------ a whole network


class Net(nnx.Module):
    """Paths with a list in them, a layer that is called twice and one that is never called."""

    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.shared = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
        self.unused = nnx.Linear(6, 3, rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.tanh(self.shared(block(x)))
        return self.head(x)


@pytest.fixture
def net():
    return Net(nnx.Rngs(0))


def test_linear_inputs_are_what_each_layer_is_given(net):
    x = jnp.asarray(gaussian(4, 3, 6), jnp.float32)
    inputs = linear_inputs(net, x)
    assert inputs.keys() == {"blocks/0/kernel", "blocks/1/kernel", "shared/kernel", "head/kernel"}
    assert inputs.keys() < set(jax.tree.leaves(trees.path_names(nnx.state(net))))
    flat = x.reshape(12, 6)
    first = net.blocks[0](flat)
    hidden = nnx.tanh(net.shared(first))
    np.testing.assert_allclose(inputs["blocks/0/kernel"], flat, rtol=1e-6)
    np.testing.assert_allclose(inputs["blocks/1/kernel"], hidden, rtol=1e-5)
    np.testing.assert_allclose(inputs["shared/kernel"], jnp.concatenate([first, net.blocks[1](hidden)]), rtol=1e-5)
    assert type(net.head) is nnx.Linear and not hasattr(net.head, "seen")


def test_statistics_are_summed_in_float64_over_batches(net):
    batches = [jnp.asarray(gaussian(4, 3, 6, seed=seed), jnp.float32) for seed in range(3)]
    statistics = collect_inputs(lambda x: linear_inputs(net, x), batches)
    X = np.concatenate([np.asarray(linear_inputs(net, x)["head/kernel"], np.float64) for x in batches])
    head = statistics["head/kernel"]
    assert head.gram.dtype == head.mean_abs.dtype == np.float64 and head.tokens == 36
    assert statistics["shared/kernel"].tokens == 72
    np.testing.assert_allclose(head.gram, X.T @ X, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(head.mean_abs, np.abs(X).mean(0), rtol=1e-5)
    # 1e8 + 1 is 1e8 in float32
    big = collect_inputs(lambda x: {"k": x}, [jnp.array([[1e4]]), *[jnp.array([[1.0]])] * 10])
    assert big["k"].gram.item() == 1e8 + 10
    with pytest.raises(ValueError, match="at least one calibration batch"):
        collect_inputs(lambda x: {"k": x}, [])


@pytest.mark.parametrize("method", ["svd", "asvd", "svd_llm"])
def test_compressed_parameters_run_in_the_same_network(net, method):
    x = jnp.asarray(gaussian(16, 6), jnp.float32)
    statistics = collect_inputs(lambda x: linear_inputs(net, x), [x])
    graph, params = nnx.split(net)
    arguments = dict(method=method, statistics=statistics)
    worse = []
    for removal in (0.2, 0.4, 0.6):
        small = compress_kernels(params, "blocks|shared", removal=removal, **arguments)
        assert jax.tree.structure(small) == jax.tree.structure(params)
        for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(small), strict=True):
            assert before.shape == after.shape and before.dtype == after.dtype
        rank = rank_for_keep(6, 6, 1 - removal)
        assert int(jnp.linalg.matrix_rank(small["blocks"][0]["kernel"][...], rtol=1e-4)) == rank
        np.testing.assert_array_equal(small["head"]["kernel"][...], params["head"]["kernel"][...])
        np.testing.assert_array_equal(small["blocks"][1]["bias"][...], params["blocks"][1]["bias"][...])
        worse.append(float(jnp.linalg.norm(nnx.merge(graph, small)(x) - net(x))))
    assert 0 < worse[0] <= worse[1] <= worse[2]
    factors = factorize_kernels(params, "blocks/0", removal={"blocks/0/kernel": 0.6}, **arguments)
    assert factors.keys() == {"blocks/0/kernel"} and factors["blocks/0/kernel"].A.shape == (6, 1)


def test_a_search_removes_where_the_loss_allows_it():
    """One kernel has rank 2, one is orthogonal and twice as large: brute force over all assignments agrees."""
    params = {"low": gaussian(8, 2) @ gaussian(2, 8, seed=1), "full": np.linalg.qr(gaussian(8, 16).T)[0].T}
    params = jax.tree.map(lambda W: jnp.asarray(W, jnp.float32), params)
    x = gaussian(64, 8, seed=2)
    loss = lambda new: np.mean((x @ np.asarray(new["low"] @ new["full"] - params["low"] @ params["full"])) ** 2)
    shares, sizes = (0.2, 0.4, 0.5), {"low": 64, "full": 128}
    for removal in (0.1, 0.2, 0.4):
        found = sensitivity_search(loss, params, ".", removal=removal, shares=shares, method="svd")
        alone = lambda path, share: loss(
            params | compress_kernels({path: params[path]}, path, removal=share, method="svd")
        )
        worst = lambda taken: max((alone(path, share) for path, share in taken.items() if share), default=0.0)
        removed = lambda taken: sum(share * sizes[path] for path, share in taken.items()) / 192
        assert removed(found) >= removal
        for low in (0.0, *shares):
            for full in (0.0, *shares):
                other = {"low": low, "full": full}
                assert removed(other) < removal or worst(found) <= worst(other) + 1e-9
        small = compress_kernels(params, ".", removal=found, method="svd")
        untouched = [path for path, share in found.items() if share == 0]
        assert all((small[path] == params[path]).all() for path in untouched)
    assert untouched == [] and found["low"] == 0.5
    with pytest.raises(ValueError, match="is more than the largest"):
        sensitivity_search(loss, params, ".", removal=0.9, shares=shares, method="svd")
    with pytest.raises(ValueError, match="increasing"):
        sensitivity_search(loss, params, ".", removal=0.1, shares=(0.5, 0.2), method="svd")


def test_requests_that_cannot_be_met_are_refused(net):
    params = nnx.state(net)
    with pytest.raises(ValueError, match="method must be one of"):
        compress_kernels(params, "blocks", removal=0.2, method="dobi")
    with pytest.raises(ValueError, match=r"removal must be in \[0, 1\).*got 1.0 for 'blocks/0/kernel'"):
        compress_kernels(params, "blocks", removal=1.0, method="svd")
    with pytest.raises(ValueError, match="got None for 'blocks/0/kernel'"):
        compress_kernels(params, "blocks", removal={"head/kernel": 0.1}, method="svd")
    with pytest.raises(ValueError, match="needs the inputs of 'blocks/0/kernel' and 1 more"):
        compress_kernels(params, "blocks", removal=0.2)
    with pytest.raises(ValueError, match="'decoder' matches no leaf"):
        compress_kernels(params, "decoder", removal=0.2)
    with pytest.raises(ValueError, match="no leaf with two axes"):
        compress_kernels(params, "bias", removal=0.2)
    with pytest.raises(ValueError, match=r"gram must have the shape \(4, 4\)"):
        svd_llm(np.ones((4, 3)), np.eye(3), 1)
    with pytest.raises(ValueError, match="rank must be between 1 and"):
        truncated_svd(np.ones((4, 3)), 4)
    with pytest.raises(ValueError, match="mean_abs must be 4 means"):
        asvd(np.ones((4, 3)), -np.ones(4), 1)
    with pytest.raises(ValueError, match="finite square matrix"):
        whitening_factor(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="keep must lie in"):
        rank_for_keep(4, 4, 0.0)
    with pytest.raises(ValueError, match="W must be a real matrix"):
        stable_rank(jnp.ones(3))
