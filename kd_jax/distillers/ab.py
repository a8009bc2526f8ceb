"""AB: activation boundaries (Heo et al., AAAI 2019)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class AB(base.Distiller):
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
  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: base.Batch,
    *,
    teacher_head: base.Head,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> base.DistillOutput:
    """See `base.Distiller.__call__`; the method's term is "ab"."""
    terms = self.logit_terms(student, teacher, batch)
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
    terms["ab"] = losses.ab_loss(connected, targets, margin=self.margin)
    return base.DistillOutput(student.logits, terms)
