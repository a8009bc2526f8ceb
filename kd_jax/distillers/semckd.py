"""SemCKD: semantic calibration across layers (Chen et al., AAAI 2021)."""

from typing import final

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class SemCKD(base.Distiller):
  """Lets each student stage learn from every teacher stage, by attention.

  Queries and keys are computed from rows of the batch's similarity matrix. The
  batch size (of all devices with `sync`, else of one) is therefore part of the
  architecture: it must be divisible by 4 and cannot change after `init`.

  Attributes:
    soft: temperature of the attention.
  """

  soft: float = 1.0

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
    """See `base.Distiller.__call__`; the method's term is "semckd"."""
    terms = self.logit_terms(student, teacher, batch)
    # The embeddings have a fixed batch size; evaluation batches do not.
    if train or self.is_initializing():
      terms["semckd"] = self._loss(student, teacher, train)
    return base.DistillOutput(student.logits, terms)

  def _embed(self, maps: list[jax.Array], name: str) -> jax.Array:
    """Queries or keys [B, layers, width // 4] of a network's stages."""
    axis_name = self.bound(self.batch_axis)
    embeddings = []
    for i, x in enumerate(maps, start=1):
      rows = losses.similarity_matrix(x, axis_name=axis_name)
      self._check_width(rows.shape[1], f"{name}{i}")
      embed = connectors.SimilarityEmbedding(name=f"{name}{i}")
      embeddings.append(embed(rows))
    return jnp.stack(embeddings, axis=1)

  def _check_width(self, width: int, name: str) -> None:
    if width % 4:
      raise ValueError(
        "semckd: expected a batch size divisible by 4 (its embeddings are a "
        f"quarter as wide as the batch), got {width}; change the batch size"
      )
    if not self.is_initializing():
      made_for = self.variables["params"][name]["linear1"]["kernel"].shape[0]
      if made_for != width:
        raise ValueError(
          f"semckd: initialised for batches of {made_for} examples, got "
          f"{width}; the batch size is part of this method's architecture: "
          "keep it (of all devices with sync, else of one)"
        )

  def _loss(
    self, student: ModelOutputs, teacher: ModelOutputs, train: bool
  ) -> jax.Array:
    maps_s = base.stages(student, whose="student")
    maps_t = base.stages(teacher, whose="teacher")
    attention = losses.semckd_attention(
      self._embed(maps_s, "query"), self._embed(maps_t, "key"), soft=self.soft
    )
    projections: list[list[jax.Array]] = []
    targets: list[list[jax.Array]] = []
    for i, map_s in enumerate(maps_s, start=1):
      projections.append([])
      targets.append([])
      for j, map_t in enumerate(maps_t, start=1):
        source, target = losses.pool_to_smaller(map_s, map_t)
        channels = target.shape[-1]
        project = connectors.Bottleneck(
          final_activation=False,
          axis_name=self.batch_axis,
          dtype=self.dtype,
          name=f"project{i}_{j}",
        )
        projections[-1].append(
          project(source, 2 * channels, channels, train=train)
        )
        targets[-1].append(target)
    return losses.semckd_loss(projections, targets, attention)
