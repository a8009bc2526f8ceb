"""MLKD: multi-level logit distillation (Jin et al., CVPR 2023)."""

from typing import Any, final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class MLKD(base.Distiller):
  """Aligns predictions at several levels and temperatures, over two views.

  The weak view is compared by example, by pairs of examples and by pairs of
  classes; the strong one by example. "ce" is the sum over both views, "kd" that
  of the weak one. With `sync`, the batch is the global one. `standardize` acts
  on the comparison by example.

  Attributes:
    other_temperatures: besides `temperature`.
  """

  other_temperatures: tuple[float, ...] = (3.0, 5.0, 2.0, 6.0)

  @property
  def views(self) -> int:
    """The weak one and the strong one."""
    return 2

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
    """See `base.Distiller.__call__`.

    Raises:
      ValueError: if `train`, and the batch has no strong view.
    """
    terms = self.logit_terms(student, teacher, batch)
    if "strong_student" not in batch:
      if train:
        raise ValueError(
          "mlkd: expected the outputs of a strong view in the batch"
          " ('strong_student' and 'strong_teachers'), got none. Build the step"
          " with a strong_transform"
        )
      return base.DistillOutput(student.logits, terms)
    strong_student: ModelOutputs = batch["strong_student"]
    strong_teacher: ModelOutputs = self.only(batch["strong_teachers"])
    temperatures: dict[str, Any] = {
      "temperature": self.temperature,
      "other_temperatures": self.other_temperatures,
    }
    by_example = sum(
      losses.mlkd_loss(
        *self.compared_logits(ours, theirs),
        **temperatures,
        batch=0.0,
        classes=0.0,
      )
      for ours, theirs in (
        (student, teacher),
        (strong_student, strong_teacher),
      )
    )
    in_pairs = losses.mlkd_loss(
      student.logits,
      teacher.logits,
      **temperatures,
      instance=0.0,
      axis_name=self.relational_axis(train),
    )
    terms["ce"] += self.cross_entropy(strong_student.logits, batch)
    return base.DistillOutput(
      student.logits, {**terms, "mlkd": by_example + in_pairs}
    )
