"""VGG-16 for small images, in the three variants of the pruning literature."""

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx

from jaxlib_methods._core import checks
from jaxlib_methods.models.convolution import Conv
from jaxlib_methods.typing import VGGVariant

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, convolutions), each ends in a pooling


class VGG(nnx.Module):
    """VGG with batch norm: VGG-C, VGG-D and VGG-like, without dropout.

    10,526,538, 15,245,130 and 14,982,474 weights and biases on 32 x 32 x 3 images, batch norm not counted.

    Args:
      num_classes: number of logits.
      variant: "c" (the last convolution of each of the last three stages is 1 x 1), "d" (all are 3 x 3) or "like" (as
        "d" with one hidden dense layer instead of two).
      input_shape: (H, W, C) of one image.
      first_stride: stride of the first convolution; `None` is 1, and 2 from 64 pixels (Tiny-ImageNet) on.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Raises:
      ValueError: for an unknown variant.

    Example:
      >>> from flax import nnx
      >>> net = nnx.eval_shape(lambda: VGG(10, variant="c", rngs=nnx.Rngs(0)))
      >>> [conv.kernel_size[0] for conv in net.conv]
      [3, 3, 3, 3, 3, 3, 1, 3, 3, 1, 3, 3, 1]

    Source: Simonyan, Zisserman (ICLR 2015), arXiv:1409.1556, Table 1 [simonyan2015very], with the dense layers and
    batch norm of the official code of SNIP (Lee, Ajanthan, Torr; ICLR 2019).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        variant: VGGVariant = "d",
        input_shape: Sequence[int] = (32, 32, 3),
        first_stride: int | None = None,
        rngs: nnx.Rngs,
    ):
        checks.one_of(VGGVariant, variant=variant)
        *size, channels = input_shape
        if first_stride is None:
            first_stride = 2 if min(size) >= 64 else 1
        batch_norm = lambda features: nnx.BatchNorm(features, epsilon=1e-3, rngs=rngs)  # TensorFlow's epsilon
        convs, conv_bns = [], []
        for features, count in _STAGES:
            for index in range(count):
                window = 1 if variant == "c" and index == 2 else 3
                stride = 1 if convs else first_stride
                convs.append(Conv(channels, features, (window, window), strides=stride, rngs=rngs))
                conv_bns.append(batch_norm(features))
                size, channels = [math.ceil(n / stride) for n in size], features
            size = [math.ceil(n / 2) for n in size]
        sizes = [math.prod(size) * channels, *[512] * (1 if variant == "like" else 2), num_classes]
        self.conv, self.conv_bn = nnx.List(convs), nnx.List(conv_bns)
        self.dense = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes)])
        self.dense_bn = nnx.List([batch_norm(features) for features in sizes[1:-1]])

    def __call__(self, x: jax.Array) -> jax.Array:
        layers = iter(zip(self.conv, self.conv_bn, strict=True))
        for _, count in _STAGES:
            for _ in range(count):
                conv, bn = next(layers)
                x = nnx.relu(bn(conv(x)))
            x = nnx.max_pool(x, (2, 2), strides=(2, 2), padding="SAME")  # "SAME": images of any size
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.dense
        for dense, bn in zip(hidden, self.dense_bn, strict=True):
            x = nnx.relu(bn(dense(x)))
        return last(x)
