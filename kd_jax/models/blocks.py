"""Residual blocks that several families share.

A block returns its sum before the ReLU: the caller activates, because methods
such as ReviewKD read a stage's last map before activation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from kd_jax.models import layers

_EXPANSION = 4


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut.

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


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions and a shortcut.

  Attributes:
    width: a quarter of the result's channels.
    strides: of the 3x3 convolution.
    conv: convolution to use.
    norm: normalisation to use.
    inner_factor: channels inside, in units of `width`.
    groups: of the 3x3 convolution.
    shortcut: prefix of the names of the projection's layers.
  """

  width: int
  strides: int
  conv: layers.Conv
  norm: layers.Norm
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


def residual_stages(
  x: jax.Array,
  features: dict[str, jax.Array],
  block: Callable[..., nn.Module],
  blocks: Sequence[int],
  widths: Sequence[int],
  *,
  train: bool,
) -> jax.Array:
  """Applies stages of residual blocks; call it in a compact method.

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


def residual_norms(
  params: Mapping[str, Any], blocks: Sequence[int], norm: str
) -> list[tuple[jax.Array, jax.Array]]:
  """See `Classifier.stage_norms`: a norm of the last block of each stage."""
  return [
    layers.norm_parameters(params, f"layer{stage}_{count - 1}", norm)
    for stage, count in enumerate(blocks, start=1)
  ]
