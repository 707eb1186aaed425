"""Named workloads of the product: dense layers and convolutions (as matrices) of the networks that are quantized."""

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels._arg_spec import ArgSpec
from jaxlib_methods.kernels.packed_matmul.layout import bits_for, rows_for

BINARY, TERNARY = (-1, 1), (-1, 0, 1)


def _product(name: str, m: int, depth: int, n: int, labels: tuple[int, ...], source: str, *tags: str) -> ArgSpec:
    """x [m, depth] @ W [depth, n]."""
    x = jax.ShapeDtypeStruct((m, depth), jnp.float32)
    words = jax.ShapeDtypeStruct((rows_for(depth, bits_for(len(labels))), n), jnp.uint32)
    return ArgSpec(name, {"x": x, "words": words, "labels": labels}, source, tags)


ARG_SPECS = (
    _product("lenet300 dense1", 100, 784, 300, BINARY, "LeNet-300-100", "ci"),
    _product("lenet300 dense1 ternary", 100, 784, 300, TERNARY, "LeNet-300-100", "ci"),
    _product("resnet18 conv4", 64, 2304, 256, BINARY, "ResNet-18", "ci"),
    _product("vgg16 imagenet dense1", 16, 25088, 4096, BINARY, "VGG-16"),
    _product("transformer 1 token", 1, 4096, 4096, BINARY, "a projection of a block of width 4096"),
    _product("transformer 1 token ternary", 1, 4096, 4096, TERNARY, "a projection of a block of width 4096"),
    _product("transformer 128 tokens", 128, 4096, 4096, BINARY, "a projection of a block of width 4096"),
)
