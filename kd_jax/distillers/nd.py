"""ND: feature norm and direction, KD++ with "kd" (Wang et al., 2023)."""

from collections.abc import Sequence
from typing import Any, final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class ND(base.Distiller):
  """Pulls pooled features towards the teacher's mean of their class.

  If the teacher has another width, BatchNorm and a linear layer project the
  student's feature. Departure: the authors have dropout between them.
  """

  @property
  def needs_class_means(self) -> bool:
    """Always."""
    return True

  @nn.nowrap
  def teacher_constants(
    self, teachers: Sequence[Any], variables: Sequence[Any]
  ) -> dict[str, jax.Array]:
    """See `base.Distiller.teacher_constants`: the class means [K, C]."""
    del teachers
    given = self.only(variables)
    if base.CLASS_MEANS not in given:
      raise ValueError(
        f"nd: expected the teacher's variables with {base.CLASS_MEANS!r}, a"
        " dict of 'pooled' [num_classes, C], got only"
        f" {', '.join(sorted(given))}"
      )
    return dict(given[base.CLASS_MEANS])

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
    """See `base.Distiller.__call__`; the method's term is "nd"."""
    terms = self.logit_terms(student, teacher, batch)
    target = base.feature(teacher, "pooled", whose="teacher")
    width = target.shape[-1]
    means = self.constant("pooled", (student.logits.shape[-1], width))
    x = base.feature(student, "pooled", whose="student")
    if x.shape[-1] != width:
      x = connectors.NormalizedProjection(
        axis_name=self.batch_axis, dtype=self.dtype, name="projection"
      )(x, width, train=train)
    terms["nd"] = base.over_labels(
      lambda labels: losses.nd_loss(x, target, labels, means), batch
    )
    return base.DistillOutput(student.logits, terms)
