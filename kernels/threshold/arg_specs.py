"""Real workloads of the selection: shapes of prunable parameters by layer, as pruning meets them.

Source: layer shapes derived in the specs of the methods from the authors' code; ResNet-50 from its paper (v1, 1000
classes).
"""

import dataclasses
import itertools
import math


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One workload: the leaves' shapes and the share of entries to prune.

    Args:
      name: unique.
      project: where the shapes come from.
      shapes: by parameter, in the order of the leaves.
      sparsity: share of the entries that is pruned.
      tags: "ci" for those small enough for tests.
    """

    name: str
    project: str
    shapes: dict[str, tuple[int, ...]]
    sparsity: float
    tags: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of scores."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def kappa(self) -> int:
        """Number of scores that are kept."""
        return round(self.size * (1 - self.sparsity))


def _dense(*widths: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths), start=1):
        shapes[f"fc{i}/kernel"] = (n_in, n_out)
        shapes[f"fc{i}/bias"] = (n_out,)
    return shapes


def _convolutions(channels: tuple[int, ...], size: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(channels), start=1):
        shapes[f"conv{i}/kernel"] = (size, size, n_in, n_out)
        shapes[f"conv{i}/bias"] = (n_out,)
    return shapes


def _resnet50() -> dict[str, tuple[int, ...]]:
    shapes = {"stem/kernel": (7, 7, 3, 64)}
    n_in = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(1, blocks + 1):
            name = f"stage{stage}/block{block}"
            shapes[f"{name}/conv1/kernel"] = (1, 1, n_in, width)
            shapes[f"{name}/conv2/kernel"] = (3, 3, width, width)
            shapes[f"{name}/conv3/kernel"] = (1, 1, width, 4 * width)
            if block == 1:
                shapes[f"{name}/shortcut/kernel"] = (1, 1, n_in, 4 * width)
            n_in = 4 * width
    return shapes | {"head/kernel": (2048, 1000), "head/bias": (1000,)}


_VGG = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)

ARG_SPECS = (
    ArgSpec("lenet_300_100", "namhoonlee/snip-public", _dense(784, 300, 100, 10), 0.95, ("ci",)),
    ArgSpec(
        "lenet5_caffe",
        "namhoonlee/snip-public",
        _convolutions((1, 20, 50), 5) | _dense(800, 500, 10),
        0.99,
        ("ci",),
    ),
    ArgSpec("vgg_d", "namhoonlee/snip-public", _convolutions(_VGG, 3) | _dense(512, 512, 512, 10), 0.95),
    ArgSpec("resnet50", "He et al. (CVPR 2016)", _resnet50(), 0.9),
    ArgSpec("one_array_1e8", "the scale that the selection is designed for", {"w": (10**8,)}, 0.95),
)
