"""Tf-KD: teacher-free knowledge distillation (Yuan et al., CVPR 2020)."""

from collections.abc import Sequence
from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class TfKD(base.LogitDistiller):
  """Learns from an earlier run of the student, or from a hand-made teacher.

  The teacher may be any network, but the method is meant for one of the
  student's kind. Without a teacher, the labels make one, and `standardize`
  changes nothing.

  Attributes:
    correct_prob: of the label, for the hand-made teacher.
  """

  temperature: float = 20.0
  correct_prob: float = 0.99

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
    return losses.tfkd_loss(
      student_logits, teacher_logits, temperature=self.temperature
    )

  def distill(
    self,
    student: ModelOutputs,
    teachers: Sequence[ModelOutputs],
    batch: base.Batch,
    *,
    teacher_heads: Sequence[base.Head],
    student_head: base.Head | None = None,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> base.DistillOutput:
    """See `base.Distiller.distill`; without a teacher there is no "kd"."""
    if teachers:
      return super().distill(
        student,
        teachers,
        batch,
        teacher_heads=teacher_heads,
        step=step,
        epoch=epoch,
        train=train,
      )
    own = base.over_labels(
      lambda labels: losses.tfkd_regularization(
        student.logits,
        labels,
        temperature=self.temperature,
        correct_prob=self.correct_prob,
      ),
      batch,
    )
    terms = {"ce": self.cross_entropy(student.logits, batch), "tfkd": own}
    return base.DistillOutput(student.logits, terms)
