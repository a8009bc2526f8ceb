"""SimKD: the reused teacher classifier (Chen et al., CVPR 2022)."""

from collections.abc import Sequence
from typing import ClassVar, final

import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs, global_average_pool


@final
class SimKD(base.Distiller):
  """Projects the student's last map onto the teacher's.

  The prediction is the teacher's classifier on the pooled projection. The
  method needs no other term: the usual weights of "ce" and "kd" are 0, since
  they train the student's own classifier, which is unused.

  Attributes:
    factor: reduction of the teacher's channels in the projector's middle.
    student_map: name of the student's feature that is projected. None takes
      its last stage, as the reference does; MobileNetV2 and ShuffleNetV2 have
      one more layer before "last".
  """

  factor: int = 2
  student_map: str | None = None

  takes_many_teachers: ClassVar[bool] = True

  @property
  def predicts_with_teacher_head(self) -> bool:
    """True: see `base.Distiller`."""
    return True

  def setup(self) -> None:
    """Makes the projector, which reads its sizes from its inputs."""
    self.projector = connectors.Bottleneck(
      final_activation=True, axis_name=self.batch_axis, dtype=self.dtype
    )

  def _student_map(self, student: ModelOutputs) -> jax.Array:
    if self.student_map is None:
      return base.stages(student, whose="student")[-1]
    return base.feature(student, self.student_map, whose="student")

  def _project(
    self, map_s: jax.Array, map_t: jax.Array, train: bool
  ) -> jax.Array:
    """P(f_s) at the smaller of both sizes; `map_t` gives only its shape."""
    channels = map_t.shape[-1]
    if not 1 <= self.factor <= channels:
      raise ValueError(
        f"factor: expected 1 to {channels}, the teacher's channels, got "
        f"{self.factor}"
      )
    if map_s.shape[1] > map_t.shape[1]:
      map_s = losses.adaptive_average_pool(
        map_s, (map_t.shape[1], map_t.shape[2])
      )
    return self.projector(map_s, channels // self.factor, channels, train=train)

  def last_map(
    self,
    student: ModelOutputs,
    teachers: Sequence[ModelOutputs],
    *,
    train: bool = False,
  ) -> jax.Array:
    """See `base.Distiller.last_map`: the projection onto the teacher's map."""
    map_s = self._student_map(student)
    map_t = base.feature(self.only(teachers), "last", whose="teacher")
    return self._project(map_s, map_t, train)

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
    """See `base.Distiller.__call__`; the method's term is "simkd"."""
    terms = self.logit_terms(student, teacher, batch)
    projected = self.last_map(student, (teacher,), train=train)
    map_t = base.feature(teacher, "last", whose="teacher")
    target = losses.adaptive_average_pool(
      map_t, (projected.shape[1], projected.shape[2])
    )
    terms["simkd"] = losses.simkd_loss(projected, target)
    logits = teacher_head(global_average_pool(projected))
    return base.DistillOutput(logits, terms)
