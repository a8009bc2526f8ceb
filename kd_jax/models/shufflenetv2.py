"""ShuffleNetV2, for ImageNet and for 32x32 images.

Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design (ECCV 2018), table 5. The networks for small images have a 1x1 stem at
stride 1.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.models import base, layers
from kd_jax.models.blocks import residual_norms
from kd_jax.models.entry import MOBILE_LEARNING_RATE, Entry, WeightNames


class SplitUnit(nn.Module):
  """Half of the channels pass, the other half is convolved; then a shuffle.

  It returns the result before its last ReLU, shuffled as the activated one is
  (the passed half comes out of a ReLU already: a second one leaves it).

  Attributes:
    conv: convolution to use.
    norm: normalisation to use.
  """

  conv: layers.Conv
  norm: layers.Norm

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    passed, y = jnp.split(x, 2, axis=-1)
    width = y.shape[-1]
    y = self.conv(y, width, 1, name="conv1")
    y = layers.relu(self.norm(name="bn1")(y, train=train))
    y = self.conv(y, width, 3, padding=1, groups=width, name="conv2")
    y = self.norm(name="bn2")(y, train=train)
    y = self.conv(y, width, 1, name="conv3")
    y = self.norm(name="bn3")(y, train=train)
    return layers.channel_shuffle(jnp.concatenate([passed, y], axis=-1), 2)


class DownUnit(nn.Module):
  """Two convolved branches at half the resolution, joined; then a shuffle.

  It returns the result before its last ReLU.

  Attributes:
    width: channels of the result.
    conv: convolution to use.
    norm: normalisation to use.
  """

  width: int
  conv: layers.Conv
  norm: layers.Norm

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    depthwise = functools.partial(self.conv, strides=2, padding=1)
    channels, half = x.shape[-1], self.width // 2
    left = depthwise(x, channels, 3, groups=channels, name="conv1")
    left = self.norm(name="bn1")(left, train=train)
    left = self.conv(left, half, 1, name="conv2")
    left = self.norm(name="bn2")(left, train=train)
    right = self.conv(x, half, 1, name="conv3")
    right = layers.relu(self.norm(name="bn3")(right, train=train))
    right = depthwise(right, half, 3, groups=half, name="conv4")
    right = self.norm(name="bn4")(right, train=train)
    right = self.conv(right, half, 1, name="conv5")
    right = self.norm(name="bn5")(right, train=train)
    return layers.channel_shuffle(jnp.concatenate([left, right], axis=-1), 2)


class ShuffleNetV2(base.Classifier):
  """Stem, three stages each at half the resolution before, a 1x1 layer.

  Features: stem_preact, stem, then stageN_preact, stageN, with
  relu(x_preact) = x; `last` is the final 1x1 convolution's map after BatchNorm
  and ReLU. The reference's initialisers: PyTorch's defaults.

  Attributes:
    widths: channels of the three stages.
    blocks: split units of each stage, after the one that halves the map.
    last_width: channels of the final 1x1 convolution.
    imagenet: whether the stem is for large images, a 3x3 convolution at stride
      2 and a max-pool (which the stem's features have gone through). Then
      stage3 ends with the final 1x1 convolution, as in SimKD's list, so that
      it is `last`.
  """

  widths: tuple[int, int, int] = (116, 232, 464)
  blocks: tuple[int, int, int] = (3, 7, 3)
  last_width: int = 1024
  imagenet: bool = False

  head: ClassVar[str] = "linear"

  @nn.compact
  def __call__(
    self, images: jax.Array, *, train: bool = False
  ) -> layers.ModelOutputs:
    """See `Classifier`."""
    conv, norm = self.make_conv(), self.make_norm()
    features = {}
    x = self.prepare(images)
    if self.imagenet:
      x = conv(x, 24, 3, strides=2, padding=1, name="conv1")
      x = norm(name="bn1")(x, train=train)
      x = layers.max_pool(x, 3, strides=2, padding=1)
    else:
      x = conv(x, 24, 1, name="conv1")
      x = norm(name="bn1")(x, train=train)
    features["stem_preact"] = x
    x = features["stem"] = layers.relu(x)
    for stage, (width, blocks) in enumerate(
      zip(self.widths, self.blocks), start=1
    ):
      preact = DownUnit(width, conv, norm, name=f"layer{stage}_0")(
        x, train=train
      )
      x = layers.relu(preact)
      for i in range(1, blocks + 1):
        unit = SplitUnit(conv, norm, name=f"layer{stage}_{i}")
        preact = unit(x, train=train)
        x = layers.relu(preact)
      features[f"stage{stage}_preact"] = preact
      features[f"stage{stage}"] = x
    preact = norm(name="bn2")(
      conv(x, self.last_width, 1, name="conv2"), train=train
    )
    x = layers.relu(preact)
    if self.imagenet:
      features["stage3_preact"], features["stage3"] = preact, x
    return self.finish(features, x)

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `Classifier`: a stage's last unit passes half of its channels."""
    blocks = [count + 1 for count in self.blocks]

    def spread(v: jax.Array) -> jax.Array:
      return layers.channel_shuffle(jnp.concatenate([0 * v, v]), 2)

    norms = [
      (spread(scale), spread(bias))
      for scale, bias in residual_norms(params, blocks, "bn3")
    ]
    if self.imagenet:
      norms[-1] = layers.norm_parameters(params, "bn2")
    return norms


def _torchvision_names() -> dict[str, str]:
  """Maps the names of ShuffleV2_Imagenet to torchvision's."""
  table = {
    "conv1": "conv1.0",
    "bn1": "conv1.1",
    "conv2": "conv5.0",
    "bn2": "conv5.1",
    "linear": "fc",
  }
  # Their numbers count the ReLUs.
  left = [f"branch1.{i}" for i in (0, 1, 2, 3)]
  right = [f"branch2.{i}" for i in (0, 1, 3, 4, 5, 6)]
  for stage, count in enumerate(ShuffleNetV2.blocks, start=1):
    for i in range(count + 1):
      for k, theirs in enumerate(right if i else left + right):
        ours = f"{('conv', 'bn')[k % 2]}{k // 2 + 1}"
        table[f"layer{stage}.{i}.{ours}"] = f"stage{stage + 1}.{i}.{theirs}"
  return table


def _shufflenet(**fields: Any) -> Entry:
  builder = functools.partial(ShuffleNetV2, **fields)
  return Entry(builder, learning_rate=MOBILE_LEARNING_RATE)


ENTRIES = {
  "ShuffleV2": _shufflenet(),
  "ShuffleV2_1_5": _shufflenet(widths=(176, 352, 704)),
  "ShuffleV2_Imagenet": dataclasses.replace(
    _shufflenet(imagenet=True),
    image_size=224,
    weight_names=(WeightNames("torchvision and SimKD", _torchvision_names()),),
  ),
}
