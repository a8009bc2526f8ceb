"""VID: variational information distillation (Ahn et al., CVPR 2019)."""

from typing import final

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base, connectors
from kd_jax.models.layers import ModelOutputs


@final
class VID(base.FeatureDistiller):
  """Predicts the teacher's stages as Gaussians from the student's.

  Stages are paired from the first. If one network has more stages, its last
  ones are unused, as in the reference toolboxes.

  Attributes:
    initial_variance: of every channel, above 1e-5; the variance is learned.
  """

  initial_variance: float = 5.0

  @nn.compact
  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """See `base.FeatureDistiller.compare`."""
    losses.checks.number(
      "initial_variance", self.initial_variance, above=losses.MIN_VARIANCE
    )
    log_scale = base.inverse_softplus(
      self.initial_variance - losses.MIN_VARIANCE
    )
    total = jnp.zeros(student.logits.shape[0], jnp.float32)
    pairs = zip(*base.paired_stages(student, teacher), strict=True)
    for i, pair in enumerate(pairs, start=1):
      map_s, map_t = losses.pool_to_smaller(*pair)
      regressor = connectors.GaussianRegressor(
        initial_log_scale=log_scale, dtype=self.dtype, name=f"stage{i}"
      )
      mean, scale = regressor(map_s, map_t.shape[-1])
      total += losses.vid_loss(mean, losses.vid_variance(scale), map_t)
    return total
