"""AB: activation boundaries (Heo et al., AAAI 2019)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class AB(base.FeatureDistiller):
  """Moves the student's activation boundaries to the teacher's.

  Compares the stages before their activation. A connector (convolution and
  BatchNorm) takes a student's map to another shape. Stages are paired from the
  deepest; if one network has more, its first ones are unused.

  The authors train this term alone in a first stage, then cross-entropy.

  Attributes:
    margin: beyond a boundary that a neuron should reach, above 0.
  """

  margin: float = 1.0

  @nn.compact
  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    maps_s = base.preactivations(student, whose="student")
    maps_t = base.preactivations(teacher, whose="teacher")
    pairs = min(len(maps_s), len(maps_t))
    connected, targets = [], []
    for i, (x, target) in enumerate(zip(maps_s[-pairs:], maps_t[-pairs:])):
      if x.shape != target.shape:
        connector = connectors.HintRegressor(
          activation=False,
          axis_name=self.batch_axis,
          dtype=self.dtype,
          name=f"connector{i}",
        )
        x, target = connector(x, target, train=train)
      connected.append(x)
      targets.append(target)
    return losses.ab_loss(connected, targets, margin=self.margin)
