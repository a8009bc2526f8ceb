"""ResNets for ImageNet, wide ones, and ResNeXt-50.

He et al., Deep Residual Learning for Image Recognition (CVPR 2016), table 1,
with the stride of a bottleneck in its 3x3 convolution; Xie et al., Aggregated
Residual Transformations for Deep Neural Networks (CVPR 2017); Zagoruyko and
Komodakis, Wide Residual Networks (BMVC 2016), section 3. The x2 networks of
basic blocks, all of whose stages have twice the channels, are SimKD's.
"""

import functools
from collections.abc import Callable, Mapping
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


class ResNet(base.Classifier):
  """Stem at 1/4 resolution, four stages at 1/4, 1/8, 1/16 and 1/32.

  Features: stem_preact, stem (both after the max-pool, which commutes with the
  ReLU), then stageN_preact, stageN, with relu(x_preact) = x. The reference's
  initialisers: He normal over the fan-out for convolutions.

  Attributes:
    blocks: number of blocks of each stage.
    bottleneck: whether they are bottlenecks, else basic blocks.
    factor: multiplies the stages' channels in basic blocks, and the channels
      inside in bottlenecks, whose results stay as they are.
    groups: of a bottleneck's 3x3 convolution.
    widths: of the blocks of each stage at factor 1.
    stem_width: channels of the stem.
  """

  blocks: tuple[int, ...] = (2, 2, 2, 2)
  bottleneck: bool = False
  factor: int = 1
  groups: int = 1
  widths: tuple[int, ...] = (64, 128, 256, 512)
  stem_width: int = 64

  head: ClassVar[str] = "fc"

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """See `Classifier`."""
    conv = self.make_conv(kernel_init=layers.kaiming_normal_fan_out)
    norm = self.make_norm()
    features: dict[str, jax.Array] = {}
    x = self.prepare(images)
    x = conv(x, self.stem_width, 7, strides=2, padding=3, name="conv1")
    x = norm(name="bn1")(x, train=train)
    x = features["stem_preact"] = layers.max_pool(x, 3, strides=2, padding=1)
    x = features["stem"] = layers.relu(x)
    widths = self.widths
    block: Callable[..., nn.Module]
    if self.bottleneck:
      block = functools.partial(
        Bottleneck,
        conv=conv,
        norm=norm,
        inner_factor=self.factor,
        groups=self.groups,
        shortcut="downsample",
      )
    else:
      widths = tuple(self.factor * width for width in widths)
      block = functools.partial(BasicBlock, conv=conv, norm=norm)
    x = residual_stages(x, features, block, self.blocks, widths, train=train)
    return self.finish(features, x)

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `Classifier`."""
    norm = "bn3" if self.bottleneck else "bn2"
    return residual_norms(params, self.blocks, norm)


def _resnet(*blocks: int, **fields: Any) -> Entry:
  builder = functools.partial(ResNet, blocks=blocks, **fields)
  return Entry(builder, image_size=224)


ENTRIES = {
  "ResNet18": _resnet(2, 2, 2, 2),
  "ResNet34": _resnet(3, 4, 6, 3),
  "ResNet50": _resnet(3, 4, 6, 3, bottleneck=True),
  "ResNet10x2": _resnet(1, 1, 1, 1, factor=2),
  "ResNet18x2": _resnet(2, 2, 2, 2, factor=2),
  "ResNet34x2": _resnet(3, 4, 6, 3, factor=2),
  "resnext50_32x4d": _resnet(3, 4, 6, 3, bottleneck=True, factor=2, groups=32),
  "wrn_50_2": _resnet(3, 4, 6, 3, bottleneck=True, factor=2),
}
