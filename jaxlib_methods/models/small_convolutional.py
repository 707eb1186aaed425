"""The small networks without batch norm with which effects of batch size and sparsity are studied."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_methods.models.convolution import Conv

__all__ = ["ResNet8", "SimpleCNN"]


class SimpleCNN(nnx.Module):
    """Two 5 x 5 convolutions of 32 and 64 ReLU filters, each max-pooled, and a dense layer; 62,346 parameters.

    Args:
      num_classes: number of logits.
      input_shape: (H, W, C) of one image, at least 16 x 16.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Raises:
      ValueError: if the image is too small for two 5 x 5 convolutions and poolings.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> SimpleCNN(10, input_shape=(16, 16, 1), rngs=nnx.Rngs(0))(jnp.zeros((2, 16, 16, 1))).shape
      (2, 10)

    Source: Lee, Ajanthan, Torr, Jaggi (ICLR 2021), arXiv:2003.11316, and the authors' code [lee2021understanding].
    """

    def __init__(self, num_classes: int, *, input_shape: Sequence[int] = (28, 28, 1), rngs: nnx.Rngs):
        height, width, channels = input_shape
        if min(height, width) < 16:
            raise ValueError(
                f"input_shape must be at least 16 x 16 for SimpleCNN, got {tuple(input_shape)}; upsample it"
            )
        after = lambda size: ((size - 4) // 2 - 4) // 2
        self.conv1 = Conv(channels, 32, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = Conv(32, 64, (5, 5), padding="VALID", rngs=rngs)
        self.dense = nnx.Linear(after(height) * after(width) * 64, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        return self.dense(x.reshape(x.shape[0], -1))


class _PreActivationBlock(nnx.Module):
    """x + F(x) with ReLU before each 3 x 3 convolution; a shortcut without parameters where the stride is 2."""

    def __init__(self, features_in: int, features: int, stride: int, *, rngs: nnx.Rngs):
        self.conv1 = Conv(features_in, features, (3, 3), strides=(stride, stride), rngs=rngs)
        self.conv2 = Conv(features, features, (3, 3), rngs=rngs)
        self.strided = stride == 2

    def __call__(self, x: jax.Array) -> jax.Array:
        active = nnx.relu(x)
        out = self.conv2(nnx.relu(self.conv1(active)))
        if not self.strided:
            return x + out
        pooled = nnx.avg_pool(active, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False)
        return out + jnp.pad(pooled, ((0, 0), (0, 0), (0, 0), (0, out.shape[-1] - x.shape[-1])))


class ResNet8(nnx.Module):
    """A residual network of three pre-activation blocks without batch norm; 75,050 parameters on three channels.

    16, 32 and 64 channels. Where a block has stride 2 its shortcut is the 2 x 2 average of the rectified input with
    zeros for the new channels, otherwise the input itself.

    Args:
      num_classes: number of logits.
      input_shape: (H, W, C) of one image; only C matters.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> ResNet8(10, rngs=nnx.Rngs(0))(jnp.zeros((2, 32, 32, 3))).shape
      (2, 10)

    Source: Lee, Ajanthan, Torr, Jaggi (ICLR 2021), arXiv:2003.11316, and the authors' code [lee2021understanding].
    """

    def __init__(self, num_classes: int, *, input_shape: Sequence[int] = (32, 32, 3), rngs: nnx.Rngs):
        self.conv = Conv(input_shape[-1], 16, (3, 3), rngs=rngs)
        widths = ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        self.block = nnx.List([_PreActivationBlock(m, n, stride, rngs=rngs) for m, n, stride in widths])
        self.dense = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        for block in self.block:
            x = block(x)
        return self.dense(nnx.relu(x).mean((1, 2)))
