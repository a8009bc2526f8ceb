"""ResNets for 32x32 images, and their x2 and x4 widths.

He et al., Deep Residual Learning for Image Recognition (CVPR 2016), section
4.2, with projection shortcuts. The widened ones are those of the knowledge
distillation literature: x2 widens the stages only, x4 also doubles the stem.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar

import flax.linen as nn
import jax

from kd_jax.models import base, layers


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut.

  It returns the sum before its ReLU: the caller activates, because methods
  such as ReviewKD look at a stage's last map before activation.

  Attributes:
    width: channels of the result.
    strides: of the first convolution.
    conv: convolution to use.
    norm: normalisation to use.
  """

  width: int
  strides: int
  conv: base.Conv
  norm: base.Norm

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    y = self.conv(
      x, self.width, 3, strides=self.strides, padding=1, name="conv1"
    )
    y = layers.relu(self.norm(name="bn1")(y, train=train))
    y = self.conv(y, self.width, 3, padding=1, name="conv2")
    y = self.norm(name="bn2")(y, train=train)
    if self.strides != 1 or x.shape[-1] != self.width:
      x = self.conv(x, self.width, 1, strides=self.strides, name="downsample_0")
      x = self.norm(name="downsample_1")(x, train=train)
    return x + y


def residual_stages(
  x: jax.Array,
  features: dict[str, jax.Array],
  block: Callable[..., nn.Module],
  blocks: Sequence[int],
  widths: Sequence[int],
  *,
  train: bool,
) -> jax.Array:
  """Stages of residual blocks; call it in a compact method.

  All stages but the first halve the resolution in their first block.

  Args:
    x: [B, H, W, C], the map before stage 1.
    features: receives stageN_preact and stageN, the last block's map before
      and after its ReLU.
    block: `block(width, strides, name=...)`, a module that returns its sum
      before the ReLU.
    blocks: number of blocks of each stage.
    widths: of each stage's blocks.
    train: passed to the blocks.

  Returns:
    The last stage's map.
  """
  stages = zip(blocks, widths, strict=True)
  for stage, (count, width) in enumerate(stages, start=1):
    for i in range(count):
      strides = 2 if stage > 1 and i == 0 else 1
      preact = block(width, strides, name=f"layer{stage}_{i}")(x, train=train)
      x = layers.relu(preact)
    features[f"stage{stage}_preact"] = preact
    features[f"stage{stage}"] = x
  return x


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
    conv = self._conv(kernel_init=layers.kaiming_normal_fan_out)
    norm = self._norm()
    features: dict[str, jax.Array] = {}
    x = self._prepare(images)
    x = conv(x, self.widths[0], 3, padding=1, name="conv1")
    features["stem_preact"] = norm(name="bn1")(x, train=train)
    x = features["stem"] = layers.relu(features["stem_preact"])
    block = functools.partial(BasicBlock, conv=conv, norm=norm)
    blocks = 3 * ((self.depth - 2) // 6,)
    x = residual_stages(
      x, features, block, blocks, self.widths[1:], train=train
    )
    return self._finish(features, x)


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

# For tests: as deep as a real one, and fast.
_tiny = functools.partial(ResNetCifar, depth=8, widths=(4, 4, 8, 8))
_tiny_wide = functools.partial(ResNetCifar, depth=8, widths=(8, 8, 16, 32))
