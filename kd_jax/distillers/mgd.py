"""MGD: masked generative distillation (Yang et al., ECCV 2022)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.models import layers


@final
class MGD(base.Distiller):
  """Lets a generator make the teacher's last map from a masked student's.

  A 1x1 convolution aligns unequal channels, pooling unequal sizes. Evaluation
  masks nothing.

  A step draws the mask of each example from the random stream "distiller" (one
  key for all devices) and `batch["index"]`, unless the batch has `noise`
  [B, C], uniform in [0, 1), C the teacher's channels.

  Attributes:
    mask_ratio: share of the channels that are masked, in [0, 1).
  """

  mask_ratio: float = 0.15

  @nn.compact
  def __call__(
    self,
    student: layers.ModelOutputs,
    teacher: layers.ModelOutputs,
    batch: base.Batch,
    *,
    teacher_head: base.Head,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> base.DistillOutput:
    """See `base.Distiller.__call__`; the method's term is "mgd"."""
    terms = self.logit_terms(student, teacher, batch)
    x, target = losses.pool_to_smaller(
      base.feature(student, "last", whose="student"),
      base.feature(teacher, "last", whose="teacher"),
    )
    channels = target.shape[-1]

    def conv(x: jax.Array, kernel_size: int, name: str) -> jax.Array:
      return layers.conv(
        x.astype(self.dtype),
        channels,
        kernel_size,
        name=name,
        padding=kernel_size // 2,
        use_bias=True,
        dtype=self.dtype,
      )

    if x.shape[-1] != channels:
      x = conv(x, 1, "align")
    if train and not self.is_initializing():
      x = losses.mgd_mask(
        x, self._noise(batch, channels), ratio=self.mask_ratio
      )
    x = conv(layers.relu(conv(x, 3, "generate1")), 3, "generate2")
    terms["mgd"] = losses.mgd_loss(x, target)
    return base.DistillOutput(student.logits, terms)

  def _noise(self, batch: base.Batch, channels: int) -> jax.Array:
    """[B, C]; each row depends on the step's key and its example only."""
    if "noise" in batch:
      noise: jax.Array = batch["noise"]
      return noise
    if "index" not in batch:
      raise ValueError(
        "mgd: expected batch['index'], the positions of the examples in the "
        f"training set [B], got only {', '.join(sorted(batch))}"
      )
    key = self.make_rng("distiller")

    def draw(index: jax.Array) -> jax.Array:
      return jax.random.uniform(jax.random.fold_in(key, index), (channels,))

    return jax.vmap(draw)(batch["index"])
