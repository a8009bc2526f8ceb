"""RandAugment and Cutout on uint8 images.

RandAugment (Cubuk et al., "RandAugment: Practical Automated Data Augmentation
with a Reduced Search Space", 2020) with the operations and magnitudes of
`torchvision.transforms.RandAugment` on Pillow images: nearest neighbours, black
where an image ends. The arithmetic is in integers, so that every device makes
the same images.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.data.augment import crop_flip
from kd_jax.data.augment.normalization import check_images

OPERATIONS = (
  *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
  *("Brightness", "Color", "Contrast", "Sharpness", "Posterize", "Solarize"),
  *("AutoContrast", "Equalize"),
)
# Pillow's coordinates have 16 bits after the point.
_ONE = 1 << 16
# Greatest magnitudes: a slope, a share of the image's side, degrees, a change
# of a blend's factor in tenths, and bits that are dropped.
_SHEAR, _TRANSLATE, _DEGREES, _TENTHS, _BITS = 0.3, 150 / 331, 30.0, 9, 4
# ITU-R 601-2 luma in 1 / 2^16, as Pillow rounds it.
_LUMA = (19595, 38470, 7471)


def rand_augment(
  key: jax.Array,
  images: jax.Array,
  index: jax.Array,
  *,
  num_ops: int = 2,
  magnitude: int = 10,
  num_magnitude_bins: int = 31,
) -> jax.Array:
  """Applies random operations, each image its own, one after the other.

  Args:
    key: the step's key, the same on every device.
    images: uint8 [B, H, W, C], of 1 or 3 channels.
    index: int32 [B], position in the training set; an image's draw depends on
      `key` and its index alone.
    num_ops: operations for each image, drawn with replacement from the 14.
    magnitude: their strength, from 0 to `num_magnitude_bins - 1`.
    num_magnitude_bins: number of strengths.

  Returns:
    uint8 [B, H, W, C].

  Raises:
    ValueError: for other images, or a magnitude out of its range.
  """
  check_images(images)
  limits = jnp.array([len(OPERATIONS), 2], jnp.int32)

  def draw(i: jax.Array) -> jax.Array:
    own = jax.random.fold_in(key, i)
    return jax.random.randint(own, (num_ops, 2), 0, limits)

  for drawn in jnp.moveaxis(jax.vmap(draw)(index), 1, 0):
    images = apply_operations(
      images,
      drawn[:, 0],
      drawn[:, 1] == 1,
      magnitude=magnitude,
      num_magnitude_bins=num_magnitude_bins,
    )
  return images


def apply_operations(
  images: jax.Array,
  operation: jax.Array,
  negative: jax.Array,
  *,
  magnitude: int = 10,
  num_magnitude_bins: int = 31,
) -> jax.Array:
  """Applies one operation to each image.

  Equal to Pillow, but for Brightness, Color, Contrast, Sharpness and
  AutoContrast: there Pillow cuts off floating-point numbers, which can cost a
  grey level where the exact result is whole.

  Args:
    images: see `rand_augment`.
    operation: int32 [B], an index of `OPERATIONS`.
    negative: bool [B], whether the magnitude of an operation that has a sign
      is below 0: a shear, a shift, a turn (clockwise) or less of something.
    magnitude: see `rand_augment`.
    num_magnitude_bins: see `rand_augment`.

  Returns:
    uint8 [B, H, W, C].

  Raises:
    ValueError: see `rand_augment`.
  """
  check_images(images)
  if images.shape[-1] not in (1, 3):
    raise ValueError(
      f"RandAugment: expected 1 or 3 channels, got {images.shape[-1]}."
    )
  bins = num_magnitude_bins
  if not 0 <= magnitude < bins or bins < 2:
    raise ValueError(
      f"RandAugment: expected a magnitude from 0 to num_magnitude_bins - 1 ="
      f" {bins - 1}, got {magnitude}."
    )

  def chosen(*names: str) -> jax.Array:
    numbers = jnp.array([OPERATIONS.index(name) for name in names])
    found = jnp.any(operation[:, None] == numbers, axis=1)
    return found[:, None, None, None]

  table = _maps(magnitude / (bins - 1), *images.shape[1:3])
  sign = negative.astype(jnp.int32)
  x = _move(images, table[operation, sign]).astype(jnp.int32)
  grey = _grey(x)
  mean = _rounded_mean(grey)
  other = jnp.where(chosen("Sharpness"), _smooth(x), 0)
  other = jnp.where(chosen("Color"), grey, other)
  other = jnp.where(chosen("Contrast"), mean, other)
  # Factors are multiples of 1 / unit.
  unit = 10 * (bins - 1)
  factor = unit + _TENTHS * magnitude * (1 - 2 * sign)[:, None, None, None]
  blend = jnp.maximum(other * unit + (x - other) * factor, 0)
  blend = jnp.minimum(_divide(blend, unit), 255)
  blends = ("Brightness", "Color", "Contrast", "Sharpness")
  y = jnp.where(chosen(*blends), blend, x)
  dropped = round(_BITS * magnitude / (bins - 1))
  y = jnp.where(chosen("Posterize"), x >> dropped << dropped, y)
  dark = x * (bins - 1) < 255 * (bins - 1 - magnitude)
  y = jnp.where(chosen("Solarize") & ~dark, 255 - x, y)
  y = jnp.where(chosen("AutoContrast"), _auto_contrast(x), y)
  y = jnp.where(chosen("Equalize"), _equalize(x), y)
  return y.astype(jnp.uint8)


def cutout(
  key: jax.Array,
  images: jax.Array,
  index: jax.Array,
  *,
  share: float = 0.5,
  fill: Sequence[int],
) -> jax.Array:
  """Covers a random square of each image.

  Cutout (DeVries and Taylor, 2017) as FixMatch (Sohn et al., 2020) has it after
  RandAugment: the centre is anywhere in the image, the side from 0 to `share`
  of the image's; what sticks out is cut off.

  Args:
    key: see `rand_augment`.
    images: uint8 [B, H, W, C].
    index: see `rand_augment`.
    share: greatest side, as a share of the width.
    fill: C values from 0 to 255.

  Returns:
    uint8 [B, H, W, C].
  """
  check_images(images)
  height, width = images.shape[1:3]

  def one(i: jax.Array, image: jax.Array) -> jax.Array:
    y, x, size = jax.random.uniform(jax.random.fold_in(key, i), (3,))
    half = size * share * width / 2
    row = jnp.abs(jnp.arange(height) + 0.5 - y * height) < half
    column = jnp.abs(jnp.arange(width) + 0.5 - x * width) < half
    covered = row[:, None] & column
    return jnp.where(covered[:, :, None], jnp.array(fill, jnp.uint8), image)

  return jax.vmap(one)(index, images)


def strong_view(
  key: jax.Array,
  images: jax.Array,
  index: jax.Array,
  *,
  pad: int,
  flip: bool,
  fill: Sequence[int],
) -> jax.Array:
  """Crops and flips as `augment` does, then RandAugment and Cutout.

  Args:
    key: see `rand_augment`.
    images: uint8 [B, H, W, C].
    index: see `rand_augment`.
    pad: see `augment`.
    flip: see `augment`.
    fill: see `cutout`.

  Returns:
    uint8 [B, H, W, C].
  """
  crop_key, operations_key, cutout_key = jax.random.split(key, 3)
  images = crop_flip.augment(crop_key, images, index, pad=pad, flip=flip)
  images = rand_augment(operations_key, images, index)
  return cutout(cutout_key, images, index, fill=fill)


def _maps(strength: float, height: int, width: int) -> jax.Array:
  """Maps from a pixel's place to that of its source.

  Args:
    strength: magnitude, from 0 to 1.
    height: of the images.
    width: likewise.

  Returns:
    int32 [operations, sign, 6]: (a, b, c, d, e, f) with the source's column
    (a * column + b * row + c) >> 16, and its row from d, e, f alike.
  """

  def entry(name: str, sign: int) -> list[int]:
    shear = sign * strength * _SHEAR
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if name == "ShearX":
      b = shear
    elif name == "ShearY":
      d = shear
    elif name == "TranslateX":
      c = -sign * float(int(strength * _TRANSLATE * width))
    elif name == "TranslateY":
      f = -sign * float(int(strength * _TRANSLATE * height))
    elif name == "Rotate":  # against the clock, about the centre
      angle = math.radians(sign * strength * _DEGREES)
      a = e = math.cos(angle)
      d = math.sin(angle)
      b = -d
      c = (width - a * width - b * height) / 2
      f = (height - d * width - e * height) / 2
    # Pixels are looked up at their centres.
    c, f = c + (a + b) / 2, f + (d + e) / 2
    return [math.floor(x * _ONE + 0.5) for x in (a, b, c, d, e, f)]

  table = [[entry(name, sign) for sign in (1, -1)] for name in OPERATIONS]
  return jnp.array(table, jnp.int32)


def _move(images: jax.Array, maps: jax.Array) -> jax.Array:
  """Each pixel from where its image's map [B, 6] says; 0 outside."""
  batch, height, width, channels = images.shape
  a, b, c, d, e, f = maps.T[:, :, None, None]
  row, column = jnp.arange(height)[:, None], jnp.arange(width)
  x = (a * column + b * row + c) >> 16
  y = (d * column + e * row + f) >> 16
  inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
  source = jnp.where(inside, y * width + x, 0).reshape(batch, -1, 1)
  flat = images.reshape(batch, -1, channels)
  moved = jnp.take_along_axis(flat, source, axis=1, mode="clip")
  return jnp.where(inside[..., None], moved.reshape(images.shape), 0)


def _divide(x: jax.Array, y: jax.Array | int) -> jax.Array:
  """x // y of int32, x >= 0 and y > 0; without a case for others."""
  return jax.lax.div(x, jnp.broadcast_to(jnp.int32(y), x.shape))


def _grey(x: jax.Array) -> jax.Array:
  """Luma [B, H, W, 1]."""
  if x.shape[-1] == 1:
    return x
  weighted = x * jnp.array(_LUMA, jnp.int32)
  return (jnp.sum(weighted, -1, keepdims=True) + _ONE // 2) >> 16


def _rounded_mean(grey: jax.Array) -> jax.Array:
  """Rounded mean of each image, [B, 1, 1, 1]."""
  pixels = grey.shape[1] * grey.shape[2]
  total = jnp.sum(grey, (1, 2, 3), keepdims=True)
  return _divide(2 * total + pixels, 2 * pixels)


def _smooth(x: jax.Array) -> jax.Array:
  """3x3 mean with weight 5 in the middle; the border stays."""
  if min(x.shape[1:3]) < 3:
    return x
  rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
  box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
  weighted = box + 4 * x[:, 1:-1, 1:-1]
  return x.at[:, 1:-1, 1:-1].set(_divide(2 * weighted + 13, 26))


def _auto_contrast(x: jax.Array) -> jax.Array:
  """Stretches each channel to 0..255."""
  low = jnp.min(x, (1, 2), keepdims=True)
  span = jnp.max(x, (1, 2), keepdims=True) - low
  stretched = _divide((x - low) * 255, jnp.maximum(span, 1))
  return jnp.where(span, stretched, x)


def _equalize(x: jax.Array) -> jax.Array:
  """Makes each channel's histogram uniform."""
  batch, height, width, channels = x.shape
  values = x.reshape(batch, -1, channels).swapaxes(1, 2)
  counts = jax.vmap(jax.vmap(lambda v: jnp.bincount(v, length=256)))(values)
  brightest = jnp.max(values, -1, keepdims=True)
  step = height * width - jnp.take_along_axis(counts, brightest, -1)
  step //= 255
  darker = jnp.cumsum(counts, -1) - counts
  table = (step // 2 + darker) // jnp.maximum(step, 1)
  table = jnp.where(step, jnp.minimum(table, 255), jnp.arange(256))
  equal = jnp.take_along_axis(table, values, -1)
  return equal.swapaxes(1, 2).reshape(x.shape)
