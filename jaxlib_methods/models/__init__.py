"""Small library of flax nnx networks that the experiments and users share.

Classifiers are built by name with `create`, language models from a `GPTConfig`; `GPT_CONFIGS` holds some by name.

The kernels of the classifiers are drawn from a truncated normal with variance 1 / fan-in and biases are zero, as flax
does by default and pruning at initialisation wants it. Their batch norm layers, and nothing else, have names with "bn",
so that a path expression tells their scale and bias from the weights and biases of the layers. `model.train()` and
`model.eval()` switch them between batch and running statistics; with pure functions, split the model once in each mode:

    model = create("vgg_d", num_classes=10, input_shape=(32, 32, 3), rngs=nnx.Rngs(0))
    train_def, params, rest = nnx.split(model, nnx.Param, ...)
    model.eval()
    eval_def = nnx.graphdef(model)
    logits = nnx.merge(eval_def, params, rest)(images)
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.models._alexnet import AlexNet as AlexNet
from jaxlib_methods.models._convolution import Conv as Conv, convolve as convolve
from jaxlib_methods.models._gpt import GPT as GPT, GPT_CONFIGS as GPT_CONFIGS, GPTConfig as GPTConfig, rotate as rotate
from jaxlib_methods.models._gpt_stages import (
    GPTStages as GPTStages,
    gpt_stages as gpt_stages,
    split_gpt_params as split_gpt_params,
)
from jaxlib_methods.models._lenet import LeNet5 as LeNet5, LeNet300 as LeNet300
from jaxlib_methods.models._recurrent import GRUClassifier as GRUClassifier, LSTMClassifier as LSTMClassifier
from jaxlib_methods.models._registry import NAMES as NAMES, create as create
from jaxlib_methods.models._resnet import ResNet as ResNet, WideResNet as WideResNet
from jaxlib_methods.models._small_convolutional import ResNet8 as ResNet8, SimpleCNN as SimpleCNN
from jaxlib_methods.models._unet3d import ConvBlock3D as ConvBlock3D, UNet3D as UNet3D
from jaxlib_methods.models._vgg import VGG as VGG
from jaxlib_methods.models._video import I3D as I3D, MobileNetV2For3D as MobileNetV2For3D

__all__ = [
    "GPT",
    "GPT_CONFIGS",
    "I3D",
    "NAMES",
    "VGG",
    "AlexNet",
    "Conv",
    "ConvBlock3D",
    "GPTConfig",
    "GPTStages",
    "GRUClassifier",
    "LSTMClassifier",
    "LeNet5",
    "LeNet300",
    "MobileNetV2For3D",
    "ResNet",
    "ResNet8",
    "SimpleCNN",
    "UNet3D",
    "WideResNet",
    "convolve",
    "create",
    "gpt_stages",
    "rotate",
    "split_gpt_params",
]

__getattr__ = moved_names(
    __name__,
    {
        "coordinate_gpt_mask": "parallel.unextractable.gpt_coordinates.coordinate_gpt_mask",
        "coordinate_gpt_params": "parallel.unextractable.gpt_coordinates.coordinate_gpt_params",
        "coordinate_gpt_rules": "parallel.unextractable.gpt_coordinates.coordinate_gpt_rules",
        "coordinate_gpt_stages": "parallel.unextractable.gpt_coordinates.coordinate_gpt_stages",
        "gpt_transform_rules": "parallel.unextractable.gpt.gpt_transform_rules",
        "transformable_gpt_params": "parallel.unextractable.gpt.transformable_gpt_params",
        "transformable_gpt_stages": "parallel.unextractable.gpt.transformable_gpt_stages",
    },
)
