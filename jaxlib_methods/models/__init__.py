"""Small library of flax nnx networks that the experiments and users share.

Classifiers are built by name with `create`, language models from a `GPTConfig`; `GPT_CONFIGS` holds some by name. The
parts and the rarer networks are in submodules: `convolution` (faster on a CPU), `gpt`, `recurrent`,
`small_convolutional`, `unet3d` and `video`.

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
from jaxlib_methods.models import (
    convolution as convolution,
    gpt as gpt,
    recurrent as recurrent,
    small_convolutional as small_convolutional,
    unet3d as unet3d,
    video as video,
)
from jaxlib_methods.models._alexnet import AlexNet as AlexNet
from jaxlib_methods.models._gpt_stages import (
    GPTStages as GPTStages,
    gpt_stages as gpt_stages,
    split_gpt_params as split_gpt_params,
)
from jaxlib_methods.models._lenet import LeNet5 as LeNet5, LeNet300 as LeNet300
from jaxlib_methods.models._registry import NAMES as NAMES, create as create
from jaxlib_methods.models._resnet import ResNet as ResNet, WideResNet as WideResNet
from jaxlib_methods.models._vgg import VGG as VGG
from jaxlib_methods.models.gpt import GPT as GPT, GPT_CONFIGS as GPT_CONFIGS, GPTConfig as GPTConfig
from jaxlib_methods.models.unet3d import UNet3D as UNet3D

__all__ = [
    "GPT",
    "GPT_CONFIGS",
    "NAMES",
    "VGG",
    "AlexNet",
    "GPTConfig",
    "GPTStages",
    "LeNet5",
    "LeNet300",
    "ResNet",
    "UNet3D",
    "WideResNet",
    "create",
    "gpt_stages",
    "split_gpt_params",
]

moved_names(
    __name__,
    {
        "Conv": "models.convolution.Conv",
        "ConvBlock3D": "models.unet3d.ConvBlock3D",
        "GRUClassifier": "models.recurrent.GRUClassifier",
        "I3D": "models.video.I3D",
        "LSTMClassifier": "models.recurrent.LSTMClassifier",
        "MobileNetV2For3D": "models.video.MobileNetV2For3D",
        "ResNet8": "models.small_convolutional.ResNet8",
        "SimpleCNN": "models.small_convolutional.SimpleCNN",
        "convolve": "models.convolution.convolve",
        "rotate": "models.gpt.rotate",
        "coordinate_gpt_mask": "parallel.unextractable.gpt_coordinates.coordinate_gpt_mask",
        "coordinate_gpt_params": "parallel.unextractable.gpt_coordinates.coordinate_gpt_params",
        "coordinate_gpt_rules": "parallel.unextractable.gpt_coordinates.coordinate_gpt_rules",
        "coordinate_gpt_stages": "parallel.unextractable.gpt_coordinates.coordinate_gpt_stages",
        "gpt_transform_rules": "parallel.unextractable.gpt.gpt_transform_rules",
        "transformable_gpt_params": "parallel.unextractable.gpt.transformable_gpt_params",
        "transformable_gpt_stages": "parallel.unextractable.gpt.transformable_gpt_stages",
    },
)
