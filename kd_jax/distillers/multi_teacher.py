"""Several teachers of one student: the weighted mean of a method's terms."""

from collections.abc import Sequence
from typing import final

import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models.layers import ModelOutputs


@final
class MultiTeacher(base.Distiller):
  """A method with a copy of its learned modules for each teacher.

  Terms are means over the teachers. So are the logits of a method that
  predicts with its teacher's classifier: they are linear in the pooled maps,
  so a single classifier on all pooled maps, concatenated, gives the same.

  Attributes:
    members: the method, once for each teacher.
    weights: of the teachers, with the sum 1.
  """

  members: tuple[base.Distiller, ...] = ()
  weights: tuple[float, ...] = ()

  @property
  def predicts_with_teacher_head(self) -> bool:
    """As the method does."""
    return self.members[0].predicts_with_teacher_head

  def _mean(self, values: list[jax.Array]) -> jax.Array:
    total = self.weights[0] * values[0]
    for weight, value in zip(self.weights[1:], values[1:], strict=True):
      total += weight * value
    return total

  def last_map(
    self,
    student: ModelOutputs,
    teachers: Sequence[ModelOutputs],
    *,
    train: bool = False,
  ) -> jax.Array:
    """See `base.Distiller.last_map`: the members' maps, channels concatenated.

    They are pooled to the smallest size, which must divide the others: then
    the global average does not change.

    Raises:
      ValueError: if their sizes do not divide each other.
    """
    maps = [
      member.last_map(student, (teacher,), train=train)
      for member, teacher in zip(self.members, teachers, strict=True)
    ]
    sizes = [(x.shape[1], x.shape[2]) for x in maps]
    smallest = min(sizes)
    if any(h % smallest[0] or w % smallest[1] for h, w in sizes):
      raise ValueError(
        "several teachers: expected last maps of one size, or of sizes that"
        f" divide each other, got {' and '.join(f'{h}x{w}' for h, w in sizes)}."
        " Choose other teachers"
      )
    pooled = [losses.adaptive_average_pool(x, smallest) for x in maps]
    return jnp.concatenate(pooled, axis=-1)

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
    """See `base.Distiller.distill`."""
    outputs = [
      member.distill(
        student,
        (teacher,),
        batch,
        teacher_heads=(head,),
        student_head=student_head,
        step=step,
        epoch=epoch,
        train=train,
      )
      for member, teacher, head in zip(
        self.members, teachers, teacher_heads, strict=True
      )
    ]
    logits = student.logits
    if self.predicts_with_teacher_head:
      logits = self._mean([output.logits for output in outputs])
    return base.DistillOutput(
      logits,
      {
        name: self._mean([output.terms[name] for output in outputs])
        for name in outputs[0].terms
      },
    )
