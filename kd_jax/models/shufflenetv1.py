"""ShuffleNet for 32x32 images, with 3 groups.

Zhang et al., ShuffleNet: An Extremely Efficient Convolutional Neural Network
for Mobile Devices (CVPR 2018), table 1, with a 1x1 stem at stride 1.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.models import base, layers
from kd_jax.models.blocks import residual_norms
from kd_jax.models.entry import MOBILE_LEARNING_RATE, Entry

_STEM_WIDTH = 24


class ShuffleUnit(nn.Module):
  """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1, and a shortcut.

  At stride 2 the shortcut is average-pooled and joined to the convolutions'
  channels, otherwise it is added. It returns the result before its ReLU.

  Attributes:
    width: channels of the result.
    strides: of the depthwise convolution.
    groups: of the 1x1 convolutions.
    conv: convolution to use.
    norm: normalisation to use.
  """

  width: int
  strides: int
  groups: int
  conv: layers.Conv
  norm: layers.Norm

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    channels = x.shape[-1]
    join = self.strides == 2
    out = self.width - channels if join else self.width
    inner = out // 4
    # The stem's few channels are not worth grouping (section 3.2).
    groups = 1 if channels == _STEM_WIDTH else self.groups
    y = self.conv(x, inner, 1, groups=groups, name="conv1")
    y = layers.relu(self.norm(name="bn1")(y, train=train))
    y = layers.channel_shuffle(y, groups)
    y = self.conv(
      y,
      inner,
      3,
      strides=self.strides,
      padding=1,
      groups=inner,
      name="conv2",
    )
    y = layers.relu(self.norm(name="bn2")(y, train=train))
    y = self.conv(y, out, 1, groups=self.groups, name="conv3")
    y = self.norm(name="bn3")(y, train=train)
    if not join:
      return x + y
    pooled = layers.avg_pool(x, 3, strides=2, padding=1)
    return jnp.concatenate([y, pooled], axis=-1)


class ShuffleNetV1(base.Classifier):
  """Stem and three stages of shuffle units, at 1/2, 1/4 and 1/8 resolution.

  Features: stem_preact, stem, then stageN_preact, stageN, with
  relu(x_preact) = x. The reference's initialisers: PyTorch's defaults.

  Attributes:
    widths: channels of the three stages.
    blocks: units of each stage.
    groups: of the 1x1 convolutions.
  """

  widths: tuple[int, int, int] = (240, 480, 960)
  blocks: tuple[int, int, int] = (4, 8, 4)
  groups: int = 3

  head: ClassVar[str] = "linear"

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """See `Classifier`."""
    conv, norm = self.make_conv(), self.make_norm()
    features = {}
    x = self.prepare(images)
    x = conv(x, _STEM_WIDTH, 1, name="conv1")
    features["stem_preact"] = norm(name="bn1")(x, train=train)
    x = features["stem"] = layers.relu(features["stem_preact"])
    for stage, (width, blocks) in enumerate(
      zip(self.widths, self.blocks), start=1
    ):
      for i in range(blocks):
        unit = ShuffleUnit(
          width,
          2 if i == 0 else 1,
          self.groups,
          conv,
          norm,
          name=f"layer{stage}_{i}",
        )
        preact = unit(x, train=train)
        x = layers.relu(preact)
      features[f"stage{stage}_preact"] = preact
      features[f"stage{stage}"] = x
    return self.finish(features, x)

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `Classifier`."""
    norms = residual_norms(params, self.blocks, "bn3")
    # A stage of one unit ends in channels pooled from the stage before.
    return [
      (
        jnp.pad(scale, (0, width - scale.size)),
        jnp.pad(bias, (0, width - bias.size)),
      )
      for width, (scale, bias) in zip(self.widths, norms, strict=True)
    ]


ENTRIES = {
  "ShuffleV1": Entry(ShuffleNetV1, learning_rate=MOBILE_LEARNING_RATE),
}
