"""SRRL: softmax-regression representation learning (Yang et al., ICLR 2021)."""

from typing import ClassVar, final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class SRRL(base.Distiller):
  """Matches the teacher's pooled feature and the logits its head computes."""

  takes_many_teachers: ClassVar[bool] = True

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
    """See `base.Distiller.__call__`; the method's term is "srrl"."""
    terms = self.logit_terms(student, teacher, batch)
    target = base.feature(teacher, "pooled", whose="teacher")
    transfer = connectors.FeatureTransfer(
      axis_name=self.batch_axis, dtype=self.dtype, name="transfer"
    )
    x = transfer(
      base.feature(student, "pooled", whose="student"),
      target.shape[-1],
      train=train,
    )
    terms["srrl"] = losses.srrl_loss(x, teacher_head(x), target, teacher.logits)
    return base.DistillOutput(student.logits, terms)
