"""Removing neurons: the smaller network against the masked one, consistency of masks, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlib_methods import models
from jaxlib_methods.pruning import apply_masks, clean_up_neurons, keep_neurons, remove_neurons, trace_wiring
from jaxlib_methods.pruning.neurons import empty_layers
from jaxlib_methods.pruning.removal import neuron_masks, redraw_weights
from jaxlib_methods.pruning.wiring import network_costs
from tests.jaxlib_methods.pruning.ranp_networks import Plain, Zoo, abstract, filled

BUILDS = {
    "zoo": (lambda: Zoo(rngs=nnx.Rngs(0)), (2, 2, 4, 4, 2)),
    "unet": (lambda: models.UNet3D(2, channels=1, width=2, rngs=nnx.Rngs(0)), (1, 8, 8, 8, 1)),
}


def random_scores(wiring, seed=0):
    rng = np.random.default_rng(seed)
    return {layer.name: rng.uniform(1, 2, layer.width) for layer in wiring.layers}


@functools.cache
def traced(name):
    build, shape = BUILDS[name]
    net = filled(build)
    return net, trace_wiring(net, abstract((1, *shape[1:])))


def both_modes(net, x):
    """Outputs in training mode (batch statistics) and in evaluation mode, compiled once."""
    graph, state = nnx.split(net)

    @jax.jit
    def forward(state, x):
        outputs = []
        for mode in ("train", "eval"):
            model = nnx.merge(graph, state, copy=True)
            getattr(model, mode)()
            outputs.append(model(x))
        return outputs

    return forward(state, x)


@pytest.mark.contract
@pytest.mark.parametrize("name", BUILDS)
def test_the_smaller_network_gives_the_outputs_of_the_masked_one(name):
    net, wiring = traced(name)
    scores = random_scores(wiring)
    kept = clean_up_neurons(keep_neurons(scores, 0.4, scope="per_layer"), wiring, scores)
    small = remove_neurons(net, kept, wiring)
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    masked = nnx.merge(graph, apply_masks(params, neuron_masks(params, kept, wiring)), rest, copy=True)
    x = jax.random.normal(jax.random.key(0), BUILDS[name][1])
    for ours, theirs in zip(both_modes(small, x), both_modes(masked, x), strict=True):
        assert float(jnp.std(theirs)) > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(jnp.abs(theirs).max()))
    counts = [network_costs(model, abstract((1, *x.shape[1:])))[-1] for model in (small, net)]
    assert all(a < b for a, b in zip(counts[0][2:], counts[1][2:], strict=True))


def test_slices_are_copied_in_the_order_of_the_concatenation():
    net, wiring = traced("unet")
    kept = {layer.name: np.ones(layer.width, bool) for layer in wiring.layers}
    kept["encoder/2/1/conv"][[0, 5]] = False  # the skipped eight channels, in front
    kept["encoder/3/1/conv"][3] = False  # of the upsampled sixteen, behind them
    small = remove_neurons(net, kept, wiring)
    expected = np.delete(net.decoder[0][0].conv.kernel[...], [0, 5, 8 + 3], axis=3)
    np.testing.assert_array_equal(small.decoder[0][0].conv.kernel[...], expected)
    np.testing.assert_array_equal(small.encoder[2][1].bn.mean[...], np.delete(net.encoder[2][1].bn.mean[...], [0, 5]))


def test_numbers_that_flax_layers_keep_follow():
    net, wiring = traced("zoo")
    kept = {layer.name: np.ones(layer.width, bool) for layer in wiring.layers}
    for name, removed in {
        "expand": [1, 4, 6],
        "depthwise": [2, 3, 8, 9, 12, 13],
        "side": [0, 1, 2, 3],
        "grouped": [0, 1],
    }.items():
        kept[name][removed] = False
    small = remove_neurons(net, kept, wiring)
    assert (small.depthwise.feature_group_count, small.depthwise.in_features, small.depthwise.out_features) == (
        5,
        5,
        10,
    )
    assert small.depthwise.kernel_shape == small.depthwise.kernel.shape == (3, 3, 3, 1, 10)
    assert (small.grouped.feature_group_count, small.grouped.in_features, small.grouped.out_features) == (1, 4, 2)
    assert (small.depthwise_bn.num_features, small.up.in_features, small.up.out_features) == (10, 8, 5)
    assert net.depthwise.feature_group_count == 8


@pytest.mark.parametrize("build", [models.video.MobileNetV2For3D, models.video.I3D])
def test_video_classifiers_lose_channels(build):
    net = nnx.eval_shape(lambda: build(3, input_shape=(8, 32, 32, 3), width=0.125, rngs=nnx.Rngs(0)))
    example = abstract((1, 8, 32, 32, 3))
    wiring = trace_wiring(net, example)
    scores = random_scores(wiring)
    kept = clean_up_neurons(keep_neurons(scores, 0.3, scope="per_layer"), wiring, scores)
    full, small = (network_costs(model, example)[-1] for model in (net, remove_neurons(net, kept, wiring)))
    assert small.flops < 0.8 * full.flops and small.parameters < 0.7 * full.parameters and small.memory < full.memory


class TestCleanUp:
    def wanted(self, **counts):
        """Masks of the residual block of the zoo: stem, project and excite are tied."""
        _, wiring = traced("zoo")
        kept = {layer.name: np.ones(layer.width, bool) for layer in wiring.layers}
        for name, indices in counts.items():
            kept[name][:] = False
            kept[name][list(indices)] = True
        return kept, wiring

    @pytest.mark.parametrize(("ties", "expected"), [("max", [0, 1, 5]), ("min", [5]), ("union", [0, 1, 2, 5])])
    def test_tied_layers(self, ties, expected):
        kept, wiring = self.wanted(stem=[0, 1], project=[1, 2, 5], excite=[5])
        scores = {layer.name: np.zeros(layer.width) for layer in wiring.layers}
        scores["stem"][:] = [0.5, 0.4, 0, 0, 0.9, 0]
        scores["project"][:] = [0, 0.1, 0.3, 0, 0, 0.2]
        scores["excite"][:] = [0, 0, 0, 0, 0, 0.6]
        cleaned = clean_up_neurons(kept, wiring, scores, ties=ties)
        for name in ("stem", "project", "excite"):
            assert np.flatnonzero(cleaned[name]).tolist() == expected

    def test_depthwise_and_grouped_layers_follow_their_input(self):
        kept, wiring = self.wanted(expand=[0, 3], depthwise=range(16), side=[5], grouped=[0, 1, 2, 3])
        cleaned = clean_up_neurons(kept, wiring, random_scores(wiring))
        assert np.flatnonzero(cleaned["depthwise"]).tolist() == [0, 1, 6, 7]
        assert np.flatnonzero(cleaned["side"]).tolist() == [4, 5, 6, 7]
        assert np.flatnonzero(cleaned["grouped"]).tolist() == [2, 3]

    @pytest.mark.parametrize("ties", ["max", "min", "union"])
    @pytest.mark.parametrize("multiple", [1, 4])
    def test_is_idempotent_and_keeps_the_last_layer(self, ties, multiple):
        for name in BUILDS:
            _, wiring = traced(name)
            for seed in range(5):
                scores = random_scores(wiring, seed)
                once = clean_up_neurons(keep_neurons(scores, 0.5), wiring, scores, ties=ties, multiple=multiple)
                twice = clean_up_neurons(once, wiring, scores, ties=ties, multiple=multiple)
                assert all((once[layer] == twice[layer]).all() for layer in once)
                assert once["head"].all()

    def test_widths_are_rounded_up_as_far_as_neurons_last(self):
        _, wiring = traced("unet")
        scores = random_scores(wiring)
        kept = keep_neurons(scores, 0.6, scope="per_layer")
        rounded = clean_up_neurons(kept, wiring, scores, multiple=4)
        for layer in wiring.layers[:-1]:
            before, after = kept[layer.name].sum(), rounded[layer.name].sum()
            assert after == min(-(-before // 4) * 4, layer.width)
            assert (rounded[layer.name] >= kept[layer.name]).all()

    def test_bad_arguments(self):
        kept, wiring = self.wanted()
        scores = random_scores(wiring)
        with pytest.raises(ValueError, match="ties must be one of 'max'"):
            clean_up_neurons(kept, wiring, scores, ties="mean")
        with pytest.raises(ValueError, match="multiple must be at least 1"):
            clean_up_neurons(kept, wiring, scores, multiple=0)
        with pytest.raises(ValueError, match="scores has the layers and widths"):
            clean_up_neurons(kept, wiring, scores | {"stem": np.ones(5)})


class TestRefusals:
    def test_an_empty_layer(self):
        net, wiring = traced("unet")
        kept = {layer.name: np.ones(layer.width, bool) for layer in wiring.layers}
        kept["encoder/1/0/conv"][:] = False
        assert empty_layers(kept) == ["encoder/1/0/conv"]
        with pytest.raises(ValueError, match="nothing is left of layer 'encoder/1/0/conv'"):
            remove_neurons(net, kept, wiring)

    def test_masks_that_disagree(self):
        net, wiring = traced("zoo")
        kept = {layer.name: np.ones(layer.width, bool) for layer in wiring.layers}
        kept["project"][0] = False
        with pytest.raises(ValueError, match="disagrees about a channel of layer 'stem'"):
            remove_neurons(net, kept, wiring)
        kept["project"][0], kept["head"][0] = True, False
        with pytest.raises(ValueError, match="for layer 'head', and True where it is fixed"):
            remove_neurons(net, kept, wiring)

    def test_code_that_needs_the_old_width(self):
        class Own(nnx.Module):
            def __init__(self, rngs):
                self.kernel, self.width = nnx.Param(jnp.ones((3, 4))), 4

            def __call__(self, x):
                return (x @ self.kernel[...]).reshape(-1, self.width)

        net = nnx.Sequential(Own(nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        wiring = trace_wiring(net, abstract((1, 3)))
        kept = {"layers/0": np.array([True, True, False, True]), "layers/1": np.ones(2, bool)}
        with pytest.raises(ValueError, match=r"needs an old width; look at the sizes kept by \['layers/0'\]"):
            remove_neurons(net, kept, wiring)


def test_weights_are_drawn_anew_as_in_the_paper():
    net = nnx.eval_shape(lambda: Plain((40, 50), norm=True, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(net)
    drawn = redraw_weights(
        nnx.merge(graph, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7, leaf.dtype), state)), key=jax.random.key(0)
    )
    xavier = np.sqrt(2 / (27 * (40 + 50)))
    np.testing.assert_allclose(np.std(drawn.conv2.kernel[...]), xavier, rtol=0.02)
    assert np.abs(drawn.conv2.kernel[...]).max() > 3.5 * xavier  # normal, not truncated
    np.testing.assert_allclose(np.std(drawn.conv2.bias[...]), 1, rtol=0.3)
    np.testing.assert_allclose(drawn.bn.scale[...], 1, atol=0.1)
    assert np.std(drawn.bn.scale[...]) > 0.01
    for leaf, value in ((drawn.bn.bias, 0), (drawn.bn.mean, 0), (drawn.bn.var, 1)):
        assert (np.asarray(leaf[...]) == value).all()
