import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxlib_methods.models.convolution import Conv, convolve


@pytest.mark.contract
@pytest.mark.parametrize(
    ("padding", "strides", "window"),
    [
        ("SAME", (1, 1), (3, 3)),
        ("SAME", (2, 2), (2, 5)),
        ("VALID", (2, 1), (3, 3)),
        ("VALID", (1, 1), (1, 1)),
        (((1, 0), (2, 1)), (1, 2), (3, 2)),
    ],
)
def test_equals_the_convolution_of_xla_with_gradients(x64, key, padding, strides, window):
    x = jax.random.normal(key, (2, 9, 8, 3), jnp.float64)
    kernel = jax.random.normal(jax.random.key(1), (*window, 3, 4), jnp.float64)

    def xla(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    ours, pull_ours = jax.vjp(lambda x, k: convolve(x, k, strides, padding), x, kernel)
    theirs, pull_theirs = jax.vjp(xla, x, kernel)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    g = jnp.cos(ours)
    for a, b in zip(pull_ours(g), pull_theirs(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_equals_the_convolution_of_xla_on_volumes(x64, key):
    x = jax.random.normal(key, (2, 5, 4, 6, 3), jnp.float64)
    for padding, strides, window in [
        ("SAME", (1, 1, 1), (3, 3, 3)),
        (((1, 1), (0, 1), (2, 0)), (2, 1, 2), (2, 1, 3)),
    ]:
        kernel = jax.random.normal(jax.random.key(1), (*window, 3, 4), jnp.float64)
        layout = ("NDHWC", "DHWIO", "NDHWC")
        xla = lambda x, k: lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=layout)
        ours, pull_ours = jax.vjp(lambda x, k: convolve(x, k, strides, padding), x, kernel)
        theirs, pull_theirs = jax.vjp(xla, x, kernel)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
        for a, b in zip(pull_ours(jnp.cos(ours)), pull_theirs(jnp.cos(ours)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_layer_equals_flax(key):
    x = jax.random.normal(key, (2, 8, 8, 4))
    for options in ({}, {"strides": 2}, {"feature_group_count": 2}, {"kernel_dilation": 2}):
        ours = Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
        theirs = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options)
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_accelerators_get_the_convolution_of_xla():
    x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
    for platform, expected in (("tpu", True), ("cuda", True), ("cpu", False)):
        text = jax.export.export(jax.jit(lambda x, k: convolve(x, k, (1, 1), "SAME")), platforms=[platform])(x, kernel)
        assert ("stablehlo.convolution" in text.mlir_module()) is expected
