"""Learned modules between a student's features and a teacher's.

Each is named after what it does. Initial weights are those of the reference
toolboxes: PyTorch's defaults unless a comment says otherwise.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.losses import (
  adaptive_average_pool,
  l2_normalize,
  nearest_resize,
)
from kd_jax.models import layers

# PyTorch counts the fan of a transposed convolution by its output channels.
transposed_default_init = nn.initializers.variance_scaling(
  1.0 / 3.0, "fan_out", "uniform"
)
# kaiming_uniform(a=1).
kaiming_uniform_a1 = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class HintRegressor(nn.Module):
  """FitNet's regressor: conv, BatchNorm, ReLU onto the teacher's hint.

  AB's connectors leave out the ReLU. The heights of the two maps decide the
  convolution:

  - student twice as high as the teacher: 3x3, stride 2;
  - half as high: transposed 4x4, stride 2;
  - otherwise higher or equal: valid, with a kernel that gives the teacher's
    size;
  - otherwise lower: 3x3, and the teacher's map is pooled to the student's size.

  Attributes:
    activation: whether the ReLU follows.
    axis_name: of BatchNorm.
    dtype: of the arithmetic.
  """

  activation: bool = True
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, student_map: jax.Array, teacher_map: jax.Array, *, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the regressed student map and the target, of one shape."""
    height, width = student_map.shape[1:3]
    height_t, width_t, channels = teacher_map.shape[1:]
    x = student_map.astype(self.dtype)
    if 2 * height == height_t:
      fan_in = channels * 16
      x = nn.ConvTranspose(
        channels,
        (4, 4),
        strides=(2, 2),
        padding=((2, 2), (2, 2)),
        kernel_init=transposed_default_init,
        bias_init=layers.uniform_bias_init(fan_in),
        dtype=self.dtype,
        name="deconv",
      )(x)
    elif height >= height_t and height != 2 * height_t:
      if width < width_t:
        raise ValueError(
          f"a student map of {height}x{width} cannot be regressed to "
          f"{height_t}x{width_t}; choose other layers or another pair"
        )
      kernel = (1 + height - height_t, 1 + width - width_t)
      fan_in = kernel[0] * kernel[1] * x.shape[-1]
      x = nn.Conv(
        channels,
        kernel,
        padding="VALID",
        kernel_init=layers.torch_default_init,
        bias_init=layers.uniform_bias_init(fan_in),
        dtype=self.dtype,
        name="conv",
      )(x)
    else:
      strides = 2 if height == 2 * height_t else 1
      x = layers.conv(
        x,
        channels,
        3,
        name="conv",
        strides=strides,
        padding=1,
        use_bias=True,
        dtype=self.dtype,
      )
    x = layers.BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="bn")(
      x, train=train
    )
    target = adaptive_average_pool(teacher_map, (x.shape[1], x.shape[2]))
    return layers.relu(x) if self.activation else x, target


class GaussianRegressor(nn.Module):
  """VID's regressor: three 1x1 convolutions, and a variance per channel.

  Attributes:
    initial_log_scale: of every channel; see `losses.vid_variance`.
    dtype: of the convolutions.
  """

  initial_log_scale: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, channels: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the mean [B, H, W, channels] and the log scale [channels]."""
    x = x.astype(self.dtype)
    for i in (1, 2, 3):
      x = layers.conv(x, channels, 1, name=f"conv{i}", dtype=self.dtype)
      x = layers.relu(x) if i < 3 else x
    log_scale = self.param(
      "log_scale",
      nn.initializers.constant(self.initial_log_scale),
      (channels,),
      jnp.float32,
    )
    return x, log_scale


class UnitEmbedding(nn.Module):
  """CRD's embedding: a linear layer onto the unit sphere."""

  dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, C] -> [B, dim] float32, rows of length 1."""
    x = layers.dense(
      x.astype(self.dtype), self.dim, name="linear", dtype=self.dtype
    )
    return l2_normalize(x.astype(jnp.float32))


class SimilarityEmbedding(nn.Module):
  """SemCKD's query or key: an MLP on rows of the batch's similarity matrix."""

  @nn.compact
  def __call__(self, rows: jax.Array) -> jax.Array:
    """[B, width] -> [B, width // 4] float32, rows of length 1."""
    dim = rows.shape[-1] // 4
    # Always float32: inner products of whole maps span many magnitudes.
    x = layers.relu(layers.dense(rows, 2 * dim, name="linear1"))
    return l2_normalize(layers.dense(x, dim, name="linear2"))


class Bottleneck(nn.Module):
  """1x1, 3x3, 1x1 convolutions with BatchNorm and ReLU between them.

  SimKD's projector ends in BatchNorm and ReLU, SemCKD's in the convolution.

  Attributes:
    final_activation: whether BatchNorm and ReLU follow the last convolution.
    axis_name: of BatchNorm.
    dtype: of the arithmetic.
  """

  final_activation: bool
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, middle: int, channels: int, *, train: bool
  ) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, channels]."""
    x = x.astype(self.dtype)
    for i, (width, kernel) in enumerate(
      ((middle, 1), (middle, 3), (channels, 1)), start=1
    ):
      x = layers.conv(
        x,
        width,
        kernel,
        name=f"conv{i}",
        padding=kernel // 2,
        dtype=self.dtype,
      )
      if i < 3 or self.final_activation:
        x = layers.BatchNorm(
          axis_name=self.axis_name, dtype=self.dtype, name=f"bn{i}"
        )(x, train=train)
        x = layers.relu(x)
    return x


class FeatureTransfer(nn.Module):
  """SRRL's connector: 1x1 convolution, BatchNorm, ReLU on a pooled feature."""

  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, channels: int, *, train: bool) -> jax.Array:
    """[B, C] -> [B, channels]."""
    x = x.astype(self.dtype)[:, None, None]
    x = layers.conv(x, channels, 1, name="conv", dtype=self.dtype)
    x = layers.BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="bn")(
      x, train=train
    )
    return layers.relu(x)[:, 0, 0]


class LinearConnector(nn.Module):
  """OFD's connector: 1x1 convolution and BatchNorm, He normal over fan-out."""

  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, channels: int, *, train: bool) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, channels]."""
    x = layers.conv(
      x.astype(self.dtype),
      channels,
      1,
      name="conv",
      kernel_init=layers.kaiming_normal_fan_out,
      dtype=self.dtype,
    )
    return layers.BatchNorm(
      axis_name=self.axis_name, dtype=self.dtype, name="bn"
    )(x, train=train)


class NormalizedProjection(nn.Module):
  """ND's projection: BatchNorm and a linear layer on a pooled feature."""

  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, channels: int, *, train: bool) -> jax.Array:
    """[B, C] -> [B, channels]."""
    x = layers.BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="bn")(
      x, train=train
    )
    return layers.dense(
      x,
      channels,
      name="linear",
      bias_init=nn.initializers.zeros,
      dtype=self.dtype,
    )


class AttentionFusion(nn.Module):
  """ReviewKD's ABF: fuses a level with the deeper ones and projects it.

  Attributes:
    middle: channels in which levels are fused.
    axis_name: of BatchNorm.
    dtype: of the arithmetic.
  """

  middle: int
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    residual: jax.Array | None,
    size: tuple[int, int],
    channels: int,
    *,
    train: bool,
  ) -> tuple[jax.Array, jax.Array]:
    """Fuses one level.

    Args:
      x: [B, H, W, C], the student's map.
      residual: from the deeper level, or None for the deepest.
      size: (height, width) of the teacher's map.
      channels: the teacher's.
      train: whether BatchNorm uses the batch's statistics.

    Returns:
      The projection [B, *size, channels] and the residual to pass on.
    """

    def conv_bn(
      x: jax.Array, width: int, kernel: int, number: int
    ) -> jax.Array:
      x = layers.conv(
        x,
        width,
        kernel,
        name=f"conv{number}",
        padding=kernel // 2,
        kernel_init=kaiming_uniform_a1,
        dtype=self.dtype,
      )
      return layers.BatchNorm(
        axis_name=self.axis_name, dtype=self.dtype, name=f"bn{number}"
      )(x, train=train)

    x = conv_bn(x.astype(self.dtype), self.middle, 1, 1)
    if residual is not None:
      residual = nearest_resize(residual, (x.shape[1], x.shape[2]))
      both = jnp.concatenate([x, residual], axis=-1)
      weights = nn.sigmoid(
        layers.conv(
          both, 2, 1, name="attention", use_bias=True, dtype=self.dtype
        )
      )
      x = x * weights[..., :1] + residual * weights[..., 1:]
    x = nearest_resize(x, size)
    return conv_bn(x, channels, 3, 2), x


class FactorEncoder(nn.Module):
  """FT's translator, and the encoder of its paraphraser.

  Three 3x3 convolutions, each followed by a leaky ReLU.

  Attributes:
    normalize: whether BatchNorm follows each convolution.
    axis_name: of BatchNorm.
    dtype: of the arithmetic.
  """

  normalize: bool
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, channels: int, *, train: bool) -> jax.Array:
    """[B, H, W, C] -> the factor [B, H, W, channels]."""
    x = x.astype(self.dtype)
    for i, width in enumerate((x.shape[-1], channels, channels), start=1):
      x = layers.conv(
        x,
        width,
        3,
        name=f"conv{i}",
        padding=1,
        use_bias=True,
        dtype=self.dtype,
      )
      if self.normalize:
        x = layers.BatchNorm(
          axis_name=self.axis_name, dtype=self.dtype, name=f"bn{i}"
        )(x, train=train)
      x = nn.leaky_relu(x, _FACTOR_SLOPE)
    return x


# Of FT's leaky ReLUs.
_FACTOR_SLOPE = 0.1


class Paraphraser(nn.Module):
  """FT's autoencoder of the teacher's last map, without BatchNorm.

  Attributes:
    dtype: of the arithmetic.
  """

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, channels: int
  ) -> tuple[jax.Array, jax.Array]:
    """[B, H, W, C] -> the factor [B, H, W, channels] and the map made of it."""
    encoder = FactorEncoder(normalize=False, dtype=self.dtype, name="encoder")
    factor = y = encoder(x, channels, train=False)
    for i, width in enumerate((channels, x.shape[-1], x.shape[-1]), start=1):
      y = nn.ConvTranspose(
        width,
        (3, 3),
        padding=((1, 1), (1, 1)),
        kernel_init=transposed_default_init,
        bias_init=layers.uniform_bias_init(9 * width),
        dtype=self.dtype,
        name=f"deconv{i}",
      )(y)
      y = nn.leaky_relu(y, _FACTOR_SLOPE)
    return factor, y
