"""OFA's exits: classifiers on the stages of a student."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.models import layers

# Side of the grid to which tokens are merged.
SMALLEST_GRID = 7


class SeparableConv(nn.Module):
  """Two depthwise separable 3x3 convolutions, the first at stride 2."""

  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, channels: int, *, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), channels]."""
    for i, (width, strides) in enumerate(((x.shape[-1], 2), (channels, 1))):
      x = layers.conv(
        x,
        x.shape[-1],
        3,
        name=f"depthwise{i}",
        strides=strides,
        padding=1,
        groups=x.shape[-1],
        dtype=self.dtype,
      )
      x = layers.conv(x, width, 1, name=f"pointwise{i}", dtype=self.dtype)
      norm = layers.BatchNorm(
        axis_name=self.axis_name, dtype=self.dtype, name=f"bn{i}"
      )
      x = layers.relu(norm(x, train=train))
    return x


class ExitHead(nn.Module):
  """OFA's exit from a convolutional stage: to the depth of the last, to logits.

  Attributes:
    downs: stages that follow; each is one `SeparableConv`.
    width: channels before the classifier.
    axis_name: of BatchNorm.
    dtype: of the arithmetic.
  """

  downs: int
  width: int
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, classes: int, *, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, classes]."""
    x = x.astype(self.dtype)
    if not self.downs:
      x = layers.conv(
        x, self.width, 1, name="conv", use_bias=True, dtype=self.dtype
      )
    for i in range(self.downs):
      last = i == self.downs - 1
      x = SeparableConv(self.axis_name, self.dtype, name=f"down{i}")(
        x, self.width if last else 2 * x.shape[-1], train=train
      )
    pooled = layers.global_average_pool(x).astype(self.dtype)
    return layers.dense(pooled, classes, name="fc", dtype=self.dtype)


class TokenBlock(nn.Module):
  """A transformer's block: attention and an MLP, each behind a LayerNorm.

  Attributes:
    heads: of the attention; they divide the channels.
    dtype: of the arithmetic.
  """

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, N, C] -> [B, N, C]."""
    batch, count, channels = x.shape
    if channels % self.heads:
      raise ValueError(
        f"expected tokens whose width {self.heads} heads divide, got {channels}"
      )
    size = channels // self.heads
    y = nn.Dense(
      3 * channels,
      use_bias=False,
      kernel_init=layers.torch_default_init,
      dtype=self.dtype,
      name="qkv",
    )(token_norm(x, "norm1", self.dtype))
    y = y.reshape(batch, count, 3, self.heads, size)
    query, key, value = (y[:, :, i] for i in range(3))
    energy = jnp.einsum("bnhd,bmhd->bhnm", query, key) * size**-0.5
    y = jnp.einsum("bhnm,bmhd->bnhd", nn.softmax(energy), value)
    y = y.reshape(batch, count, channels)
    x += layers.dense(y, channels, name="proj", dtype=self.dtype)
    y = token_norm(x, "norm2", self.dtype)
    y = layers.dense(y, 4 * channels, name="fc1", dtype=self.dtype)
    y = nn.gelu(y, approximate=False)
    return x + layers.dense(y, channels, name="fc2", dtype=self.dtype)


class TokenHead(nn.Module):
  """OFA's exit from a stage of tokens: merges patches, attends, to logits.

  Attributes:
    blocks: of attention.
    heads: of each block.
    dtype: of the arithmetic.
  """

  blocks: int
  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, grid: jax.Array, class_token: jax.Array | None, classes: int
  ) -> jax.Array:
    """Reads the class token or, without one, the mean of all tokens.

    Args:
      grid: [B, H, W, C], the tokens of the patches.
      class_token: [B, C], or None.
      classes: number of classes.

    Returns:
      [B, classes].
    """
    x = grid.astype(self.dtype)
    number = 0
    while x.shape[1] >= 2 * SMALLEST_GRID:
      if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(
          "expected a grid of tokens that halves, got"
          f" {x.shape[1]}x{x.shape[2]}; choose other exits"
        )
      x = self._merge(x, number)
      number += 1
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    if class_token is not None:
      first = class_token.astype(self.dtype)[:, None]
      tokens = jnp.concatenate([first, tokens], axis=1)
    for i in range(self.blocks):
      tokens = TokenBlock(self.heads, self.dtype, name=f"block{i}")(tokens)
    pooled = tokens[:, 0] if class_token is not None else jnp.mean(tokens, 1)
    return layers.dense(pooled, classes, name="classifier", dtype=self.dtype)

  def _merge(self, x: jax.Array, number: int) -> jax.Array:
    """Two by two tokens become one of the same width."""
    four = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
    merge = nn.Dense(
      x.shape[-1],
      use_bias=False,
      kernel_init=layers.torch_default_init,
      dtype=self.dtype,
      name=f"merge{number}",
    )
    merged = token_norm(
      jnp.concatenate(four, axis=-1), f"merge{number}_norm", self.dtype
    )
    return nn.gelu(merge(merged), approximate=False)


def token_norm(x: jax.Array, name: str, dtype: Any) -> jax.Array:
  """LayerNorm of each token; call it inside a compact method."""
  norm = nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)
  normed: jax.Array = norm(x)
  return normed
