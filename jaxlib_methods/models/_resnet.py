"""Residual networks: ResNet-18/50, the thin ResNets for CIFAR and wide residual networks."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_methods._core import checks
from jaxlib_methods.models.convolution import Conv
from jaxlib_methods.typing import ResNetStem


def _conv(features_in: int, features: int, window: int, stride: int, rngs: nnx.Rngs) -> Conv:
    padding = (window - 1) // 2  # as much on both sides, also with a stride, where "SAME" would pad one side only
    return Conv(
        features_in,
        features,
        (window, window),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=False,
        rngs=rngs,
    )


def _batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)


class _ResidualBlock(nnx.Module):
    """relu(x + F(x)): two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 with a bottleneck; the 3 x 3 has the stride.

    Where F changes the shape x is projected, or without weights every second pixel taken and zeros put for the new
    channels.
    """

    def __init__(self, features_in: int, width: int, stride: int, *, bottleneck: bool, projects: bool, rngs: nnx.Rngs):
        features = 4 * width if bottleneck else width
        shapes = (
            [(1, width, 1), (3, width, stride), (1, features, 1)] if bottleneck else [(3, width, stride), (3, width, 1)]
        )
        convs, bns, channels = [], [], features_in
        for window, out, s in shapes:
            convs.append(_conv(channels, out, window, s, rngs))
            bns.append(_batch_norm(out, rngs))
            channels = out
        self.conv, self.bn = nnx.List(convs), nnx.List(bns)
        self.stride, self.new_channels = stride, features - features_in
        self.projects = projects and (stride != 1 or features_in != features)
        if self.projects:
            self.shortcut = _conv(features_in, features, 1, stride, rngs)
            self.shortcut_bn = _batch_norm(features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        out = x
        for index, (conv, bn) in enumerate(zip(self.conv, self.bn, strict=True)):
            out = bn(conv(nnx.relu(out) if index else out))
        if self.projects:
            x = self.shortcut_bn(self.shortcut(x))
        elif x.shape != out.shape:
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, self.new_channels)))
        return nnx.relu(out + x)


class _Shape(NamedTuple):
    counts: tuple[int, ...]  # of the blocks of every stage
    width: int  # of the first stage; each further one has twice that at half the resolution
    bottleneck: bool
    projects: bool  # whether shortcuts from stage to stage have weights: options B and A of the paper


_SHAPES = {6 * n + 2: _Shape((n, n, n), 16, False, False) for n in (1, 2, 3, 5, 7, 9, 18)} | {
    18: _Shape((2, 2, 2, 2), 64, False, True),
    50: _Shape((3, 4, 6, 3), 64, True, True),
}
_STEMS = {"cifar": (3, 1), "strided": (3, 2), "imagenet": (7, 2)}  # window and stride of the first convolution


class ResNet(nnx.Module):
    """ResNet-18, ResNet-50 and the paper's thin networks for CIFAR.

    Parameters, batch norm included: 11,173,962 and 23,520,842 of ResNet-18 and 50 with the CIFAR stem and 10 classes,
    11,689,512 and 25,557,032 with the ImageNet stem and 1000 classes; 269,722 of ResNet-20 with 10 classes, whose
    shortcuts have none (option A).

    Args:
      num_classes: number of logits.
      depth: 18 (basic blocks), 50 (bottlenecks, the stride in the 3 x 3 convolution), or one of the thin networks'
        6 n + 2: 20, 32, 44, 56, 110, and 8 and 14 as smaller ones, with n basic blocks of 16, of 32 and of 64 channels.
      input_shape: (H, W, C) of one image; only C matters.
      stem: "cifar" (3 x 3 convolution, no pooling), "strided" (the same with stride 2, for images of 64 x 64 or for a
        quarter of the time) or "imagenet" (7 x 7 with stride 2, then max-pooling).
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in).

    Raises:
      ValueError: for an unknown depth or stem.

    Example:
      >>> from flax import nnx
      >>> net = nnx.eval_shape(lambda: ResNet(10, depth=18, rngs=nnx.Rngs(0)))
      >>> net.dense.kernel.shape
      (512, 10)

    Source: He, Zhang, Ren, Sun (CVPR 2016), arXiv:1512.03385, Table 1 and section 4.2 [he2016deep].
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 18,
        input_shape: Sequence[int] = (32, 32, 3),
        stem: ResNetStem = "cifar",
        rngs: nnx.Rngs,
    ):
        checks.one_of(sorted(_SHAPES), depth=depth)
        checks.one_of(ResNetStem, stem=stem)
        shape = _SHAPES[depth]
        self.pools = stem == "imagenet"
        self.conv = _conv(input_shape[-1], shape.width, *_STEMS[stem], rngs)
        self.bn = _batch_norm(shape.width, rngs)
        kind = {"bottleneck": shape.bottleneck, "projects": shape.projects}
        blocks, channels = [], shape.width
        for stage, count in enumerate(shape.counts):
            for index in range(count):
                width, stride = shape.width * 2**stage, 2 if stage and not index else 1
                blocks.append(_ResidualBlock(channels, width, stride, **kind, rngs=rngs))
                channels = 4 * width if shape.bottleneck else width
        self.block = nnx.List(blocks)
        self.dense = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn(self.conv(x)))
        if self.pools:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.block:
            x = block(x)
        return self.dense(x.mean((1, 2)))


class _WideBlock(nnx.Module):
    """x + F(x) with batch norm and ReLU before each convolution; a 1 x 1 shortcut, after them, where widths differ."""

    def __init__(self, features_in: int, features: int, stride: int, *, rngs: nnx.Rngs):
        self.bn1 = _batch_norm(features_in, rngs)
        self.conv1 = _conv(features_in, features, 3, stride, rngs)
        self.bn2 = _batch_norm(features, rngs)
        self.conv2 = _conv(features, features, 3, 1, rngs)
        self.projects = features_in != features
        if self.projects:
            self.shortcut = _conv(features_in, features, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        active = nnx.relu(self.bn1(x))
        out = self.conv2(nnx.relu(self.bn2(self.conv1(active))))
        return out + (self.shortcut(active) if self.projects else x)


class WideResNet(nnx.Module):
    """WRN-depth-width, without dropout: three groups of (depth - 4) / 6 pre-activation blocks, 16, 32, 64 x width.

    Args:
      num_classes: number of logits.
      depth: 6 n + 4.
      width: the factor k that widens every group.
      input_shape: (H, W, C) of one image; only C matters.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in).

    Raises:
      ValueError: if depth is not 6 n + 4.

    Example:
      >>> from flax import nnx
      >>> net = nnx.eval_shape(lambda: WideResNet(10, depth=16, width=8, rngs=nnx.Rngs(0)))
      >>> len(net.block), net.dense.kernel.shape
      (6, (512, 10))

    Source: Zagoruyko, Komodakis (BMVC 2016), arXiv:1605.07146, Table 1 [zagoruyko2016wide].
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 16,
        width: int = 8,
        input_shape: Sequence[int] = (32, 32, 3),
        rngs: nnx.Rngs,
    ):
        if depth < 10 or depth % 6 != 4:
            raise ValueError(f"depth must be 6 n + 4 with n >= 1, got {depth}; take 10, 16, 22, 28, ...")
        self.conv = _conv(input_shape[-1], 16, 3, 1, rngs)
        blocks, channels = [], 16
        for group in range(3):
            features = 16 * 2**group * width
            for index in range((depth - 4) // 6):
                blocks.append(_WideBlock(channels, features, 2 if group and not index else 1, rngs=rngs))
                channels = features
        self.block = nnx.List(blocks)
        self.bn = _batch_norm(channels, rngs)
        self.dense = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        for block in self.block:
            x = block(x)
        return self.dense(nnx.relu(self.bn(x)).mean((1, 2)))
