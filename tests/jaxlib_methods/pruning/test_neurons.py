"""RANP's mathematics on scores of neurons, against loops, derivatives by one gate, and the worked example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st

from jaxlib_methods.pruning import clean_up_neurons, keep_neurons, neuron_importance, trace_wiring
from jaxlib_methods.pruning.neuron_scores import balance_layers, resource_weights, reweight_layers
from jaxlib_methods.pruning.neurons import empty_layers, max_sparsity
from tests.jaxlib_methods.pruning.ranp_networks import Plain, abstract, filled

positive = st.floats(1e-3, 1e3)
layers = st.lists(st.lists(positive, min_size=1, max_size=6), min_size=1, max_size=5).map(
    lambda rows: {str(i): row for i, row in enumerate(rows)}
)


class TestBalance:
    @pytest.mark.contract
    @given(layers)
    @settings(max_examples=50, deadline=None)
    def test_every_layer_gets_the_largest_mean(self, scores):
        largest = max(np.mean(s) for s in scores.values())
        balanced = balance_layers(scores)
        for name, s in balanced.items():
            np.testing.assert_allclose(np.mean(s), largest, rtol=1e-6)
            np.testing.assert_allclose(s / s.sum(), np.array(scores[name]) / np.sum(scores[name]), rtol=1e-9)

    @given(layers, st.floats(1e-6, 1e6), st.floats(0, 0.9))
    @settings(max_examples=50, deadline=None)
    def test_the_scale_of_a_layer_does_not_matter(self, scores, scale, sparsity):
        # A power of two is exact: masks must be equal, not nearly so.
        scaled = scores | {"0": (np.array(scores["0"]) * 2.0 ** round(np.log2(scale))).tolist()}
        resources = {name: float(len(s)) for name, s in scores.items()}
        largest = lambda s: max(np.mean(row) for row in s.values())
        before, after = (reweight_layers(balance_layers(s), resources, 11.0) for s in (scores, scaled))
        for name in scores:  # the common factor max_k cancels in the ranking
            np.testing.assert_allclose(after[name] * largest(scores) / largest(scaled), before[name], rtol=1e-12)
        margin = lambda s: np.sort(np.concatenate(list(s.values())))
        if np.diff(margin(before)).min(initial=np.inf) > 1e-9 * margin(before).max():
            for name, mask in keep_neurons(before, sparsity).items():
                np.testing.assert_array_equal(mask, keep_neurons(after, sparsity)[name])

    def test_a_layer_without_gradients_is_named(self):
        with pytest.raises(ValueError, match="layer 'b' has the mean score 0"):
            balance_layers({"a": [1.0], "b": [0.0, 0.0]})


class TestResources:
    @given(st.lists(st.floats(0, 1e12), min_size=1, max_size=8).filter(lambda tau: max(tau) > 1e-3))
    @settings(max_examples=50, deadline=None)
    def test_weights(self, tau):
        r = np.array(list(resource_weights({str(i): t for i, t in enumerate(tau)}).values()))
        np.testing.assert_allclose(r.sum(), 1, rtol=1e-12)
        assert r[np.argmin(tau)] == r.max()
        assert r.max() / r.min() <= np.e * (1 + 1e-12)
        if min(tau) == 0:
            np.testing.assert_allclose(r.max() / r.min(), np.e, rtol=1e-12)

    def test_equal_resources_and_strength_zero_change_no_ranking(self):
        balanced = balance_layers({"a": [1.0, 3.0, 2.5], "b": [10.0, 33.0]})
        assert set(resource_weights({"a": 5.0, "b": 5.0}).values()) == {0.5}
        for strength in (0.0, 11.0, 80.0):
            equal = reweight_layers(balanced, {"a": 5.0, "b": 5.0}, strength)
            for name, mask in keep_neurons(balanced, 0.4).items():
                np.testing.assert_array_equal(mask, keep_neurons(equal, 0.4)[name])
        for name, s in reweight_layers(balanced, {"a": 1.0, "b": 9.0}, 0.0).items():
            np.testing.assert_array_equal(s, balanced[name])

    def test_worked_example(self):
        scores, tau = {"1": [1.0, 3.0], "2": [10.0, 30.0]}, {"1": 1, "2": 4}
        vanilla = keep_neurons(scores, 0.5)
        assert [mask.tolist() for mask in vanilla.values()] == [[False, False], [True, True]]
        r = resource_weights(tau)
        np.testing.assert_allclose([1 + 11 * r["1"], 1 + 11 * r["2"]], [8.471, 4.529], atol=5e-4)
        weighted = reweight_layers(balance_layers(scores), tau, 11.0)
        np.testing.assert_allclose([*weighted["1"], *weighted["2"]], [84.7, 254.1, 45.3, 135.9], atol=0.05)
        kept = keep_neurons(weighted, 0.5)
        assert [mask.tolist() for mask in kept.values()] == [[False, True], [False, True]]

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="resources must be non-negative"):
            resource_weights({"a": -1.0})
        with pytest.raises(ValueError, match="strength must not be negative"):
            reweight_layers({"a": [1.0]}, {"a": 1.0}, -1.0)
        with pytest.raises(ValueError, match=r"different layers: \['b'\]"):
            reweight_layers({"a": [1.0]}, {"a": 1.0, "b": 1.0}, 1.0)


class TestSelection:
    @given(layers, st.floats(0, 1))
    @settings(max_examples=50, deadline=None)
    def test_counts(self, scores, sparsity):
        flat = np.concatenate(list(scores.values()))
        n = int(len(flat) * (1 - sparsity))
        kept = np.concatenate(list(keep_neurons(scores, sparsity).values()))
        threshold = np.sort(flat)[::-1][n - 1] if n else np.inf
        assert kept.sum() == (flat > threshold).sum() + (flat == threshold).sum() >= n
        assert flat[kept].min(initial=np.inf) >= flat[~kept].max(initial=0)
        for name, mask in keep_neurons(scores, sparsity, scope="per_layer").items():
            assert mask.sum() == int(np.ceil(round(len(scores[name]) * (1 - sparsity), 9)))

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], got 1.5"):
            keep_neurons({"a": [1.0]}, 1.5)
        with pytest.raises(ValueError, match="scope must be one of 'global'"):
            keep_neurons({"a": [1.0]}, 0.5, scope="layer")
        with pytest.raises(ValueError, match="layer 'a' has scores that are not finite"):
            keep_neurons({"a": [np.nan]}, 0.5)

    def test_bisection_is_monotone(self):
        wiring = trace_wiring(nnx.eval_shape(lambda: Plain((9, 7), rngs=nnx.Rngs(0))), abstract((1, 4, 4, 4, 1)))
        for seed in range(5):
            rng = np.random.default_rng(seed)
            scores = {layer.name: rng.gamma(1.0, size=layer.width) for layer in wiring.layers}
            clean = lambda s: clean_up_neurons(keep_neurons(scores, s), wiring, scores)
            feasible = lambda s: not empty_layers(clean(s))
            best = max_sparsity(feasible)
            assert feasible(best) and not feasible(best + 1e-4)
            assert all(feasible(s) for s in np.linspace(0, best, 50))
            assert 0.3 < best < 1
        with pytest.raises(ValueError, match="sparsity 0 is not feasible"):
            max_sparsity(lambda s: False)
        with pytest.raises(ValueError, match="tolerance must be positive"):
            max_sparsity(lambda s: True, tolerance=0.0)


# ---------------------------------------------------------------------------------------------------------- importance


def problem(*, norm=False, samples=4):
    """A network (in float64 where that is on), its loss, its samples and its wiring."""
    net = filled(lambda: Plain((3, 2), norm=norm, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    dtype = jnp.float64 if jax.config.jax_enable_x64 and not norm else jnp.float32
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    rng = np.random.default_rng(1)
    batch = tuple(jnp.asarray(rng.standard_normal((samples, *shape)), dtype) for shape in ((4, 4, 4, 1), (2,)))

    def loss_fn(params, batch):
        model = nnx.merge(graph, params, rest, copy=True)
        return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    return loss_fn, params, batch, trace_wiring(net, abstract((1, 4, 4, 4, 1)))


@functools.cache
def gates():
    """Every option's scores, and each sample's gate gradients, in float64."""
    with jax.enable_x64(True):
        loss_fn, params, batch, wiring = problem()
        options = [(g, r) for g in ("mpmg", "mnmg") for r in ("sum", "mean", "max")]

        @jax.jit
        def all_of_them(params, batch):
            return [neuron_importance(loss_fn, params, batch, wiring, gradients=g, reduction=r) for g, r in options]

        found = dict(zip(options, jax.device_get(all_of_them(params, batch)), strict=True))
        one = jax.jit(lambda params, sample: jax.tree.map(jnp.multiply, params, jax.grad(loss_fn)(params, sample)))
        each = [one(params, jax.tree.map(lambda x: x[t : t + 1], batch)) for t in range(4)]
        return found, jax.device_get(each)


class TestImportance:
    @pytest.mark.parametrize("gradients", ["mpmg", "mnmg"])
    @pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
    def test_against_a_loop(self, gradients, reduce):
        found, each = gates()
        size = np.abs if gradients == "mpmg" else lambda g: g
        for name in ("conv1", "conv2", "head"):
            kernels = np.mean([size(np.asarray(g[name]["kernel"][...])) for g in each], axis=0)
            biases = np.mean([size(np.asarray(g[name]["bias"][...])) for g in each], axis=0)
            for u, score in enumerate(found[gradients, reduce][name]):
                A = kernels[..., u].ravel()
                expected = {
                    "sum": A.sum() + biases[u],
                    "mean": (A.sum() + biases[u]) / (len(A) + 1),
                    "max": A.max(),
                }[reduce]
                np.testing.assert_allclose(score, abs(expected), rtol=1e-9)

    def test_size_is_at_least_the_signed_sum(self):
        found, _ = gates()
        for name, signed in found["mnmg", "sum"].items():
            assert (found["mpmg", "sum"][name] >= signed - 1e-12).all()

    def test_the_signed_sum_is_the_derivative_by_one_gate(self, x64):
        found, _ = gates()
        loss_fn, params, batch, _ = problem()

        @jax.jit
        def gated(c):  # one gate on everything that makes a neuron of conv1
            kernel, bias = params["conv1"]["kernel"][...], params["conv1"]["bias"][...]
            changed = jax.tree.map(lambda leaf: leaf, params)
            changed["conv1"]["kernel"], changed["conv1"]["bias"] = (
                nnx.Param(kernel * c[None, None, None, None, :]),
                nnx.Param(bias * c),
            )
            return loss_fn(changed, batch)

        for u in range(3):
            step = 1e-5 * np.eye(3)[u]
            derivative = (gated(1 + step) - gated(1 - step)) / 2e-5
            np.testing.assert_allclose(found["mnmg", "sum"]["conv1"][u], abs(derivative), rtol=1e-6, atol=1e-9)

    def test_batch_norm_makes_the_signed_sum_vanish(self):
        loss_fn, params, batch, wiring = problem(norm=True, samples=2)
        score = lambda g: neuron_importance(loss_fn, params, batch, wiring, gradients=g)["conv1"]
        signed, size = jax.jit(lambda: (score("mnmg"), score("mpmg")))()
        assert (signed < 1e-4 * size).all() and (size > 1e-3).all()

    def test_devices_share_the_samples(self):
        net = filled(lambda: nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0))))
        graph, params = nnx.split(net)
        wiring = trace_wiring(net, abstract((1, 3)))
        x = jax.random.normal(jax.random.key(0), (8, 3))
        score = lambda p, x, axis=None: neuron_importance(
            lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2), p, x, wiring, axis_name=axis
        )
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        P = jax.sharding.PartitionSpec
        shared = jax.shard_map(lambda p, x: score(p, x, "data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        for name, s in jax.jit(shared)(params, x).items():
            np.testing.assert_allclose(s, score(params, x)[name], rtol=1e-5)

    def test_bad_arguments(self):
        loss_fn, params, batch, wiring = problem()
        for options, message in [
            ({"gradients": "snip"}, "gradients must be one of 'mpmg'"),
            ({"reduction": "min"}, "reduction must be one of 'sum'"),
            ({"num_samples": 3}, "num_samples must divide the batch, got 3"),
        ]:
            with pytest.raises(ValueError, match=message):
                neuron_importance(loss_fn, params, batch, wiring, **options)
        with pytest.raises(ValueError, match=r"params lacks \['conv1/kernel'"):
            neuron_importance(loss_fn, {"head": 1.0}, batch, wiring)
