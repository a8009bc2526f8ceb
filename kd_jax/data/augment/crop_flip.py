"""Random crop of the padded image, and horizontal flip.

The standard CIFAR recipe (He et al., Deep Residual Learning, 2016, section
4.2): 4 pixels of zeros on every side, a random crop of the original size, a
horizontal flip half of the time.
"""

import jax
import jax.numpy as jnp

from kd_jax.data.augment.normalization import check_images


def draw(
  key: jax.Array, index: jax.Array, *, pad: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws each example's crop and flip from a key of its own.

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
  check_images(images)
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
