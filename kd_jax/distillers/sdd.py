"""SDD: scaled decoupled distillation (Wei et al., CVPR 2024)."""

from collections.abc import Sequence
from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class SDD(base.Distiller):
  """KD, DKD or NKD of the predictions from each region of an image.

  Both networks must classify the mean of their last map, which then is the mean
  of the logits of its positions.

  Attributes:
    scales: numbers of regions along a side.
    alpha: with `beta`, weights of DKD's parts.
    beta: see `alpha`.
    gamma: weight of NKD's second part. All three None: KD.
  """

  scales: tuple[int, ...] = (1, 2, 4)
  alpha: float | None = None
  beta: float | None = None
  gamma: float | None = None

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
    """See `base.Distiller.distill`; the method's term is "sdd"."""
    head_s = self.required(student_head)
    teacher = self.only(teachers)
    terms = self.logit_terms(student, teacher, batch)
    # The classifier is linear: pooling before it gives the same, for less.
    size = (max(self.scales), max(self.scales))

    def class_map(
      output: ModelOutputs, head: base.Head, whose: str
    ) -> jax.Array:
      last = base.feature(output, "last", whose=whose)
      return head(losses.adaptive_average_pool(last, size))

    map_s = class_map(student, head_s, "student")
    map_t = class_map(teacher, self.only(teacher_heads), "teacher")
    terms["sdd"] = base.over_labels(
      lambda labels: losses.sdd_loss(
        map_s,
        map_t,
        labels,
        temperature=self.temperature,
        scales=self.scales,
        alpha=self.alpha,
        beta=self.beta,
        gamma=self.gamma,
        standardize=self.standardize,
      ),
      batch,
    )
    return base.DistillOutput(student.logits, terms)
