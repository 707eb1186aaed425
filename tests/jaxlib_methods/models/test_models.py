"""Parameter counts against the papers' tables without allocating anything; behaviour on the small models."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlib_methods import models, trees

# Weights and biases without batch norm, as the official code of SNIP counts them: the sparsities refer to these.
GATED = {
    "lenet300": 266_610,
    "lenet5": 431_080,
    "simple_cnn": 62_346,
    "resnet8": 75_050,
    "alexnet_s": 5_070_218,
    "alexnet_b": 8_490_378,
    "vgg_c": 10_526_538,
    "vgg_d": 15_245_130,
    "vgg_like": 14_982_474,
    "lstm_s": 136_586,
    "lstm_b": 535_306,
    "gru_s": 103_690,
    "gru_b": 403_978,
}
# All parameters, as the literature and the common implementations give them.
TOTAL = {
    "wrn_16_8": 10_961_370,
    "wrn_16_10": 17_116_634,
    "wrn_22_8": 17_158_106,
    "resnet8_strided": 75_290,
    "resnet20": 269_722,
    "resnet18": 11_173_962,
    "resnet50": 23_520_842,
    "resnet18_imagenet": 11_689_512,
    "resnet50_imagenet": 25_557_032,
}


def specification(name):
    """(number of classes, input shape) for which the tables count."""
    if name.endswith("imagenet"):
        return 1000, (224, 224, 3)
    return 10, (28, 28, 1) if name.startswith(("lenet", "simple", "lstm", "gru")) else (32, 32, 3)


@functools.cache
def abstract(name):
    classes, shape = specification(name)
    return nnx.eval_shape(lambda: models.create(name, num_classes=classes, input_shape=shape, rngs=nnx.Rngs(0)))


def sizes(model):
    params = nnx.state(model, nnx.Param)
    paths = jax.tree.leaves(trees.path_names(params))
    return {path: math.prod(leaf.shape) for path, leaf in zip(paths, jax.tree.leaves(params), strict=True)}


class TestCounts:
    def test_every_name_has_a_count(self):
        assert {*GATED, *TOTAL} == set(models.NAMES)

    @pytest.mark.contract
    @pytest.mark.parametrize("name", GATED)
    def test_weights_and_biases(self, name):
        assert sum(size for path, size in sizes(abstract(name)).items() if "bn" not in path) == GATED[name]

    @pytest.mark.parametrize("name", TOTAL)
    def test_all_parameters(self, name):
        assert sum(sizes(abstract(name)).values()) == TOTAL[name]

    def test_scale_is_a_batch_norm_parameter_and_only_there(self):
        for name in models.NAMES:
            for path in sizes(abstract(name)):
                assert path.endswith("bias") or ("bn" in path) == path.endswith("scale"), path


class TestForward:
    @pytest.mark.parametrize("name", models.NAMES)
    def test_shape_of_the_logits(self, name):
        classes, shape = specification(name)
        model = abstract(name)
        definition, state = nnx.split(model)
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        logits = jax.eval_shape(lambda state, x: nnx.merge(definition, state)(x), state, images)
        assert (logits.shape, logits.dtype) == ((2, classes), jnp.float32)

    @pytest.mark.parametrize("name", ["lenet300", "lenet5", "simple_cnn", "lstm_s", "gru_s"])
    def test_logits_depend_on_the_input(self, name, key):
        _, shape = specification(name)
        model = models.create(name, num_classes=10, input_shape=shape, rngs=nnx.Rngs(0))
        logits = jax.jit(lambda x: model(x))(jax.random.normal(key, (3, *shape)))
        assert np.isfinite(logits).all()
        assert np.ptp(logits, axis=0).min() > 1e-3

    def test_images_of_other_sizes(self):
        for name, shape in [("lenet300", (8, 8, 1)), ("lenet5", (16, 20, 3)), ("vgg_c", (8, 8, 1)), ("gru_s", (5, 7))]:
            model = lambda: models.create(name, num_classes=3, input_shape=shape, rngs=nnx.Rngs(0))
            logits = nnx.eval_shape(lambda: model()(jnp.zeros((1, *shape))))
            assert logits.shape == (1, 3), name

    @pytest.mark.parametrize("name", ["alexnet_s", "vgg_d"])
    def test_tiny_imagenet_gets_a_longer_first_stride_and_the_same_dense_layer(self, name):
        model = nnx.eval_shape(lambda: models.create(name, num_classes=200, input_shape=(64, 64, 3), rngs=nnx.Rngs(0)))
        assert model.dense[0].kernel.shape == abstract(name).dense[0].kernel.shape

    def test_lenet5_has_no_relu_after_its_convolutions(self, key):
        model = models.LeNet5(10, rngs=nnx.Rngs(0))
        x = jax.random.normal(key, (2, 28, 28, 1))
        out = x
        for conv in (model.conv1, model.conv2):
            out = jax.lax.conv_general_dilated(
                out, conv.kernel[...], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            out = nnx.max_pool(out, (2, 2), strides=(2, 2))
        expected = model.dense2(nnx.relu(model.dense1(out.reshape(2, 800))))
        assert (out < 0).any()
        np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-4)

    def test_resnet8_shortcuts_have_no_parameters(self, key):
        model = models.small_convolutional.ResNet8(10, rngs=nnx.Rngs(0))
        x = jax.random.normal(key, (2, 8, 8, 3))
        conv = lambda layer, x, s=1: (
            jax.lax.conv_general_dilated(
                x, layer.kernel[...], (s, s), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            + layer.bias[None, None, None]
        )
        h = conv(model.conv, x)
        for block, stride in zip(model.block, (1, 2, 2), strict=True):
            active = nnx.relu(h)
            out = conv(block.conv2, nnx.relu(conv(block.conv1, active, stride)))
            if stride == 2:
                b, n, _, c = h.shape
                h = active.reshape(b, n // 2, 2, n // 2, 2, c).mean((2, 4))
                h = jnp.concatenate([h, jnp.zeros((b, n // 2, n // 2, c))], axis=-1)
            h = h + out
        expected = model.dense(nnx.relu(h).mean((1, 2)))
        np.testing.assert_allclose(jax.jit(lambda x: model(x))(x), expected, rtol=1e-4, atol=1e-5)

    def test_a_thin_resnet_is_the_papers_with_shortcuts_without_parameters(self, key):
        model = models.ResNet(10, depth=8, stem="strided", rngs=nnx.Rngs(0))
        model.eval()
        x = jax.random.normal(key, (2, 16, 16, 3))

        def conv_bn(conv, bn, x, stride=1):
            out = jax.lax.conv_general_dilated(
                x, conv.kernel[...], (stride,) * 2, ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return bn(out)

        h = nnx.relu(conv_bn(model.conv, model.bn, x, 2))
        assert h.shape == (2, 8, 8, 16)
        for block, stride in zip(model.block, (1, 2, 2), strict=True):
            out = nnx.relu(conv_bn(block.conv[0], block.bn[0], h, stride))
            out = conv_bn(block.conv[1], block.bn[1], out)
            if stride == 2:
                taken = np.zeros(out.shape, np.float32)
                taken[..., : h.shape[-1]] = np.asarray(h)[:, ::2, ::2]
                h = jnp.asarray(taken)
            h = nnx.relu(h + out)
        assert h.shape == (2, 2, 2, 64)
        expected = model.dense(h.mean((1, 2)))
        np.testing.assert_allclose(jax.jit(lambda x: model(x))(x), expected, rtol=1e-4, atol=1e-5)


class TestInitialisation:
    def test_kernels_have_variance_one_over_fan_in_and_biases_are_zero(self):
        model = models.LeNet300(10, rngs=nnx.Rngs(0))
        for layer in (model.dense1, model.dense2):
            kernel = layer.kernel[...]
            np.testing.assert_allclose(kernel.var() * kernel.shape[0], 1.0, rtol=0.05)
            assert abs(kernel).max() < 2.3 / np.sqrt(kernel.shape[0])  # truncated at two standard deviations
            assert not layer.bias[...].any()
        kernel = models.LeNet5(10, rngs=nnx.Rngs(0)).conv2.kernel[...]
        np.testing.assert_allclose(kernel.var() * 5 * 5 * 20, 1.0, rtol=0.05)

    def test_the_draw_follows_the_key(self):
        draw = lambda seed: models.LeNet300(10, input_shape=(4,), rngs=nnx.Rngs(seed)).dense1.kernel[...]
        np.testing.assert_array_equal(draw(0), draw(0))
        assert (draw(0) != draw(1)).any()


class TestBatchNorm:
    def test_train_and_eval_as_pure_functions(self, key):
        model = models.WideResNet(4, depth=10, width=1, input_shape=(8, 8, 1), rngs=nnx.Rngs(0))
        x = 3.0 + jax.random.normal(key, (4, 8, 8, 1))
        train_def, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        model.eval()
        eval_def = nnx.graphdef(model)
        model.train()

        @jax.jit
        def train(params, stats, x):
            net = nnx.merge(train_def, params, stats)
            return net(x), nnx.state(net, nnx.BatchStat)

        evaluate = jax.jit(lambda params, stats, x: nnx.merge(eval_def, params, stats)(x))
        fresh = evaluate(params, stats, x)
        trained, after = train(params, stats, x)
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(stats), strict=True))
        assert (fresh != trained).any()
        for _ in range(200):
            _, after = train(params, after, x)
        # The running statistics of one batch converge to its own, so the two modes agree in the limit.
        np.testing.assert_allclose(evaluate(params, after, x), trained, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize(
        ("name", "eps"), [("alexnet_s", 1e-3), ("vgg_c", 1e-3), ("wrn_16_8", 1e-5), ("resnet50", 1e-5)]
    )
    def test_epsilon(self, name, eps):
        norms = [node for _, node in nnx.iter_graph(abstract(name)) if isinstance(node, nnx.BatchNorm)]
        assert norms and all(norm.epsilon == eps for norm in norms)


class TestRecurrentLayersEqualFlaxCells:
    """The oracle is flax's cell, run in a Python loop with the same weights."""

    def test_lstm(self, key):
        model = models.recurrent.LSTMClassifier(3, hidden=5, input_shape=(4, 2), rngs=nnx.Rngs(0))
        cell = nnx.OptimizedLSTMCell(5, 5, rngs=nnx.Rngs(1))
        bias = jax.random.normal(key, (20,))
        model.input_gates.bias[...] = cell.dense_h.bias[...] = bias
        cell.dense_i.kernel[...] = model.input_gates.kernel[...]
        cell.dense_h.kernel[...] = model.hidden_gates.kernel[...]
        self.compare(model, cell, (jnp.zeros((6, 5)), jnp.zeros((6, 5))), key)

    def test_gru(self, key):
        model = models.recurrent.GRUClassifier(3, hidden=5, input_shape=(4, 2), rngs=nnx.Rngs(0))
        cell = nnx.GRUCell(5, 5, rngs=nnx.Rngs(1))
        model.input_gates.bias[...] = cell.dense_i.bias[...] = jax.random.normal(key, (15,))
        cell.dense_i.kernel[...] = model.input_gates.kernel[...]
        cell.dense_h.kernel[...] = model.hidden_gates.kernel[...]
        self.compare(model, cell, jnp.zeros((6, 5)), key)

    def compare(self, model, cell, carry, key):
        x = jax.random.normal(key, (6, 4, 2))
        for t in range(4):
            carry, out = cell(carry, model.embed(x[:, t]))
        np.testing.assert_allclose(model(x), model.dense(out), rtol=1e-5, atol=1e-6)


class TestErrors:
    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"unknown model 'lenet'; known are lenet300, lenet5, "):
            models.create("lenet", num_classes=10, input_shape=(28, 28, 1), rngs=nnx.Rngs(0))

    def test_empty_shape(self):
        with pytest.raises(ValueError, match=r"positive, got 10 and \(0, 28, 1\)"):
            models.create("lenet5", num_classes=10, input_shape=(0, 28, 1), rngs=nnx.Rngs(0))

    def test_small_images(self):
        with pytest.raises(ValueError, match=r"at least 16 x 16 for LeNet-5, got \(8, 8, 1\)"):
            models.create("lenet5", num_classes=10, input_shape=(8, 8, 1), rngs=nnx.Rngs(0))

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda rngs: models.VGG(10, variant="e", rngs=rngs), "'c', 'd', 'like', got 'e'"),
            (lambda rngs: models.ResNet(10, depth=34, rngs=rngs), "18, 20, 32, 44, 50, 56, 110, got 34"),
            (lambda rngs: models.ResNet(10, stem="mnist", rngs=rngs), "'cifar', 'strided', 'imagenet', got 'mnist'"),
            (lambda rngs: models.WideResNet(10, depth=17, rngs=rngs), r"6 n \+ 4.*got 17"),
            (
                lambda rngs: models.recurrent.GRUClassifier(10, input_shape=(5,), rngs=rngs),
                r"steps, features.*got \(5,\)",
            ),
        ],
    )
    def test_bad_choices(self, build, message):
        with pytest.raises(ValueError, match=message):
            build(nnx.Rngs(0))
