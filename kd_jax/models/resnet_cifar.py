"""ResNets for 32x32 images, and their x2 and x4 widths.

He et al., Deep Residual Learning for Image Recognition (CVPR 2016), section
4.2, with projection shortcuts. The widened ones are those of the knowledge
distillation literature: x2 widens the stages only, x4 also doubles the stem.
ResNet50_cifar is the paper's table 1 with a 3x3 stem at stride 1 and without
its max-pool, RepDistiller's teacher.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax

from kd_jax.models import base, layers
from kd_jax.models.blocks import BasicBlock, Bottleneck, residual_stages


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


_X2 = (16, 32, 64, 128)
_X4 = (32, 64, 128, 256)

resnet8 = functools.partial(ResNetCifar, depth=8)
resnet14 = functools.partial(ResNetCifar, depth=14)
resnet20 = functools.partial(ResNetCifar, depth=20)
resnet32 = functools.partial(ResNetCifar, depth=32)
resnet38 = functools.partial(ResNetCifar, depth=38)
resnet44 = functools.partial(ResNetCifar, depth=44)
resnet56 = functools.partial(ResNetCifar, depth=56)
resnet110 = functools.partial(ResNetCifar, depth=110)
resnet116 = functools.partial(ResNetCifar, depth=116)
resnet200 = functools.partial(ResNetCifar, depth=200)
resnet8x2 = functools.partial(ResNetCifar, depth=8, widths=_X2)
resnet14x2 = functools.partial(ResNetCifar, depth=14, widths=_X2)
resnet38x2 = functools.partial(ResNetCifar, depth=38, widths=_X2)
resnet110x2 = functools.partial(ResNetCifar, depth=110, widths=_X2)
resnet8x4 = functools.partial(ResNetCifar, depth=8, widths=_X4)
resnet14x4 = functools.partial(ResNetCifar, depth=14, widths=_X4)
resnet20x4 = functools.partial(ResNetCifar, depth=20, widths=_X4)
resnet26x4 = functools.partial(ResNetCifar, depth=26, widths=_X4)
resnet32x4 = functools.partial(ResNetCifar, depth=32, widths=_X4)
resnet38x4 = functools.partial(ResNetCifar, depth=38, widths=_X4)
resnet44x4 = functools.partial(ResNetCifar, depth=44, widths=_X4)
resnet56x4 = functools.partial(ResNetCifar, depth=56, widths=_X4)
resnet110x4 = functools.partial(ResNetCifar, depth=110, widths=_X4)
ResNet50_cifar = functools.partial(BottleneckResNetCifar)

# For tests: as deep as a real one, and fast.
_tiny = functools.partial(ResNetCifar, depth=8, widths=(4, 4, 8, 8))
_tiny_wide = functools.partial(ResNetCifar, depth=8, widths=(8, 8, 16, 32))
