"""Augmentation and normalisation on the device: pure functions of arrays.

Imports jax only.
"""

from kd_jax.data.augment.crop_flip import augment, crop, draw
from kd_jax.data.augment.mixing import mix, partner
from kd_jax.data.augment.normalization import normalize
from kd_jax.data.augment.rand_augment import (
  cutout,
  rand_augment,
  strong_view,
)

__all__ = [
  "augment",
  "crop",
  "cutout",
  "draw",
  "mix",
  "normalize",
  "partner",
  "rand_augment",
  "strong_view",
]
