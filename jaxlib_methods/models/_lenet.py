"""The two LeNets of the pruning literature."""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from jaxlib_methods.models.convolution import Conv


class LeNet300(nnx.Module):
    """LeNet-300-100: two hidden layers of 300 and 100 ReLU units; 266,610 parameters on 28 x 28 images.

    Args:
      num_classes: number of logits.
      input_shape: shape of one example, (H, W, C) or any other; it is flattened.
      batch_norm: normalise the hidden layers, without scale and shift, as networks with binary weights need.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> LeNet300(10, input_shape=(8, 8, 1), rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)

    Source: LeCun, Bottou, Bengio, Haffner (Proceedings of the IEEE, 1998) [lecun1998gradient].
    """

    def __init__(
        self, num_classes: int, *, input_shape: Sequence[int] = (28, 28, 1), batch_norm: bool = False, rngs: nnx.Rngs
    ):
        self.dense1 = nnx.Linear(math.prod(input_shape), 300, rngs=rngs)
        self.dense2 = nnx.Linear(300, 100, rngs=rngs)
        self.dense3 = nnx.Linear(100, num_classes, rngs=rngs)
        self.bn = nnx.List([_normalise(n, rngs) for n in (300, 100)] if batch_norm else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        normalise = [*self.bn] or [lambda x: x] * 2
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(normalise[0](self.dense1(x)))
        x = nnx.relu(normalise[1](self.dense2(x)))
        return self.dense3(x)


def _normalise(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, use_scale=False, use_bias=False, rngs=rngs)


class LeNet5(nnx.Module):
    """LeNet-5 in Caffe's variant: 20 and 50 filters without ReLU, then 500 ReLU units; 431,080 parameters.

    Args:
      num_classes: number of logits.
      input_shape: (H, W, C) of one image, at least 16 x 16.
      batch_norm: normalise the hidden layers, without scale and shift, as networks with binary weights need.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Raises:
      ValueError: if the image is too small for two 5 x 5 convolutions and poolings.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> LeNet5(10, input_shape=(16, 16, 1), rngs=nnx.Rngs(0))(jnp.zeros((2, 16, 16, 1))).shape
      (2, 10)

    Source: LeCun, Bottou, Bengio, Haffner (Proceedings of the IEEE, 1998), with Caffe's layer sizes
    [lecun1998gradient].
    """

    def __init__(
        self, num_classes: int, *, input_shape: Sequence[int] = (28, 28, 1), batch_norm: bool = False, rngs: nnx.Rngs
    ):
        height, width, channels = input_shape
        if min(height, width) < 16:
            raise ValueError(f"input_shape must be at least 16 x 16 for LeNet-5, got {tuple(input_shape)}; upsample it")
        after = lambda size: ((size - 4) // 2 - 4) // 2
        self.conv1 = Conv(channels, 20, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = Conv(20, 50, (5, 5), padding="VALID", rngs=rngs)
        self.dense1 = nnx.Linear(after(height) * after(width) * 50, 500, rngs=rngs)
        self.dense2 = nnx.Linear(500, num_classes, rngs=rngs)
        self.bn = nnx.List([_normalise(n, rngs) for n in (20, 50, 500)] if batch_norm else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        normalise = [*self.bn] or [lambda x: x] * 3
        for conv, norm in zip((self.conv1, self.conv2), normalise[:2], strict=True):
            x = norm(nnx.max_pool(conv(x), (2, 2), strides=(2, 2)))
        x = nnx.relu(normalise[2](self.dense1(x.reshape(x.shape[0], -1))))
        return self.dense2(x)
