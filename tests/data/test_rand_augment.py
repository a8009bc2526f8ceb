"""RandAugment against Pillow, operation by operation, and Cutout."""

import functools
import importlib
import math

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from kd_jax.data import augment

# The package has the function under this name.
rand_augment = importlib.import_module("kd_jax.data.augment.rand_augment")
OPERATIONS = rand_augment.OPERATIONS
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
# Where Pillow cuts off what float32 made of a whole number.
ROUNDED = (*BLENDS, "AutoContrast")
KEY = jax.random.key(3)


def with_pillow(image, name, magnitude, bins, sign):
  """What torchvision makes of a Pillow image; `image` is uint8 [H, W, C]."""
  mode = None if image.shape[-1] == 3 else "L"
  picture = Image.fromarray(image[..., 0] if mode else image)
  width, height = picture.size

  def strength(greatest):
    table = np.linspace(0, greatest, bins, dtype=np.float32)
    return sign * float(table[magnitude])

  def affine(*matrix):
    return picture.transform(
      picture.size,
      Image.Transform.AFFINE,
      matrix,
      Image.Resampling.NEAREST,
      fillcolor=0,
    )

  slope = math.tan(math.atan(strength(0.3)))
  along_x, along_y = (int(strength(150 / 331 * n)) for n in (width, height))
  if name in BLENDS:
    factor = 1 + strength(0.9)
    made = getattr(ImageEnhance, name)(picture).enhance(factor)
  else:
    made = {
      "Identity": lambda: picture,
      "ShearX": lambda: affine(1, slope, 0, 0, 1, 0),
      "ShearY": lambda: affine(1, 0, 0, slope, 1, 0),
      "TranslateX": lambda: affine(1, 0, -along_x, 0, 1, 0),
      "TranslateY": lambda: affine(1, 0, 0, 0, 1, -along_y),
      "Rotate": lambda: picture.rotate(strength(30), fillcolor=0),
      "Posterize": lambda: ImageOps.posterize(
        picture, 8 - round(magnitude / ((bins - 1) / 4))
      ),
      "Solarize": lambda: ImageOps.solarize(
        picture, float(np.linspace(255, 0, bins)[magnitude])
      ),
      "AutoContrast": lambda: ImageOps.autocontrast(picture),
      "Equalize": lambda: ImageOps.equalize(picture),
    }[name]()
  return np.asarray(made).reshape(image.shape)


def pictures(height, width, channels=3):
  """Noise, a narrow range of greys, a gradient, and a single colour."""
  rng = np.random.default_rng(0)
  shape = (height, width, channels)
  gradient = np.add.outer(5 * np.arange(height), 2 * np.arange(width))
  images = [
    rng.integers(0, 256, shape),
    90 + rng.integers(0, 60, shape),
    np.minimum(gradient[..., None] + rng.integers(0, 20, shape), 255),
    np.full(shape, 77),
  ]
  return np.stack(images).astype(np.uint8)


@pytest.mark.parametrize(
  ("shape", "magnitude", "bins"),
  [
    ((32, 32), 10, 31),
    ((17, 24), 30, 31),
    ((16, 8, 1), 7, 11),
    ((2, 2), 0, 31),
  ],
)
def test_operations_are_pillows(shape, magnitude, bins):
  images = pictures(*shape)
  cases = [
    (image, number, sign)
    for image in images
    for number in range(len(OPERATIONS))
    for sign in (1, -1)
  ]
  found = jax.jit(
    lambda *a: rand_augment.apply_operations(
      *a, magnitude=magnitude, num_magnitude_bins=bins
    )
  )(
    np.stack([image for image, *_ in cases]),
    np.array([number for _, number, _ in cases], np.int32),
    np.array([sign < 0 for *_, sign in cases]),
  )
  assert found.dtype == np.uint8
  for (image, number, sign), got in zip(cases, np.asarray(found)):
    name = OPERATIONS[number]
    expected = with_pillow(image, name, magnitude, bins, sign)
    error = np.abs(got.astype(int) - expected)
    assert error.max() <= (name in ROUNDED), (name, sign)
    assert (error > 0).mean() < 0.1, (name, sign)


def test_an_image_has_operations_of_its_own():
  images = np.repeat(pictures(12, 12)[2:3], 400, 0)
  index = np.arange(400, dtype=np.int32)
  apply = jax.jit(lambda *a: augment.rand_augment(*a, num_ops=1))
  found = np.asarray(apply(KEY, images, index)).astype(int)
  candidates = np.stack(
    [
      with_pillow(images[0], name, 10, 31, sign).astype(int)
      for name in OPERATIONS
      for sign in (1, -1)
    ]
  )
  errors = np.abs(found[:, None] - candidates).max((2, 3, 4))
  assert (errors.min(1) <= 1).all()
  assert set(range(28)) == set(np.nonzero(errors <= 1)[1])
  # The draw goes with the image's position in the training set.
  order = np.random.default_rng(0).permutation(400)
  again = apply(KEY, images[order], index[order])
  np.testing.assert_array_equal(again, found[order])
  assert (np.asarray(apply(jax.random.key(4), images, index)) != found).any()


def test_operations_follow_each_other():
  images, index = pictures(12, 12), np.arange(4, dtype=np.int32)

  def one_by_one(images):
    draw = functools.partial(
      jax.random.randint, shape=(2, 2), minval=0, maxval=np.array([14, 2])
    )
    drawn = jax.vmap(lambda i: draw(jax.random.fold_in(KEY, i)))(index)
    for k in range(2):
      images = rand_augment.apply_operations(
        images, drawn[:, k, 0], drawn[:, k, 1] == 1
      )
    return images

  got, expected = jax.jit(
    lambda x: (augment.rand_augment(KEY, x, index), one_by_one(x))
  )(images)
  np.testing.assert_array_equal(got, expected)
  assert (got != images).any()


@pytest.mark.parametrize(
  ("images", "magnitude", "words"),
  [
    (np.zeros((2, 8, 8, 3), np.float32), 10, "uint8"),
    (np.zeros((2, 8, 8, 4), np.uint8), 10, "expected 1 or 3 channels, got 4"),
    (np.zeros((2, 8, 8, 3), np.uint8), 31, "from 0 to .* 30, got 31"),
  ],
)
def test_refused(images, magnitude, words):
  with pytest.raises(ValueError, match=words):
    augment.rand_augment(KEY, images, np.arange(2), magnitude=magnitude)


def test_cutout_covers_a_square():
  images = np.full((300, 20, 16, 3), 255, np.uint8)
  index = np.arange(300, dtype=np.int32)
  fill = (1, 2, 3)
  found = np.asarray(augment.cutout(KEY, images, index, fill=fill))
  covered = (found == np.array(fill)).all(-1)
  assert (found[~covered] == 255).all()
  sides = covered.any(2).sum(1), covered.any(1).sum(1)
  assert max(map(max, sides)) == 8  # half of the width
  np.testing.assert_array_equal(covered.sum((1, 2)), sides[0] * sides[1])
  inner = (
    covered[:, [0, -1]].sum((1, 2)) + covered[:, :, [0, -1]].sum((1, 2))
  ) == 0
  assert (np.abs(sides[0] - sides[1])[inner] <= 1).all()
  assert covered.mean(0).min() > 0.01  # any place
  again = augment.cutout(KEY, images[::-1], index[::-1], fill=fill)
  np.testing.assert_array_equal(again, found[::-1])
