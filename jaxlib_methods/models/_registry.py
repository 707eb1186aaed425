"""Models by the names that the papers' tables use."""

import functools
from collections.abc import Callable, Sequence

from flax import nnx

from jaxlib_methods.models._alexnet import AlexNet
from jaxlib_methods.models._lenet import LeNet5, LeNet300
from jaxlib_methods.models._resnet import ResNet, WideResNet
from jaxlib_methods.models._vgg import VGG
from jaxlib_methods.models.recurrent import GRUClassifier, LSTMClassifier
from jaxlib_methods.models.small_convolutional import ResNet8, SimpleCNN

_BUILDERS: dict[str, Callable[..., nnx.Module]] = {
    "lenet300": LeNet300,
    "lenet5": LeNet5,
    "simple_cnn": SimpleCNN,
    "resnet8": ResNet8,
    "alexnet_s": functools.partial(AlexNet, width=1),
    "alexnet_b": functools.partial(AlexNet, width=2),
    "vgg_c": functools.partial(VGG, variant="c"),
    "vgg_d": functools.partial(VGG, variant="d"),
    "vgg_like": functools.partial(VGG, variant="like"),
    "wrn_16_8": functools.partial(WideResNet, depth=16, width=8),
    "wrn_16_10": functools.partial(WideResNet, depth=16, width=10),
    "wrn_22_8": functools.partial(WideResNet, depth=22, width=8),
    "resnet8_strided": functools.partial(ResNet, depth=8, stem="strided"),
    "resnet20": functools.partial(ResNet, depth=20),
    "resnet18": functools.partial(ResNet, depth=18),
    "resnet50": functools.partial(ResNet, depth=50),
    "resnet18_imagenet": functools.partial(ResNet, depth=18, stem="imagenet"),
    "resnet50_imagenet": functools.partial(ResNet, depth=50, stem="imagenet"),
    "lstm_s": functools.partial(LSTMClassifier, hidden=128),
    "lstm_b": functools.partial(LSTMClassifier, hidden=256),
    "gru_s": functools.partial(GRUClassifier, hidden=128),
    "gru_b": functools.partial(GRUClassifier, hidden=256),
}

NAMES = tuple(_BUILDERS)


def create(name: str, *, num_classes: int, input_shape: Sequence[int], rngs: nnx.Rngs) -> nnx.Module:
    """Builds a model by its name, one of `NAMES`.

    Args:
      name: for example "lenet5", "vgg_d", "wrn_16_8", "resnet18" (CIFAR stem), "resnet50_imagenet", "lstm_s";
        "resnet8" is without batch norm, "resnet8_strided" is `ResNet` of that depth.
      num_classes: number of logits.
      input_shape: shape of one example, (H, W, C) for images; the recurrent models read an image row by row.
      rngs: of the initialisation.

    Returns:
      A flax nnx module in training mode; it maps (B, *input_shape) to logits of shape (B, num_classes).

    Raises:
      ValueError: for an unknown name, or an input shape that the model cannot take.

    Example:
      >>> from flax import nnx
      >>> model = create("lenet300", num_classes=10, input_shape=(8, 8, 1), rngs=nnx.Rngs(0))
      >>> sorted(nnx.state(model, nnx.Param))
      ['dense1', 'dense2', 'dense3']
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(NAMES)}")
    if num_classes < 1 or any(size < 1 for size in input_shape):
        raise ValueError(f"num_classes and input_shape must be positive, got {num_classes} and {tuple(input_shape)}")
    return _BUILDERS[name](num_classes, input_shape=input_shape, rngs=rngs)
