"""Networks by name: `create("resnet8x4", 100)`, and `names()`.

The names are those of the reference toolboxes, SimKD and RepDistiller. To add
a network: one file beside this one with a `Classifier`, and its line below.
"""

import difflib
import numbers
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from kd_jax.models import (
  mobilenetv2,
  resnet,
  resnet_cifar,
  shufflenetv1,
  shufflenetv2,
  vgg,
  wrn,
)
from kd_jax.models.base import Classifier
from kd_jax.models.layers import ModelOutputs

__all__ = ["MODELS", "Classifier", "ModelOutputs", "create", "names"]

# For 32x32 images first, then for ImageNet. A leading underscore: for tests,
# not listed.
MODELS: dict[str, Callable[..., Classifier]] = {
  "resnet8": resnet_cifar.resnet8,
  "resnet14": resnet_cifar.resnet14,
  "resnet20": resnet_cifar.resnet20,
  "resnet32": resnet_cifar.resnet32,
  "resnet38": resnet_cifar.resnet38,
  "resnet44": resnet_cifar.resnet44,
  "resnet56": resnet_cifar.resnet56,
  "resnet110": resnet_cifar.resnet110,
  "resnet116": resnet_cifar.resnet116,
  "resnet200": resnet_cifar.resnet200,
  "resnet8x2": resnet_cifar.resnet8x2,
  "resnet14x2": resnet_cifar.resnet14x2,
  "resnet38x2": resnet_cifar.resnet38x2,
  "resnet110x2": resnet_cifar.resnet110x2,
  "resnet8x4": resnet_cifar.resnet8x4,
  "resnet14x4": resnet_cifar.resnet14x4,
  "resnet20x4": resnet_cifar.resnet20x4,
  "resnet26x4": resnet_cifar.resnet26x4,
  "resnet32x4": resnet_cifar.resnet32x4,
  "resnet38x4": resnet_cifar.resnet38x4,
  "resnet44x4": resnet_cifar.resnet44x4,
  "resnet56x4": resnet_cifar.resnet56x4,
  "resnet110x4": resnet_cifar.resnet110x4,
  "ResNet50_cifar": resnet_cifar.ResNet50_cifar,
  "wrn_16_1": wrn.wrn_16_1,
  "wrn_16_2": wrn.wrn_16_2,
  "wrn_40_1": wrn.wrn_40_1,
  "wrn_40_2": wrn.wrn_40_2,
  "vgg8": vgg.vgg8,
  "vgg11": vgg.vgg11,
  "vgg13": vgg.vgg13,
  "vgg16": vgg.vgg16,
  "vgg19": vgg.vgg19,
  "MobileNetV2": mobilenetv2.MobileNetV2,
  "MobileNetV2_1_0": mobilenetv2.MobileNetV2_1_0,
  "ShuffleV1": shufflenetv1.ShuffleV1,
  "ShuffleV2": shufflenetv2.ShuffleV2,
  "ShuffleV2_1_5": shufflenetv2.ShuffleV2_1_5,
  "ResNet18": resnet.ResNet18,
  "ResNet34": resnet.ResNet34,
  "ResNet50": resnet.ResNet50,
  "ResNet10x2": resnet.ResNet10x2,
  "ResNet18x2": resnet.ResNet18x2,
  "ResNet34x2": resnet.ResNet34x2,
  "resnext50_32x4d": resnet.resnext50_32x4d,
  "wrn_50_2": resnet.wrn_50_2,
  "MobileNetV2_Imagenet": mobilenetv2.MobileNetV2_Imagenet,
  "ShuffleV2_Imagenet": shufflenetv2.ShuffleV2_Imagenet,
  "_tiny": resnet_cifar._tiny,
  "_tiny_wide": resnet_cifar._tiny_wide,
}


def names() -> list[str]:
  """The names that `create` takes, in the order of the table."""
  return [name for name in MODELS if not name.startswith("_")]


def create(
  name: str,
  num_classes: int,
  *,
  dtype: Any = jnp.float32,
  bn_axis_name: str | None = None,
) -> Classifier:
  """Builds a network.

  Args:
    name: one of `names()`.
    num_classes: width of the logits.
    dtype: of the computation, float32 or bfloat16 (an object or its name);
      parameters, statistics and logits are float32 in any case.
    bn_axis_name: mapped axis over which BatchNorm shares its statistics.

  Returns:
    A linen module: `model.init(key, images, train=False)`,
    `model.apply(variables, images, train=False) -> ModelOutputs`, and
    `model.classify(params, pooled) -> logits`.

  Raises:
    ValueError: if the name is unknown, or another argument makes no sense.
  """
  if name not in MODELS:
    close = difflib.get_close_matches(str(name), names(), n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
      f"Unknown model {name!r}.{hint} The models are: {', '.join(names())}."
    )
  is_count = isinstance(num_classes, numbers.Integral) and num_classes >= 1
  if not is_count or isinstance(num_classes, bool):
    raise ValueError(
      f"num_classes must be an integer of at least 1, got {num_classes!r};"
      " pass the data set's number of labels, such as 100."
    )
  compute = jnp.dtype(dtype)
  if not jnp.issubdtype(compute, jnp.floating):
    raise ValueError(
      f"dtype must be a float type, got {compute}; use float32 or bfloat16."
    )
  return MODELS[name](
    num_classes=int(num_classes), dtype=compute, bn_axis_name=bn_axis_name
  )
