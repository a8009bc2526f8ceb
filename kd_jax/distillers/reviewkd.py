"""ReviewKD: knowledge review (Chen et al., CVPR 2021)."""

from typing import final

import flax.linen as nn
import jax

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class ReviewKD(base.FeatureDistiller):
  """Teaches every stage, fused with the student's deeper stages.

  Levels are the stages and the pooled feature as a 1x1 map. The teacher's
  stages are taken before their activation if the network has them
  (`stage1_preact`..). The warm-up of the weight is set in the config.

  Attributes:
    max_mid: upper bound of the channels in which levels are fused, which are
      those of the student's pooled feature.
  """

  max_mid: int = 512

  @nn.compact
  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    maps_s = base.stages(student, whose="student")
    maps_t = base.preactivations(teacher, whose="teacher")
    if len(maps_s) != len(maps_t):
      raise ValueError(
        "reviewkd: expected equally many stages, each level teaches its "
        f"counterpart, got {len(maps_s)} (student) and {len(maps_t)} "
        "(teacher); choose another pair or method"
      )
    pooled_s = base.feature(student, "pooled", whose="student")
    pooled_t = base.feature(teacher, "pooled", whose="teacher")
    maps_s.append(pooled_s[:, None, None])
    maps_t.append(pooled_t[:, None, None])
    max_mid = losses.checks.count("max_mid", self.max_mid)
    middle = min(max_mid, pooled_s.shape[-1])
    outputs: list[jax.Array] = []
    residual: jax.Array | None = None
    for i in reversed(range(len(maps_s))):
      fuse = connectors.AttentionFusion(
        middle=middle,
        axis_name=self.batch_axis,
        dtype=self.dtype,
        name=f"level{i + 1}",
      )
      _, height, width, channels = maps_t[i].shape
      output, residual = fuse(
        maps_s[i], residual, (height, width), channels, train=train
      )
      outputs.insert(0, output)
    return losses.reviewkd_loss(outputs, maps_t)
