"""Losses as pure functions: arrays in, one value per example out.

Arrays come in the order student, teacher, labels; hyper-parameters are
keyword-only. Everything is computed in float32. No function reduces over the
batch, stops a gradient or applies a weight: that is the caller's line. SP is
relational and returns one scalar for its batch.

>>> import jax, jax.numpy as jnp
>>> from kd_jax.losses import kd_loss
>>> student, teacher = jnp.zeros((2, 3)), jnp.ones((2, 3))
>>> kd_loss(student, teacher, temperature=4.0).shape
(2,)
"""

from kd_jax.losses.at import at_loss
from kd_jax.losses.crd import (
  ClassTable,
  class_table,
  crd_loss,
  crd_normalizer,
  crd_scores,
  crd_update,
  draw_negatives,
  draw_positives,
)
from kd_jax.losses.cross_entropy import cross_entropy_loss
from kd_jax.losses.fitnet import fitnet_loss
from kd_jax.losses.kd import kd_loss
from kd_jax.losses.reviewkd import reviewkd_loss
from kd_jax.losses.semckd import semckd_attention, semckd_loss
from kd_jax.losses.simkd import simkd_loss
from kd_jax.losses.sp import similarity_matrix, sp_loss
from kd_jax.losses.spatial import (
  adaptive_average_pool,
  l2_normalize,
  nearest_resize,
  pool_to_smaller,
)
from kd_jax.losses.srrl import srrl_loss
from kd_jax.losses.vid import vid_loss, vid_variance

__all__ = [
  "ClassTable",
  "adaptive_average_pool",
  "at_loss",
  "class_table",
  "crd_loss",
  "crd_normalizer",
  "crd_scores",
  "crd_update",
  "cross_entropy_loss",
  "draw_negatives",
  "draw_positives",
  "fitnet_loss",
  "kd_loss",
  "l2_normalize",
  "nearest_resize",
  "pool_to_smaller",
  "reviewkd_loss",
  "semckd_attention",
  "semckd_loss",
  "similarity_matrix",
  "simkd_loss",
  "sp_loss",
  "srrl_loss",
  "vid_loss",
  "vid_variance",
]
