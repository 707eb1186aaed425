"""Wiring derived from the network, and costs counted in it, against the paper's tables and counts by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlib_methods import models
from jaxlib_methods.pruning.wiring import network_costs, trace_wiring
from tests.jaxlib_methods.pruning.ranp_networks import Around, Plain, Zoo, abstract, mean_pool

MEBIBYTE = 2**20


@functools.cache
def shapenet():
    return nnx.eval_shape(lambda: models.UNet3D(50, channels=1, width=64, rngs=nnx.Rngs(0)))


class TestCosts:
    @pytest.mark.contract
    def test_3d_unet_of_shapenet(self):
        with_softmax = nnx.Sequential(shapenet(), nnx.softmax)
        for net, megabytes in ((shapenet(), 947.00), (with_softmax, 997.00)):
            total = network_costs(net, abstract((1, 64, 64, 64, 1)))[-1]
            assert round(total.flops / 1e9, 2) == 237.85
            assert round(4 * total.parameters / MEBIBYTE, 2) == 62.26
            assert 4 * total.memory / MEBIBYTE == megabytes

    def test_3d_unet_of_brats(self):
        net = nnx.eval_shape(lambda: models.UNet3D(5, channels=4, width=32, rngs=nnx.Rngs(0)))
        example = abstract((1, 128, 128, 128, 4))
        total = network_costs(net, example)[-1]
        assert round(total.flops / 1e9, 2) == 478.13
        assert round(4 * total.parameters / MEBIBYTE, 2) == 15.57
        assert 4 * total.memory / MEBIBYTE == 3628.00
        layers = trace_wiring(net, example).layers
        assert (len(layers), sum(layer.width for layer in layers)) == (15, 1173)

    def test_every_kind_of_row_by_hand(self):
        net = nnx.Sequential(
            nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(6, rngs=nnx.Rngs(0)),
            nnx.relu,
            lambda x: mean_pool(x, (2, 2)),
            lambda x: x.reshape(1, -1),
            nnx.Linear(24, 5, use_bias=False, rngs=nnx.Rngs(0)),
            nnx.softmax,
        )
        rows = {row.kind: row[2:] for row in network_costs(net, abstract((1, 4, 4, 4)))}
        assert rows == {
            "convolution": (96 * (2 * 9 + 1), 6 * 2 * 9 + 6, 96),
            "norm": (4 * 96, 12, 96),
            "activation": (0, 0, 96),
            "mean pool": (24 * 5, 0, 24),
            "linear": (5 * (2 * 24 - 1), 120, 5),
            "softmax": (0, 0, 5),
            "total": (96 * 19 + 4 * 96 + 120 + 235, 114 + 12 + 120, 3 * 96 + 24 + 10),
        }

    def test_the_rows_of_layers_are_those_of_the_wiring(self):
        net, x = nnx.eval_shape(lambda: Zoo(rngs=nnx.Rngs(0))), abstract((1, 2, 4, 4, 2))
        rows = {row.name: row for row in network_costs(net, x)}
        for layer in trace_wiring(net, x).layers:
            assert (layer.flops, layer.memory) == (rows[layer.name].flops, rows[layer.name].memory)


class TestModels:
    @pytest.mark.parametrize(
        ("build", "shape", "layers", "parameters"),
        [
            (models.video.MobileNetV2For3D, (16, 112, 112, 3), 53, 2_354_048),
            (models.video.I3D, (16, 224, 224, 3), 58, 12_287_264),
        ],
    )
    def test_video_classifiers_as_published(self, build, shape, layers, parameters):
        net = nnx.eval_shape(lambda: build(101, input_shape=shape, rngs=nnx.Rngs(0)))
        wiring = trace_wiring(net, abstract((1, *shape)))
        last = wiring.layers[-1]
        assert len(wiring.layers) == layers and last.width == 101 and last.fixed.all()
        counted = wiring.costs[-1].parameters
        assert counted - 101 * (1 + net_inputs(net, last)) == parameters
        assert wiring.outputs.shape == (1, 101)

    def test_unet_refuses_sides_that_are_no_multiple_of_eight(self):
        with pytest.raises(ValueError, match="multiples of 8"):
            network_costs(shapenet(), abstract((1, 64, 64, 60, 1)))


def net_inputs(net, layer):
    leaf = functools.reduce(lambda node, name: getattr(node, name), layer.kernel.split("/"), net)
    return leaf.shape[-2]


@functools.cache
def zoo():
    return trace_wiring(nnx.eval_shape(lambda: Zoo(rngs=nnx.Rngs(0))), abstract((1, 2, 4, 4, 2)))


class TestTies:
    def test_a_residual_sum_and_a_gate_tie_channel_by_channel(self):
        wiring = zoo()
        stem, project, excite = (wiring.layer(name).channels for name in ("stem", "project", "excite"))
        np.testing.assert_array_equal(stem, project)
        np.testing.assert_array_equal(stem, excite)
        np.testing.assert_array_equal(wiring.axes["stem_bn/mean"][0], stem)

    def test_depthwise_channels_follow_their_input(self):
        wiring = zoo()
        np.testing.assert_array_equal(wiring.layer("depthwise").channels, wiring.layer("expand").channels.repeat(2))
        assert (wiring.axes["depthwise/kernel"][3] == -1).all()

    def test_a_group_is_one_channel(self):
        wiring = zoo()
        side, grouped = wiring.layer("side").channels, wiring.layer("grouped").channels
        assert len(set(side[:4].tolist()) | set(grouped[:2].tolist())) == 1
        assert len(set(side.tolist())) == 2

    def test_concatenation_keeps_the_order(self):
        wiring = zoo()
        expected = np.concatenate([wiring.layer("stem").channels, wiring.layer("grouped").channels])
        np.testing.assert_array_equal(wiring.axes["up/kernel"][3], expected)

    def test_flattening_repeats_the_channels_in_the_order_of_the_axes(self):
        wiring = zoo()
        up = wiring.layer("up").channels
        np.testing.assert_array_equal(wiring.axes["head/kernel"][0], up.repeat(8))
        np.testing.assert_array_equal(wiring.axes["shift"][0], up)
        plain = trace_wiring(nnx.eval_shape(lambda: Plain(rngs=nnx.Rngs(0))), abstract((1, 4, 4, 4, 1)))
        np.testing.assert_array_equal(plain.axes["head/kernel"][0], np.tile(plain.layer("conv2").channels, 8))

    def test_channels_of_input_and_output_stay(self):
        wiring = zoo()
        assert wiring.layer("head").fixed.all()
        assert (wiring.axes["stem/kernel"][3] == -1).all()
        residual = trace_wiring(Around(lambda x: x, rngs=nnx.Rngs(0)), abstract((1, 4, 4, 1)))
        assert not residual.layer("conv1").fixed.any()

        class AddsInput(nnx.Module):
            def __init__(self):
                self.conv1, self.conv2 = (nnx.Conv(3, 3, (1,), rngs=nnx.Rngs(0)) for _ in range(2))

            def __call__(self, x):
                return self.conv2(x + self.conv1(x))

        assert trace_wiring(AddsInput(), abstract((1, 4, 3))).layer("conv1").fixed.all()

    def test_patches_on_the_cpu_do_not_show(self):
        class Net(nnx.Module):
            def __init__(self):
                self.conv = models.convolution.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0))
                self.head = models.convolution.Conv(4, 2, (1, 1), rngs=nnx.Rngs(0))

            def __call__(self, x):
                return self.head(jax.checkpoint(lambda x: nnx.relu(self.conv(x)))(x))

        wiring = trace_wiring(Net(), abstract((1, 4, 4, 1)))
        assert wiring.num_channels == 4
        assert wiring.costs[0].flops == 16 * 4 * 10


class TestRefusals:
    @pytest.mark.parametrize(
        ("between", "norm", "reason"),
        [
            (lambda x: x, nnx.LayerNorm, "norm share: reduce_sum"),
            (nnx.softmax, None, "reduce_max works along"),
            (lambda x: jnp.concatenate([x[..., 2:], x[..., :2]], axis=-1), None, "slice"),
            (lambda x: x.reshape(1, 4, 4, 2, 2).swapaxes(-1, -2).reshape(1, 4, 4, 4), None, "reshape"),
            (lambda x: x * np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4), None, "an array of fixed size"),
            (lambda x: jnp.pad(x[..., :], ((0, 0),) * 3 + ((1, 0),))[..., 1:], None, "pad works along"),
            (lambda x: jax.lax.scan(lambda c, row: (c, row), None, x)[1], None, "scan, for which there is no rule"),
            (lambda x: x @ jnp.swapaxes(x, -1, -2) @ x, None, "product of two arrays of features"),
            (lambda x: jnp.cumsum(x, axis=-1), None, "cumsum works along"),
            (lambda x: jnp.sort(x, axis=-1), None, "sort"),
        ],
    )
    def test_names_the_layer_and_the_operation(self, between, norm, reason):
        net = Around(between, norm=None if norm is None else lambda n, rngs: norm(n, rngs=rngs), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=f"layer 'conv1' cannot lose channels.*{reason}.*`whole`"):
            trace_wiring(net, abstract((1, 4, 4, 1)))
        wiring = trace_wiring(net, abstract((1, 4, 4, 1)), whole=("conv1",))
        assert wiring.num_channels == 0

    def test_a_layer_that_nobody_reads(self):
        class Net(nnx.Module):
            def __init__(self):
                self.used, self.unused = (nnx.Linear(3, 2, rngs=nnx.Rngs(0)) for _ in range(2))

            def __call__(self, x):
                self.unused(x)
                return self.used(x)

        with pytest.raises(ValueError, match="layer 'unused' cannot lose channels: no layer reads them"):
            trace_wiring(Net(), abstract((1, 3)))

    def test_unknown_names_of_layers(self):
        with pytest.raises(ValueError, match=r"\['conv9'\], which are no layers"):
            trace_wiring(nnx.eval_shape(lambda: Plain(rngs=nnx.Rngs(0))), abstract((1, 4, 4, 4, 1)), whole=("conv9",))
