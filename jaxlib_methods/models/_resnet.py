"""Residual networks: ResNet-18/50 and wide residual networks.

BibTeX:
@inproceedings{he2016deep,
  title = {Deep residual learning for image recognition},
  author = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2016},
}

@inproceedings{zagoruyko2016wide,
  title = {Wide residual networks},
  author = {Zagoruyko, Sergey and Komodakis, Nikos},
  booktitle = {British Machine Vision Conference},
  year = {2016},
}
"""

from collections.abc import Sequence

import jax
from flax import nnx

from jaxlib_methods.models._convolution import Conv


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
    """relu(x + F(x)): two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 with a bottleneck; the 3 x 3 has the stride."""

    def __init__(self, features_in: int, width: int, stride: int, *, bottleneck: bool, rngs: nnx.Rngs):
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
        self.projects = stride != 1 or features_in != features
        if self.projects:
            self.shortcut = _conv(features_in, features, 1, stride, rngs)
            self.shortcut_bn = _batch_norm(features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        out = x
        for index, (conv, bn) in enumerate(zip(self.conv, self.bn, strict=True)):
            out = bn(conv(nnx.relu(out) if index else out))
        return nnx.relu(out + (self.shortcut_bn(self.shortcut(x)) if self.projects else x))


class ResNet(nnx.Module):
    """ResNet-18 and ResNet-50.

    Parameters, batch norm included: 11,173,962 and 23,520,842 with the CIFAR stem and 10 classes, 11,689,512 and
    25,557,032 with the ImageNet stem and 1000 classes.

    Args:
      num_classes: number of logits.
      depth: 18 (basic blocks) or 50 (bottlenecks, the stride in the 3 x 3 convolution).
      input_shape: (H, W, C) of one image; only C matters.
      stem: "cifar" (3 x 3 convolution, no pooling) or "imagenet" (7 x 7 with stride 2, then max-pooling).
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in).

    Raises:
      ValueError: for an unknown depth or stem.

    Example:
      >>> from flax import nnx
      >>> net = nnx.eval_shape(lambda: ResNet(10, depth=18, rngs=nnx.Rngs(0)))
      >>> net.dense.kernel.shape
      (512, 10)

    Source: He, Zhang, Ren, Sun (CVPR 2016), arXiv:1512.03385, Table 1 [he2016deep].
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: int = 18,
        input_shape: Sequence[int] = (32, 32, 3),
        stem: str = "cifar",
        rngs: nnx.Rngs,
    ):
        counts = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
        if depth not in counts:
            raise ValueError(f"depth must be 18 or 50, got {depth}")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        bottleneck = depth == 50
        self.pools = stem == "imagenet"
        self.conv = _conv(input_shape[-1], 64, 7 if self.pools else 3, 2 if self.pools else 1, rngs)
        self.bn = _batch_norm(64, rngs)
        blocks, channels = [], 64
        for stage, count in enumerate(counts[depth]):
            for index in range(count):
                width, stride = 64 * 2**stage, 2 if stage and not index else 1
                blocks.append(_ResidualBlock(channels, width, stride, bottleneck=bottleneck, rngs=rngs))
                channels = 4 * width if bottleneck else width
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
