"""CTKD: curriculum temperature (Li et al., AAAI 2023)."""

from typing import final

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base


@final
class CTKD(base.LogitDistiller):
  """KD or DKD at a temperature that learns to make the task harder.

  Attributes:
    start: the lowest temperature.
    span: the highest temperature less the lowest.
    reversal_epochs: epochs over which the temperature's gradient grows from
      nothing to the reverse of the loss's.
    alpha: with `beta`, weights of DKD's parts; both None: KD.
    beta: see `alpha`.
  """

  start: float = 1.0
  span: float = 20.0
  reversal_epochs: int = 10
  alpha: float | None = None
  beta: float | None = None

  def setup(self) -> None:
    """Makes the one number that is learned."""
    self.theta = self.param("theta", nn.initializers.ones, (), jnp.float32)

  def compare(
    self,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    epoch: jax.Array | int,
    axis_name: str | None,
  ) -> jax.Array:
    """See `base.LogitDistiller.compare`."""
    theta = losses.reversed_gradient(
      self.theta, epoch, epochs=self.reversal_epochs
    )
    if self.alpha is None or self.beta is None:
      return losses.ctkd_loss(
        student_logits, teacher_logits, theta, start=self.start, span=self.span
      )
    return losses.dkd_loss(
      student_logits,
      teacher_logits,
      labels,
      temperature=losses.ctkd_temperature(
        theta, start=self.start, span=self.span
      ),
      alpha=self.alpha,
      beta=self.beta,
    )
