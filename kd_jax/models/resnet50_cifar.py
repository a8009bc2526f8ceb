"""ResNet-50 for 32x32 images: no max-pool, and a 3x3 stem at stride 1.

He et al., Deep Residual Learning for Image Recognition (CVPR 2016), table 1,
with the stem that RepDistiller's ResNet50 teacher has.
"""

import functools
from typing import ClassVar

import flax.linen as nn
import jax

from kd_jax.models import base, layers
from kd_jax.models.resnet_cifar import residual_stages

_EXPANSION = 4


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut; the sum before its ReLU.

  Attributes:
    width: a quarter of the result's channels.
    strides: of the 3x3 convolution.
    conv: convolution to use.
    norm: normalisation to use.
    inner_factor: channels inside, in units of `width`.
    groups: of the 3x3 convolution.
    shortcut: what the projection's layers are called.
  """

  width: int
  strides: int
  conv: base.Conv
  norm: base.Norm
  inner_factor: int = 1
  groups: int = 1
  shortcut: str = "shortcut"

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    inner, out = self.inner_factor * self.width, _EXPANSION * self.width
    y = self.conv(x, inner, 1, name="conv1")
    y = layers.relu(self.norm(name="bn1")(y, train=train))
    y = self.conv(
      y,
      inner,
      3,
      strides=self.strides,
      padding=1,
      groups=self.groups,
      name="conv2",
    )
    y = layers.relu(self.norm(name="bn2")(y, train=train))
    y = self.conv(y, out, 1, name="conv3")
    y = self.norm(name="bn3")(y, train=train)
    if self.strides != 1 or x.shape[-1] != out:
      name = self.shortcut
      x = self.conv(x, out, 1, strides=self.strides, name=f"{name}_0")
      x = self.norm(name=f"{name}_1")(x, train=train)
    return x + y


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
    conv = self._conv(kernel_init=layers.kaiming_normal_fan_out)
    norm = self._norm()
    features: dict[str, jax.Array] = {}
    x = self._prepare(images)
    x = conv(x, self.widths[0], 3, padding=1, name="conv1")
    features["stem_preact"] = norm(name="bn1")(x, train=train)
    x = features["stem"] = layers.relu(features["stem_preact"])
    block = functools.partial(Bottleneck, conv=conv, norm=norm)
    x = residual_stages(
      x, features, block, self.blocks, self.widths, train=train
    )
    return self._finish(features, x)


ResNet50_cifar = functools.partial(BottleneckResNetCifar)
