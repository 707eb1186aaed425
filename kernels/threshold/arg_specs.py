"""Real workloads of the selection: shapes of prunable parameters by layer, as pruning meets them.

Source: layer shapes derived in the specs of the methods from the authors' code; ResNet-50 from its paper (v1, 1000
classes).
"""

import itertools
import math

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels._arg_spec import ArgSpec

Shapes = dict[str, tuple[int, ...]]


def _prune(name: str, source: str, shapes: Shapes, sparsity: float, *tags: str) -> ArgSpec:
    """Keeps the share 1 - sparsity of all entries."""
    scores = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    size = sum(map(math.prod, shapes.values()))
    return ArgSpec(name, {"scores": scores, "num_keep": round(size * (1 - sparsity))}, source, tags)


def _dense(*widths: int) -> Shapes:
    shapes: Shapes = {}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths), start=1):
        shapes[f"fc{i}/kernel"] = (n_in, n_out)
        shapes[f"fc{i}/bias"] = (n_out,)
    return shapes


def _convolutions(channels: tuple[int, ...], size: int) -> Shapes:
    shapes: Shapes = {}
    for i, (n_in, n_out) in enumerate(itertools.pairwise(channels), start=1):
        shapes[f"conv{i}/kernel"] = (size, size, n_in, n_out)
        shapes[f"conv{i}/bias"] = (n_out,)
    return shapes


def _resnet50() -> Shapes:
    shapes: Shapes = {"stem/kernel": (7, 7, 3, 64)}
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
    _prune("lenet_300_100", "namhoonlee/snip-public", _dense(784, 300, 100, 10), 0.95, "ci"),
    _prune(
        "lenet5_caffe",
        "namhoonlee/snip-public",
        _convolutions((1, 20, 50), 5) | _dense(800, 500, 10),
        0.99,
        "ci",
    ),
    _prune("vgg_d", "namhoonlee/snip-public", _convolutions(_VGG, 3) | _dense(512, 512, 512, 10), 0.95),
    _prune("resnet50", "He et al. (CVPR 2016)", _resnet50(), 0.9),
    _prune("one_array_1e8", "the scale that the selection is designed for", {"w": (10**8,)}, 0.95),
)
