"""Augmentation and normalisation on the device: pure functions of arrays.

The standard CIFAR recipe (He et al., Deep Residual Learning, 2016, section
4.2): 4 pixels of zeros on every side, a random crop of the original size, a
horizontal flip half of the time.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def _check_images(images: jax.Array) -> None:
  if images.ndim != 4 or images.dtype != jnp.uint8:
    raise ValueError(
      "images must be uint8 [B, H, W, C], got"
      f" {images.dtype} {tuple(images.shape)}. Augment before normalising."
    )


def draw(
  key: jax.Array, index: jax.Array, *, pad: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws every example's crop and flip from its own key.

  Args:
    key: the step's key.
    index: int32 [B], position in the training set. An example's draw depends
      on `key` and its index alone: not on its place in the batch, on the
      batch's size or on the number of devices.
    pad: pixels of padding.

  Returns:
    Row and column of the crop's corner in the padded image, int32 [B] in
    0..2 pad, and whether to flip, bool [B].
  """
  limits = jnp.array([2 * pad + 1, 2 * pad + 1, 2], jnp.int32)

  def one(i):
    return jax.random.randint(jax.random.fold_in(key, i), (3,), 0, limits)

  drawn = jax.vmap(one)(index)
  return drawn[:, 0], drawn[:, 1], drawn[:, 2] == 1


def crop(
  images: jax.Array, row: jax.Array, column: jax.Array, *, pad: int
) -> jax.Array:
  """Pads with zeros and crops to the original size.

  Args:
    images: [B, H, W, C].
    row: int32 [B], the crop's first row in the padded image.
    column: int32 [B], its first column.
    pad: pixels of zeros on each of the four sides.

  Returns:
    [B, H, W, C]; with row = column = pad, the images themselves.
  """
  size = images.shape[1:]
  padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

  def one(image, y, x):
    return jax.lax.dynamic_slice(image, (y, x, 0), size)

  return jax.vmap(one)(padded, row, column)


def augment(
  key: jax.Array,
  images: jax.Array,
  index: jax.Array,
  *,
  pad: int = 4,
  flip: bool = True,
) -> jax.Array:
  """Random crop of the zero-padded image, then a horizontal flip.

  The zeros are raw (black before normalisation), as in the references.

  Args:
    key: the step's key, the same on every device.
    images: uint8 [B, H, W, C].
    index: int32 [B], position in the training set; see `draw`.
    pad: pixels of zeros on every side; 0 leaves the crop out.
    flip: whether to flip with probability 1/2.

  Returns:
    uint8 [B, H, W, C].

  Raises:
    ValueError: images are not uint8 [B, H, W, C], or index is not [B].
  """
  _check_images(images)
  if index.shape != images.shape[:1]:
    raise ValueError(
      f"index must be [B] = [{images.shape[0]}], one position per image, got"
      f" {tuple(index.shape)}."
    )
  if pad < 0:
    raise ValueError(f"pad must be 0 or more pixels, got {pad}.")
  row, column, flipped = draw(key, index, pad=pad)
  if pad:
    images = crop(images, row, column, pad=pad)
  if flip:
    images = jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)
  return images


def mix(
  key: jax.Array, images: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
  """Mixes every image with its neighbour: rows 2i and 2i + 1 of the batch.

  mixup (Zhang et al., ICLR 2018): x = s x_a + (1 - s) x_b with s from
  Beta(alpha, alpha); CutMix (Yun et al., ICCV 2019): a box of the share 1 - s
  of x_b's area replaces x_a's, and s becomes what is left of x_a. One s and
  one box for a batch, as published; with both, each is taken half of the time.
  Batches come shuffled, so that a neighbour is as random as any, and it is on
  the same device.

  Args:
    key: the step's key, the same on every device.
    images: [B, H, W, C], float, B even.
    mixup: alpha; 0 leaves it out.
    cutmix: alpha; 0 leaves it out.

  Returns:
    The images [B, H, W, C], and s, a float32 scalar: the share of an image's
    own label.

  Raises:
    ValueError: if B is odd, or neither alpha is above 0.
  """
  if len(images) % 2 or max(mixup, cutmix) <= 0:
    raise ValueError(
      "mix: expected an even number of images and an alpha above 0, got"
      f" {len(images)} images, mixup {mixup} and cutmix {cutmix}."
    )
  which_key, share_key, box_key = jax.random.split(key, 3)
  neighbour = partner(images)
  height, width = images.shape[1:3]

  def blend():
    share = jax.random.beta(share_key, mixup, mixup)
    mixed = share * images + (1 - share) * neighbour
    return mixed.astype(images.dtype), share

  def cut():
    share = jax.random.beta(share_key, cutmix, cutmix)
    sides = jnp.sqrt(1 - share) * jnp.array([height, width], jnp.float32)
    centre = jax.random.uniform(box_key, (2,)) * jnp.array([height, width])
    low = jnp.clip(jnp.round(centre - sides / 2), 0, None)
    high = jnp.clip(
      jnp.round(centre + sides / 2), None, jnp.array([height, width])
    )
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside = ((rows >= low[0]) & (rows < high[0]))[:, None] & (
      (columns >= low[1]) & (columns < high[1])
    )
    mixed = jnp.where(inside[:, :, None], neighbour, images)
    return mixed, 1 - jnp.mean(inside.astype(jnp.float32))

  if not cutmix:
    return blend()
  if not mixup:
    return cut()
  return jax.lax.cond(jax.random.bernoulli(which_key), blend, cut)


def partner(x: jax.Array) -> jax.Array:
  """Each row's neighbour: rows 2i and 2i + 1 of [B, ...] exchanged."""
  pairs = x.reshape(-1, 2, *x.shape[1:])
  return pairs[:, ::-1].reshape(x.shape)


def normalize(
  images: jax.Array,
  mean: Sequence[float],
  std: Sequence[float],
  dtype: Any = jnp.float32,
) -> jax.Array:
  """`(x / 255 - mean) / std` per channel, in float32, then cast.

  Args:
    images: uint8 [B, H, W, C].
    mean: of x / 255, C values.
    std: of x / 255, C values.
    dtype: of the result.

  Returns:
    [B, H, W, C] in `dtype`.

  Raises:
    ValueError: images are not uint8 [B, H, W, C], or mean or std have not C
      values.
  """
  _check_images(images)
  channels = images.shape[-1]
  if len(mean) != channels or len(std) != channels:
    raise ValueError(
      f"mean and std must have one value for each of the {channels} channels,"
      f" got {len(mean)} and {len(std)}."
    )
  scaled = images.astype(jnp.float32) / 255.0
  centred = scaled - jnp.asarray(mean, jnp.float32)
  return (centred / jnp.asarray(std, jnp.float32)).astype(dtype)
