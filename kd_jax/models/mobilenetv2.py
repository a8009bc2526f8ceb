"""MobileNetV2, for ImageNet and for 32x32 images.

Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks (CVPR
2018), table 2. The networks for small images have ReLU instead of ReLU6,
stride 1 where stage 1 would halve the map, and an expansion in every block.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from kd_jax.models import base, layers
from kd_jax.models.entry import MOBILE_LEARNING_RATE, Entry, WeightNames

# Expansion, channels at width 1, repetitions.
_GROUPS = (
  (1, 16, 1),
  (6, 24, 2),
  (6, 32, 3),
  (6, 64, 4),
  (6, 96, 3),
  (6, 160, 3),
  (6, 320, 1),
)
# The groups after which the map is a feature.
_STAGE_ENDS = {1: "stage1", 2: "stage2", 4: "stage3", 6: "stage4"}


class InvertedResidual(nn.Module):
  """1x1 expansion, depthwise 3x3, linear 1x1 projection, and a shortcut.

  Attributes:
    width: channels of the result.
    strides: of the depthwise convolution.
    expansion: inner channels per input channel.
    expand: whether there is the 1x1 expansion.
    activation: after the expansion and the depthwise convolution.
    conv: convolution to use.
    norm: normalisation to use.
  """

  width: int
  strides: int
  expansion: int
  expand: bool
  activation: Callable[[jax.Array], jax.Array]
  conv: layers.Conv
  norm: layers.Norm

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    inner = self.expansion * x.shape[-1]
    y = x
    if self.expand:
      y = self.conv(y, inner, 1, name="conv_0")
      y = self.activation(self.norm(name="conv_1")(y, train=train))
    y = self.conv(
      y,
      inner,
      3,
      strides=self.strides,
      padding=1,
      groups=inner,
      name="conv_3",
    )
    y = self.activation(self.norm(name="conv_4")(y, train=train))
    y = self.conv(y, self.width, 1, name="conv_6")
    y = self.norm(name="conv_7")(y, train=train)
    return x + y if self.strides == 1 and x.shape[-1] == self.width else y


class MobileNetV2Classifier(base.Classifier):
  """A stem at stride 2, seven groups of blocks in four stages, a 1x1 layer.

  Features: stem_preact, stem, then stageN: linear bottlenecks, of either sign,
  without an activation and so without a `_preact` of their own. `last` is the
  final 1x1 convolution's map after BatchNorm and its activation. The
  reference's initialisers: He normal over the fan-out for convolutions,
  N(0, 0.01^2) for the classifier, zero biases.

  Attributes:
    width_multiplier: factor of all channels; the final 1x1 convolution keeps
      1280 below 1.
    strides: of the first block of each group.
    activation: everywhere.
    expand_always: whether blocks of expansion 1 have their 1x1 layer too.
    dropout_rate: of the pooled features before the classifier, in training;
      `pooled` itself and `classify` have none.
  """

  width_multiplier: float = 1.0
  strides: tuple[int, ...] = (1, 1, 2, 2, 1, 2, 1)
  activation: Callable[[jax.Array], jax.Array] = layers.relu
  expand_always: bool = True
  dropout_rate: float = 0.0

  head: ClassVar[str] = "classifier_0"

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """See `Classifier`."""
    conv = self.make_conv(kernel_init=layers.kaiming_normal_fan_out)
    norm = self.make_norm()
    factor, activation = self.width_multiplier, self.activation
    features = {}
    x = self.prepare(images)
    x = conv(x, int(32 * factor), 3, strides=2, padding=1, name="conv1_0")
    features["stem_preact"] = norm(name="conv1_1")(x, train=train)
    x = features["stem"] = activation(features["stem_preact"])
    groups = zip(_GROUPS, self.strides, strict=True)
    for group, ((expansion, width, repeats), strides) in enumerate(groups):
      for i in range(repeats):
        block = InvertedResidual(
          int(width * factor),
          strides if i == 0 else 1,
          expansion,
          self.expand_always or expansion > 1,
          activation,
          conv,
          norm,
          name=f"blocks_{group}_{i}",
        )
        x = block(x, train=train)
      if group in _STAGE_ENDS:
        features[_STAGE_ENDS[group]] = x
    x = conv(x, int(1280 * max(factor, 1.0)), 1, name="conv2_0")
    x = activation(norm(name="conv2_1")(x, train=train))
    return self.finish(
      features,
      x,
      kernel_init=nn.initializers.normal(0.01),
      bias_init=nn.initializers.zeros,
      dropout_rate=self.dropout_rate if train else 0.0,
    )

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `Classifier`.

    No ReLU follows a linear bottleneck. Its own BatchNorm stands in for the one
    that would come before it, as in mdistiller.
    """
    return [
      layers.norm_parameters(
        params, f"blocks_{group}_{_GROUPS[group][2] - 1}", "conv_7"
      )
      for group in _STAGE_ENDS
    ]


def _weight_names(
  ends: dict[str, str],
  block_name: Callable[[int, int, int], str],
  plain: tuple[str, ...],
  expanded: tuple[str, ...],
) -> dict[str, str]:
  """Maps the names of MobileNetV2_Imagenet to a toolbox's.

  Args:
    ends: the layers outside of the blocks.
    block_name: (group, place in the group, place among all) -> name.
    plain: a block's layers in their order, where there is no expansion.
    expanded: where there is one.
  """
  table, place = dict(ends), 0
  for group, (expansion, _, repeats) in enumerate(_GROUPS):
    theirs = plain if expansion == 1 else expanded
    ours = ("conv.0", "conv.1", "conv.3", "conv.4", "conv.6", "conv.7")
    for i in range(repeats):
      name = block_name(group, i, place)
      for a, b in zip(ours[-len(theirs) :], theirs, strict=True):
        table[f"blocks.{group}.{i}.{a}"] = f"{name}.{b}"
      place += 1
  return table


ENTRIES = {
  "MobileNetV2": Entry(
    functools.partial(MobileNetV2Classifier, width_multiplier=0.5),
    learning_rate=MOBILE_LEARNING_RATE,
  ),
  "MobileNetV2_1_0": Entry(
    functools.partial(MobileNetV2Classifier, width_multiplier=1.0),
    learning_rate=MOBILE_LEARNING_RATE,
  ),
  "MobileNetV2_Imagenet": Entry(
    functools.partial(
      MobileNetV2Classifier,
      strides=(1, 2, 2, 2, 1, 2, 1),
      activation=nn.relu6,
      expand_always=False,
      dropout_rate=0.2,
    ),
    learning_rate=MOBILE_LEARNING_RATE,
    image_size=224,
    weight_names=(
      WeightNames(
        "torchvision and SimKD",
        _weight_names(
          {
            "conv1.0": "features.0.0",
            "conv1.1": "features.0.1",
            "conv2.0": "features.18.0",
            "conv2.1": "features.18.1",
            "classifier.0": "classifier.1",
          },
          lambda group, i, place: f"features.{place + 1}.conv",
          ("0.0", "0.1", "1", "2"),
          ("0.0", "0.1", "1.0", "1.1", "2", "3"),
        ),
      ),
      WeightNames(
        "timm",
        _weight_names(
          {
            "conv1.0": "conv_stem",
            "conv1.1": "bn1",
            "conv2.0": "conv_head",
            "conv2.1": "bn2",
            "classifier.0": "classifier",
          },
          lambda group, i, place: f"blocks.{group}.{i}",
          ("conv_dw", "bn1", "conv_pw", "bn2"),
          ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"),
        ),
      ),
    ),
  ),
}
