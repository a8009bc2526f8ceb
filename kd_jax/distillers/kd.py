"""KD: the teacher's softened logits (Hinton et al., 2015)."""

from typing import ClassVar, final

import jax

from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class KD(base.Distiller):
  """The terms "ce" and "kd", which every method with a teacher has."""

  takes_many_teachers: ClassVar[bool] = True

  @property
  def needs_logits_only(self) -> bool:
    """Always."""
    return True

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
    """See `base.Distiller.__call__`."""
    return base.DistillOutput(
      student.logits, self.logit_terms(student, teacher, batch)
    )
