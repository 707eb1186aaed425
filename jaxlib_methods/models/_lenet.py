"""The two LeNets of the pruning literature.

BibTeX:
@article{lecun1998gradient,
  title = {Gradient-based learning applied to document recognition},
  author = {LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick},
  journal = {Proceedings of the IEEE},
  volume = {86},
  number = {11},
  pages = {2278--2324},
  year = {1998},
}
"""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from jaxlib_methods.models._convolution import Conv


class LeNet300(nnx.Module):
    """LeNet-300-100: two hidden layers of 300 and 100 ReLU units; 266,610 parameters on 28 x 28 images.

    Args:
      num_classes: number of logits.
      input_shape: shape of one example, (H, W, C) or any other; it is flattened.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> LeNet300(10, input_shape=(8, 8, 1), rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8, 1))).shape
      (2, 10)

    Source: LeCun, Bottou, Bengio, Haffner (Proceedings of the IEEE, 1998) [lecun1998gradient].
    """

    def __init__(self, num_classes: int, *, input_shape: Sequence[int] = (28, 28, 1), rngs: nnx.Rngs):
        self.dense1 = nnx.Linear(math.prod(input_shape), 300, rngs=rngs)
        self.dense2 = nnx.Linear(300, 100, rngs=rngs)
        self.dense3 = nnx.Linear(100, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dense1(x))
        x = nnx.relu(self.dense2(x))
        return self.dense3(x)


class LeNet5(nnx.Module):
    """LeNet-5 in Caffe's variant: 20 and 50 filters without ReLU, then 500 ReLU units; 431,080 parameters.

    Args:
      num_classes: number of logits.
      input_shape: (H, W, C) of one image, at least 16 x 16.
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

    def __init__(self, num_classes: int, *, input_shape: Sequence[int] = (28, 28, 1), rngs: nnx.Rngs):
        height, width, channels = input_shape
        if min(height, width) < 16:
            raise ValueError(f"input_shape must be at least 16 x 16 for LeNet-5, got {tuple(input_shape)}; upsample it")
        after = lambda size: ((size - 4) // 2 - 4) // 2
        self.conv1 = Conv(channels, 20, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = Conv(20, 50, (5, 5), padding="VALID", rngs=rngs)
        self.dense1 = nnx.Linear(after(height) * after(width) * 50, 500, rngs=rngs)
        self.dense2 = nnx.Linear(500, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv1, self.conv2):
            x = nnx.max_pool(conv(x), (2, 2), strides=(2, 2))
        x = nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))
        return self.dense2(x)
