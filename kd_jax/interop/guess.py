"""Recognise a network by the tensors of its state dict."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kd_jax import models
from kd_jax.interop import pytorch

_COUNTER = ".num_batches_tracked"

# Tensors of each network, without batch counters. Computing all networks'
# shapes takes ten seconds, so the count rules most out first; a network that is
# not in the table is never ruled out.
TENSOR_COUNTS = {
  "resnet8": 47,
  "resnet14": 77,
  "resnet20": 107,
  "resnet32": 167,
  "resnet38": 197,
  "resnet44": 227,
  "resnet56": 287,
  "resnet110": 557,
  "resnet116": 587,
  "resnet200": 1007,
  "resnet8x2": 52,
  "resnet14x2": 82,
  "resnet38x2": 202,
  "resnet110x2": 562,
  "resnet8x4": 52,
  "resnet14x4": 82,
  "resnet20x4": 112,
  "resnet26x4": 142,
  "resnet32x4": 172,
  "resnet38x4": 202,
  "resnet44x4": 232,
  "resnet56x4": 292,
  "resnet110x4": 562,
  "ResNet50_cifar": 267,
  "wrn_16_1": 69,
  "wrn_16_2": 70,
  "wrn_40_1": 189,
  "wrn_40_2": 190,
  "vgg8": 32,
  "vgg11": 50,
  "vgg13": 62,
  "vgg16": 80,
  "vgg19": 98,
  "MobileNetV2": 267,
  "MobileNetV2_1_0": 267,
  "ShuffleV1": 247,
  "ShuffleV2": 282,
  "ShuffleV2_1_5": 282,
  "ResNet18": 102,
  "ResNet34": 182,
  "ResNet50": 267,
  "ResNet10x2": 67,
  "ResNet18x2": 107,
  "ResNet34x2": 187,
  "resnext50_32x4d": 267,
  "wrn_50_2": 267,
  "MobileNetV2_Imagenet": 262,
  "ShuffleV2_Imagenet": 282,
}


class Guess(NamedTuple):
  """A network that fits.

  Attributes:
    model_name: one of `kd_jax.models.names()`.
    num_classes: of its classifier.
  """

  model_name: str
  num_classes: int

  def __str__(self) -> str:
    return f"{self.model_name} with {self.num_classes} classes"


def count_classes(
  model_name: str, tensors: Mapping[str, np.ndarray]
) -> int | None:
  """Count the classes of the classifier in a state dict.

  Args:
    model_name: the network.
    tensors: names to arrays, without wrappers' prefixes.

  Returns:
    The number of classes; None if there is no such classifier.

  Raises:
    ValueError: if the model is unknown.
  """
  head = models.create(model_name, 1).head
  for mapping in models.entry(model_name).weight_names:
    bias = tensors.get(f"{mapping.rename((head,))}.bias")
    if bias is not None and bias.ndim == 1 and bias.size:
      return int(bias.size)
  return None


def guess_model(tensors: Mapping[str, np.ndarray]) -> Guess | None:
  """Find the network with just the names and shapes of a state dict.

  Args:
    tensors: names to arrays, without wrappers' prefixes.

  Returns:
    The first that fits, in the order of `kd_jax.models.names()`, or None.
  """
  got = {
    name: tuple(array.shape)
    for name, array in tensors.items()
    if not name.endswith(_COUNTER)
  }
  for name in models.names():
    num_classes = count_classes(name, tensors)
    if num_classes is None or TENSOR_COUNTS.get(name, len(got)) != len(got):
      continue
    for mapping in models.entry(name).weight_names:
      if pytorch.tensor_shapes(name, num_classes, mapping) == got:
        return Guess(name, num_classes)
  return None
