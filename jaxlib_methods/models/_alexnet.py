"""AlexNet for small images, as the pruning literature uses it."""

import itertools
import math
from collections.abc import Sequence

import jax
from flax import nnx

from jaxlib_methods.models.convolution import Conv

_FILTERS = ((11, 96), (5, 256), (3, 384), (3, 384), (3, 256))  # (window, channels), every stride 2 but the first


class AlexNet(nnx.Module):
    """AlexNet-s (`width` 1) and AlexNet-b (`width` 2): five strided convolutions and three dense layers, batch norm.

    5,070,218 and 8,490,378 weights and biases on 32 x 32 x 3 images, batch norm not counted.

    Args:
      num_classes: number of logits.
      width: the hidden dense layers have 1024 * width units.
      input_shape: (H, W, C) of one image.
      first_stride: stride of the first convolution; `None` is 2, and 4 from 64 pixels (Tiny-ImageNet) on.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Example:
      >>> from flax import nnx
      >>> net = nnx.eval_shape(lambda: AlexNet(10, width=1, rngs=nnx.Rngs(0)))
      >>> net.dense[0].kernel.shape
      (256, 1024)

    Source: Krizhevsky, Sutskever, Hinton (NeurIPS 2012) [krizhevsky2012imagenet], with the sizes, strides and batch
    norm of the official code of SNIP (Lee, Ajanthan, Torr; ICLR 2019).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 1,
        input_shape: Sequence[int] = (32, 32, 3),
        first_stride: int | None = None,
        rngs: nnx.Rngs,
    ):
        *size, channels = input_shape
        if first_stride is None:
            first_stride = 4 if min(size) >= 64 else 2
        batch_norm = lambda features: nnx.BatchNorm(features, epsilon=1e-3, rngs=rngs)  # TensorFlow's epsilon
        convs, conv_bns = [], []
        for index, (window, features) in enumerate(_FILTERS):
            stride = 2 if index else first_stride
            convs.append(Conv(channels, features, (window, window), strides=stride, rngs=rngs))
            conv_bns.append(batch_norm(features))
            size, channels = [math.ceil(n / stride) for n in size], features
        hidden = 1024 * width
        self.conv, self.conv_bn = nnx.List(convs), nnx.List(conv_bns)
        sizes = [math.prod(size) * channels, hidden, hidden, num_classes]
        self.dense = nnx.List([nnx.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(sizes)])
        self.dense_bn = nnx.List([batch_norm(hidden) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, bn in zip(self.conv, self.conv_bn, strict=True):
            x = nnx.relu(bn(conv(x)))
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.dense
        for dense, bn in zip(hidden, self.dense_bn, strict=True):
            x = nnx.relu(bn(dense(x)))
        return last(x)
