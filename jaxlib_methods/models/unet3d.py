"""The 3D-UNet of RANP: four resolutions, batch norm, nearest upsampling."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_methods.models.convolution import Conv
from jaxlib_methods.typing import ConvolutionPadding

__all__ = ["ConvBlock3D", "UNet3D"]


class ConvBlock3D(nnx.Module):
    """Convolution without bias, batch norm and ReLU (or ReLU6, or none), on volumes (B, D, H, W, C).

    Args:
      features_in: input channels.
      features: output channels.
      window: side of the kernel, or its three sides.
      strides: three integers, or one for all.
      groups: of the convolution; as many as channels make it depthwise.
      padding: as much on all sides as keeps the size (an odd window), or "SAME".
      activation: elementwise; None for none.
      eps: of the batch norm.
      rngs: of the initialisation.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> block = lambda: ConvBlock3D(1, 4, 3, strides=2, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(lambda: block()(jnp.zeros((1, 4, 4, 4, 1)))).shape
      (1, 2, 2, 2, 4)

    Source: Çiçek, Abdulkadir, Lienkamp, Brox, Ronneberger (MICCAI 2016), arXiv:1606.06650 [cicek20163d].
    """

    def __init__(
        self,
        features_in: int,
        features: int,
        window: int | tuple[int, ...] = 3,
        *,
        strides: int | tuple[int, ...] = 1,
        groups: int = 1,
        padding: ConvolutionPadding | None = None,
        activation: Callable[[jax.Array], jax.Array] | None = nnx.relu,
        eps: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        window = (window,) * 3 if isinstance(window, int) else tuple(window)
        self.conv = Conv(
            features_in,
            features,
            window,
            strides=strides,
            padding=[((k - 1) // 2, (k - 1) // 2) for k in window] if padding is None else padding,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(features, momentum=0.9, epsilon=eps, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.bn(self.conv(x))
        return x if self.activation is None else self.activation(x)


class UNet3D(nnx.Module):
    """3D-UNet: an encoder and a decoder of two convolutions at each of four resolutions, joined by concatenations.

    15 convolutions with 2386 output channels at width 64 with 50 classes (ShapeNet), 1173 at width 32 with 5 (BraTS).
    At a resolution of f channels the first convolution of the encoder has max(f / 2, input channels) and the second f;
    the decoder reads [encoder, upsampled]. A 1 x 1 x 1 convolution with bias gives the logits.

    Args:
      num_classes: number of logits of a voxel.
      channels: of the input.
      width: channels f at full resolution, doubled with every halving.
      stages: number of resolutions; the paper's is 4.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in).

    Raises:
      ValueError: by a call, if a side of the volume cannot be halved as often as there are resolutions below the first.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> net = lambda: UNet3D(3, channels=1, width=4, rngs=nnx.Rngs(0))
      >>> nnx.eval_shape(lambda: net()(jnp.zeros((1, 8, 8, 8, 1)))).shape
      (1, 8, 8, 8, 3)

    Source: Çiçek, Abdulkadir, Lienkamp, Brox, Ronneberger (MICCAI 2016), arXiv:1606.06650 [cicek20163d], in the form of
    the code of Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """

    def __init__(self, num_classes: int, *, channels: int = 1, width: int = 64, stages: int = 4, rngs: nnx.Rngs):
        widths = [width * 2**stage for stage in range(stages)]
        encoder, decoder = [], []
        for f in widths:
            first = max(f // 2, channels)
            encoder.append(nnx.List([ConvBlock3D(channels, first, rngs=rngs), ConvBlock3D(first, f, rngs=rngs)]))
            channels = f
        for f in widths[-2::-1]:
            decoder.append(nnx.List([ConvBlock3D(f + channels, f, rngs=rngs), ConvBlock3D(f, f, rngs=rngs)]))
            channels = f
        self.encoder, self.decoder = nnx.List(encoder), nnx.List(decoder)
        self.head = Conv(channels, num_classes, (1, 1, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        unit = 2 ** len(self.decoder)
        if any(n % unit for n in x.shape[-4:-1]):
            raise ValueError(f"the sides of a volume must be multiples of {unit}, got {x.shape[-4:-1]}; pad it")
        skipped = []
        for stage, (first, second) in enumerate(self.encoder):
            if stage:
                skipped.append(x)
                x = nnx.max_pool(x, (2, 2, 2), strides=(2, 2, 2))
            x = second(first(x))
        for first, second in self.decoder:
            x = second(first(jnp.concatenate([skipped.pop(), _upsample(x)], axis=-1)))
        return self.head(x)


def _upsample(x: jax.Array) -> jax.Array:
    """Every voxel twice along each of the three axes."""
    b, d, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :, None], (b, d, 2, h, 2, w, 2, c))
    return x.reshape(b, 2 * d, 2 * h, 2 * w, c)
