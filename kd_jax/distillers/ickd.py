"""ICKD: inter-channel correlation (Liu et al., ICCV 2021)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models import layers


@final
class ICKD(base.FeatureDistiller):
  """Compares how the channels of the last maps correlate.

  A convolution and BatchNorm embed the student's map into the teacher's
  channels.

  Attributes:
    kernel_size: of that convolution, odd; the authors take 1 on CIFAR, 3 on
      ImageNet.
  """

  kernel_size: int = 1

  @nn.compact
  def compare(
    self,
    student: layers.ModelOutputs,
    teacher: layers.ModelOutputs,
    *,
    train: bool,
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    if losses.checks.count("kernel_size", self.kernel_size) % 2 == 0:
      raise ValueError(
        f"kernel_size: expected an odd number, got {self.kernel_size}"
      )
    target = base.feature(teacher, "last", whose="teacher")
    x = base.feature(student, "last", whose="student").astype(self.dtype)
    x = layers.conv(
      x,
      target.shape[-1],
      self.kernel_size,
      name="conv",
      padding=self.kernel_size // 2,
      dtype=self.dtype,
    )
    x = layers.BatchNorm(
      axis_name=self.batch_axis, dtype=self.dtype, name="bn"
    )(x, train=train)
    return losses.ickd_loss(x, target)
