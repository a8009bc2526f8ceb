"""Normalisation of uint8 images."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def check_images(images: jax.Array) -> None:
  """Raises ValueError unless images are uint8 [B, H, W, C]."""
  if images.ndim != 4 or images.dtype != jnp.uint8:
    raise ValueError(
      "images must be uint8 [B, H, W, C], got"
      f" {images.dtype} {tuple(images.shape)}. Augment before normalising."
    )


def normalize(
  images: jax.Array,
  mean: Sequence[float],
  std: Sequence[float],
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Computes `(x / 255 - mean) / std` per channel in float32, then casts.

  Args:
    images: uint8 [B, H, W, C].
    mean: of x / 255, C values.
    std: of x / 255, C values.
    dtype: of the result.

  Returns:
    [B, H, W, C] in `dtype`.

  Raises:
    ValueError: images are not uint8 [B, H, W, C], or mean or std do not have
      C values.
  """
  check_images(images)
  channels = images.shape[-1]
  if len(mean) != channels or len(std) != channels:
    raise ValueError(
      f"mean and std must have one value for each of the {channels} channels,"
      f" got {len(mean)} and {len(std)}."
    )
  scaled = images.astype(jnp.float32) / 255.0
  centred = scaled - jnp.asarray(mean, jnp.float32)
  return (centred / jnp.asarray(std, jnp.float32)).astype(dtype)
