"""Named workloads of the product: dense layers and convolutions (as matrices) of the networks that are quantized.

Source: layer shapes of LeNet-300-100, VGG-16 and ResNet-18; the projection of a transformer block of width 4096.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One product x [m, depth] @ W [depth, n].

    Args:
      name: unique.
      m: rows of the activations.
      depth: contracted size.
      n: columns.
      num_labels: of the weights.
      tags: "ci" for those small enough for tests.
    """

    name: str
    m: int
    depth: int
    n: int
    num_labels: int = 2
    tags: tuple[str, ...] = ()


ARG_SPECS = (
    ArgSpec("lenet300 dense1", 100, 784, 300, tags=("ci",)),
    ArgSpec("lenet300 dense1 ternary", 100, 784, 300, 3, ("ci",)),
    ArgSpec("resnet18 conv4", 64, 2304, 256, tags=("ci",)),
    ArgSpec("vgg16 imagenet dense1", 16, 25088, 4096),
    ArgSpec("transformer 1 token", 1, 4096, 4096),
    ArgSpec("transformer 1 token ternary", 1, 4096, 4096, 3),
    ArgSpec("transformer 128 tokens", 128, 4096, 4096),
)
BY_NAME = {spec.name: spec for spec in ARG_SPECS}
