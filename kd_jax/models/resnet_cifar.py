"""ResNets for 32x32 images, and their x2 and x4 widths.

He et al., Deep Residual Learning for Image Recognition (CVPR 2016), section
4.2, with projection shortcuts. The widened ones are those of the knowledge
distillation literature: x2 widens the stages only, x4 also doubles the stem.
ResNet50_cifar is the paper's table 1 with a 3x3 stem at stride 1 and without
its max-pool, RepDistiller's teacher.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from kd_jax.models import base, layers
from kd_jax.models.blocks import (
  BasicBlock,
  Bottleneck,
  residual_norms,
  residual_stages,
)
from kd_jax.models.entry import Entry


class ResNetCifar(base.Classifier):
  """Stem and three stages of basic blocks, at 1, 1/2 and 1/4 resolution.

  Features: stem_preact, stem, then stageN_preact, stageN, with
  relu(x_preact) = x. The reference's initialisers: He normal over the fan-out
  for convolutions.

  Attributes:
    depth: number of weighted layers, 6n + 2.
    widths: channels of the stem and of the three stages.
  """

  depth: int = 8
  widths: tuple[int, int, int, int] = (16, 16, 32, 64)

  head: ClassVar[str] = "fc"

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """See `Classifier`."""
    if self.depth < 8 or self.depth % 6 != 2:
      raise ValueError(
        f"The depth of a CIFAR ResNet is 6n + 2 (8, 14, 20, ...), got"
        f" {self.depth}."
      )
    conv = self.make_conv(kernel_init=layers.kaiming_normal_fan_out)
    norm = self.make_norm()
    features: dict[str, jax.Array] = {}
    x = self.prepare(images)
    x = conv(x, self.widths[0], 3, padding=1, name="conv1")
    features["stem_preact"] = norm(name="bn1")(x, train=train)
    x = features["stem"] = layers.relu(features["stem_preact"])
    block = functools.partial(BasicBlock, conv=conv, norm=norm)
    blocks = 3 * ((self.depth - 2) // 6,)
    x = residual_stages(
      x, features, block, blocks, self.widths[1:], train=train
    )
    return self.finish(features, x)

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `Classifier`."""
    return residual_norms(params, 3 * ((self.depth - 2) // 6,), "bn2")


class BottleneckResNetCifar(base.Classifier):
  """Stem and four stages of bottlenecks, at 1, 1/2, 1/4 and 1/8 resolution.

  Features: stem_preact, stem, then stageN_preact, stageN, with
  relu(x_preact) = x. The reference's initialisers: He normal over the fan-out
  for convolutions.

  Attributes:
    blocks: bottlenecks of each stage.
    widths: channels inside the bottlenecks of each stage.
  """

  blocks: tuple[int, ...] = (3, 4, 6, 3)
  widths: tuple[int, ...] = (64, 128, 256, 512)

  head: ClassVar[str] = "linear"

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """See `Classifier`."""
    conv = self.make_conv(kernel_init=layers.kaiming_normal_fan_out)
    norm = self.make_norm()
    features: dict[str, jax.Array] = {}
    x = self.prepare(images)
    x = conv(x, self.widths[0], 3, padding=1, name="conv1")
    features["stem_preact"] = norm(name="bn1")(x, train=train)
    x = features["stem"] = layers.relu(features["stem_preact"])
    block = functools.partial(Bottleneck, conv=conv, norm=norm)
    x = residual_stages(
      x, features, block, self.blocks, self.widths, train=train
    )
    return self.finish(features, x)

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `Classifier`."""
    return residual_norms(params, self.blocks, "bn3")


_X1 = (16, 16, 32, 64)
_X2 = (16, 32, 64, 128)
_X4 = (32, 64, 128, 256)


def _resnet(depth: int, widths: tuple[int, int, int, int] = _X1) -> Entry:
  return Entry(functools.partial(ResNetCifar, depth=depth, widths=widths))


ENTRIES = {
  "resnet8": _resnet(8),
  "resnet14": _resnet(14),
  "resnet20": _resnet(20),
  "resnet32": _resnet(32),
  "resnet38": _resnet(38),
  "resnet44": _resnet(44),
  "resnet56": _resnet(56),
  "resnet110": _resnet(110),
  "resnet116": _resnet(116),
  "resnet200": _resnet(200),
  "resnet8x2": _resnet(8, _X2),
  "resnet14x2": _resnet(14, _X2),
  "resnet38x2": _resnet(38, _X2),
  "resnet110x2": _resnet(110, _X2),
  "resnet8x4": _resnet(8, _X4),
  "resnet14x4": _resnet(14, _X4),
  "resnet20x4": _resnet(20, _X4),
  "resnet26x4": _resnet(26, _X4),
  "resnet32x4": _resnet(32, _X4),
  "resnet38x4": _resnet(38, _X4),
  "resnet44x4": _resnet(44, _X4),
  "resnet56x4": _resnet(56, _X4),
  "resnet110x4": _resnet(110, _X4),
  "ResNet50_cifar": Entry(BottleneckResNetCifar),
  # For tests: as deep as a real one, and fast.
  "_tiny": _resnet(8, (4, 4, 8, 8)),
  "_tiny_wide": _resnet(8, (8, 8, 16, 32)),
}
