"""CAT-KD: class attention transfer (Guo et al., CVPR 2023)."""

from collections.abc import Sequence
from typing import final

import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class CATKD(base.Distiller):
  """Compares where in an image the networks see each class.

  Both networks must classify the mean of their last map by a linear layer.

  Attributes:
    resolution: regions along a side of the compared maps.
    normalize: whether each class's map is divided by its L2 norm.
  """

  resolution: int = 2
  normalize: bool = False

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
    """See `base.Distiller.distill`; the method's term is "catkd"."""
    head_s = self.required(student_head)
    teacher = self.only(teachers)
    terms = self.logit_terms(student, teacher, batch)
    # The classifier is linear: pooling before it gives the same, for less.
    size = (self.resolution, self.resolution)

    def class_map(
      output: ModelOutputs, head: base.Head, whose: str
    ) -> jax.Array:
      last = base.feature(output, "last", whose=whose)
      return base.without_bias(head, losses.adaptive_average_pool(last, size))

    terms["catkd"] = losses.catkd_loss(
      class_map(student, head_s, "student"),
      class_map(teacher, self.only(teacher_heads), "teacher"),
      resolution=self.resolution,
      normalize=self.normalize,
    )
    return base.DistillOutput(student.logits, terms)
