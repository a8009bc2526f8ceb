"""Wide residual networks for 32x32 images, without dropout.

Zagoruyko and Komodakis, Wide Residual Networks (BMVC 2016), table 1.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax

from kd_jax.models import base, layers
from kd_jax.models.entry import Entry


class PreactivationBlock(nn.Module):
  """BatchNorm, ReLU, 3x3 convolution, twice, and a shortcut.

  It returns the sum, and its input after the first BatchNorm: that is the
  pre-activation of whatever map the block was given.

  Attributes:
    width: channels of the result.
    strides: of the first convolution.
    conv: convolution to use.
    norm: normalisation to use.
  """

  width: int
  strides: int
  conv: layers.Conv
  norm: layers.Norm

  @nn.compact
  def __call__(
    self, x: jax.Array, *, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    preact = self.norm(name="bn1")(x, train=train)
    activated = layers.relu(preact)
    y = self.conv(
      activated, self.width, 3, strides=self.strides, padding=1, name="conv1"
    )
    y = layers.relu(self.norm(name="bn2")(y, train=train))
    y = self.conv(y, self.width, 3, padding=1, name="conv2")
    if x.shape[-1] != self.width:
      # A block that changes the width projects the activated input, the
      # others pass the raw sum on.
      x = self.conv(
        activated, self.width, 1, strides=self.strides, name="convShortcut"
      )
    return x + y, preact


class WideResNet(base.Classifier):
  """Stem and three stages of pre-activation blocks, then BatchNorm and ReLU.

  Features: the reference's, `stem` (the first convolution) and `stageN` (the
  raw sums), have either sign; `stem_preact` and `stageN_preact` are those maps
  after the BatchNorm that follows them, just before a ReLU. `last` is
  relu(stage3_preact). The reference's initialisers: He normal over the fan-out
  for convolutions, and zeros for the classifier's bias.

  Attributes:
    depth: number of weighted layers, 6n + 4.
    widen: factor of the stages' channels.
  """

  depth: int = 16
  widen: int = 1

  head: ClassVar[str] = "fc"

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """See `Classifier`."""
    if self.depth < 10 or self.depth % 6 != 4:
      raise ValueError(
        "The depth of a wide ResNet is 6n + 4 (10, 16, 22, ...), got"
        f" {self.depth}."
      )
    conv = self.make_conv(kernel_init=layers.kaiming_normal_fan_out)
    norm = self.make_norm()
    features = {}
    x = self.prepare(images)
    x = features["stem"] = conv(x, 16, 3, padding=1, name="conv1")
    before = "stem"
    for stage, width in enumerate((16, 32, 64), start=1):
      for i in range((self.depth - 4) // 6):
        strides = 2 if stage > 1 and i == 0 else 1
        block = PreactivationBlock(
          width * self.widen,
          strides,
          conv,
          norm,
          name=f"block{stage}_layer_{i}",
        )
        x, preact = block(x, train=train)
        if i == 0:
          features[f"{before}_preact"] = preact
      before = f"stage{stage}"
      features[before] = x
    features[f"{before}_preact"] = norm(name="bn1")(x, train=train)
    return self.finish(
      features,
      layers.relu(features[f"{before}_preact"]),
      bias_init=nn.initializers.zeros,
    )

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `Classifier`: a stage's ReLU is in the next stage."""
    paths = [("block2_layer_0", "bn1"), ("block3_layer_0", "bn1"), ("bn1",)]
    return [layers.norm_parameters(params, *path) for path in paths]


ENTRIES = {
  name: Entry(functools.partial(WideResNet, depth=depth, widen=widen))
  for name, (depth, widen) in {
    "wrn_16_1": (16, 1),
    "wrn_16_2": (16, 2),
    "wrn_40_1": (40, 1),
    "wrn_40_2": (40, 2),
  }.items()
}
