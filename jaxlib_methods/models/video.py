"""Classifiers of video clips: MobileNetV2 with 3D convolutions, and I3D."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_methods.models.convolution import Conv
from jaxlib_methods.models.unet3d import ConvBlock3D

__all__ = ["I3D", "MobileNetV2For3D"]

# (expansion, channels, blocks, stride of the first block along each axis)
_INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

# Branches of an inception module: 1; 1 then 3; 1 then 3; pooling then 1. A string is a pooling: window and stride.
_INCEPTION = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    "3, 2",
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    "2, 2",
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class _InvertedResidual(nnx.Module):
    """x + F(x) where shapes allow: 1 x 1 x 1 expansion, depthwise convolution, 1 x 1 x 1 projection."""

    def __init__(self, features_in: int, features: int, expansion: int, stride: int, *, rngs: nnx.Rngs):
        hidden = expansion * features_in
        self.expand = nnx.List(
            [ConvBlock3D(features_in, hidden, 1, activation=nnx.relu6, rngs=rngs)] if expansion > 1 else []
        )
        self.depthwise = ConvBlock3D(hidden, hidden, 3, strides=stride, groups=hidden, activation=nnx.relu6, rngs=rngs)
        self.project = ConvBlock3D(hidden, features, 1, activation=None, rngs=rngs)
        self.adds = stride == 1 and features_in == features

    def __call__(self, x: jax.Array) -> jax.Array:
        out = x
        for block in self.expand:
            out = block(out)
        out = self.project(self.depthwise(out))
        return x + out if self.adds else out


class MobileNetV2For3D(nnx.Module):
    """MobileNetV2 with 3 x 3 x 3 windows; the first convolution halves height and width only.

    2,354,048 parameters without the classifier.

    Args:
      num_classes: number of logits.
      input_shape: (T, H, W, C) of one clip; only C matters. The paper's is (16, 112, 112, 3).
      width: factor of all widths but the last layer's 1280 channels.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Example:
      >>> from flax import nnx
      >>> net = nnx.eval_shape(lambda: MobileNetV2For3D(101, rngs=nnx.Rngs(0)))
      >>> net.dense.kernel.shape
      (1280, 101)

    Source: Sandler et al. (CVPR 2018), arXiv:1801.04381, Table 2 [sandler2018mobilenetv2], in three dimensions as
    Köpüklü, Kose, Gunduz, Rigoll (ICCVW 2019), arXiv:1904.02422 [kopuklu2019resource].
    """

    def __init__(
        self, num_classes: int, *, input_shape: Sequence[int] = (16, 112, 112, 3), width: float = 1.0, rngs: nnx.Rngs
    ):
        scaled = lambda n: max(1, int(n * width))
        channels = scaled(32)
        self.stem = ConvBlock3D(input_shape[-1], channels, 3, strides=(1, 2, 2), activation=nnx.relu6, rngs=rngs)
        blocks = []
        for expansion, n, count, stride in _INVERTED:
            for index in range(count):
                blocks.append(_InvertedResidual(channels, scaled(n), expansion, 1 if index else stride, rngs=rngs))
                channels = scaled(n)
        self.block = nnx.List(blocks)
        last = max(1280, scaled(1280)) if width >= 1 else 1280
        self.last = ConvBlock3D(channels, last, 1, activation=nnx.relu6, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.dense = nnx.Linear(last, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.block:
            x = block(x)
        return self.dense(self.dropout(self.last(x).mean((1, 2, 3))))


class _Inception(nnx.Module):
    """Four branches side by side, concatenated."""

    def __init__(self, features_in: int, widths: Sequence[int], *, rngs: nnx.Rngs):
        unit = lambda m, n, window: _unit(m, n, window, 1, rngs)
        one, a, b, c, d, pooled = widths
        self.branch = nnx.List(
            [
                nnx.List([unit(features_in, one, 1)]),
                nnx.List([unit(features_in, a, 1), unit(a, b, 3)]),
                nnx.List([unit(features_in, c, 1), unit(c, d, 3)]),
                nnx.List([unit(features_in, pooled, 1)]),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        outs = []
        for index, branch in enumerate(self.branch):
            out = nnx.max_pool(x, (3, 3, 3), strides=(1, 1, 1), padding="SAME") if index == 3 else x
            for unit in branch:
                out = unit(out)
            outs.append(out)
        return jnp.concatenate(outs, axis=-1)


def _unit(features_in: int, features: int, window: int, strides: int, rngs: nnx.Rngs) -> ConvBlock3D:
    return ConvBlock3D(features_in, features, window, strides=strides, padding="SAME", eps=1e-3, rngs=rngs)


class I3D(nnx.Module):
    """Inflated Inception-v1: 57 convolutions and a 1 x 1 x 1 classifier, averaged over time and space.

    12,287,264 parameters without the classifier.

    Args:
      num_classes: number of logits.
      input_shape: (T, H, W, C) of one clip; only C matters. The paper's is (16, 224, 224, 3).
      width: factor of all widths.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Example:
      >>> from flax import nnx
      >>> net = nnx.eval_shape(lambda: I3D(101, rngs=nnx.Rngs(0)))
      >>> net.head.kernel.shape
      (1, 1, 1, 1024, 101)

    Source: Carreira, Zisserman (CVPR 2017), arXiv:1705.07750, Figure 3 [carreira2017quo].
    """

    def __init__(
        self, num_classes: int, *, input_shape: Sequence[int] = (16, 224, 224, 3), width: float = 1.0, rngs: nnx.Rngs
    ):
        scaled = lambda n: max(1, int(n * width))
        self.stem = nnx.List(
            [
                _unit(input_shape[-1], scaled(64), 7, 2, rngs),
                _unit(scaled(64), scaled(64), 1, 1, rngs),
                _unit(scaled(64), scaled(192), 3, 1, rngs),
            ]
        )
        channels, mixed = scaled(192), []
        for widths in _INCEPTION:
            if not isinstance(widths, str):
                widths = [scaled(n) for n in widths]
                mixed.append(_Inception(channels, widths, rngs=rngs))
                channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.mixed = nnx.List(mixed)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = Conv(channels, num_classes, (1, 1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        pool = lambda x, window, stride: nnx.max_pool(x, window, strides=stride, padding="SAME")
        first, second, third = self.stem
        x = pool(third(second(pool(first(x), (1, 3, 3), (1, 2, 2)))), (1, 3, 3), (1, 2, 2))
        mixed = iter(self.mixed)
        for widths in _INCEPTION:
            if isinstance(widths, str):
                window, stride = (int(n) for n in widths.split(","))
                x = pool(x, (window,) * 3, (stride,) * 3)
            else:
                x = next(mixed)(x)
        return self.head(self.dropout(x.mean((1, 2, 3), keepdims=True))).mean((1, 2, 3))
