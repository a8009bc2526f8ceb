"""Sets that need no files: scikit-learn's digits, and synthetic images."""

import os

import numpy as np

from kd_jax.data.common import SPLITS, Source


def _bilinear(images: np.ndarray, size: int) -> np.ndarray:
  """Resizes [N, H, H] to [N, size, size], pixel centres at halves."""
  height = images.shape[1]
  centres = (np.arange(size) + 0.5) * height / size - 0.5
  centres = np.clip(centres, 0, height - 1)[:, None]
  weights = np.maximum(0, 1 - np.abs(centres - np.arange(height)))
  return weights @ images @ weights.T


def load_digits(
  name: str,
  *,
  split: str,
  dir: str | os.PathLike[str] = "",
  image_size: int = 32,
) -> Source:
  """Loads scikit-learn's 1797 digits (Alpaydin and Kaynak, 1998).

  The images of 8 x 8 pixels are enlarged bilinearly. Every fifth digit of each
  class is a test example: 1437 and 360, the same on every machine.
  """
  del dir
  try:
    from sklearn.datasets import load_digits
  except ModuleNotFoundError as error:
    raise ImportError(
      "The data set digits needs the package scikit-learn. Install it (pip"
      " install scikit-learn), or use the data set synthetic."
    ) from error
  digits = load_digits()
  by_class = np.argsort(digits.target, kind="stable")
  chosen = {
    "test": np.sort(by_class[::5]),
    "train": np.sort(np.delete(by_class, np.s_[::5])),
  }

  def images(rows: np.ndarray) -> np.ndarray:
    grey = _bilinear(digits.images[rows] * (255 / 16), image_size)
    grey = np.rint(grey).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)

  train = images(chosen["train"]) / 255
  return Source(
    images=images(chosen[split]),
    labels=digits.target[chosen[split]].astype(np.int32),
    num_classes=10,
    class_names=tuple(str(digit) for digit in range(10)),
    mean=(float(train.mean()),) * 3,
    std=(float(train.std()),) * 3,
    name=name,
  )


def load_synthetic(
  name: str,
  *,
  split: str,
  dir: str | os.PathLike[str] = "",
  num_examples: int = 1024,
  num_classes: int = 10,
  image_size: int = 32,
) -> Source:
  """Makes a coarse pattern per class under noise of the same strength.

  Classes are equally frequent. Both splits have the same patterns and
  different noise, so that training improves the test scores.
  """
  del dir
  coarse = 4
  labels = np.arange(num_examples) % num_classes
  patterns = np.random.default_rng(0).integers(
    0, 128, (num_classes, coarse, coarse, 3), np.uint8
  )
  cell = np.arange(image_size) * coarse // image_size
  patterns = patterns[:, cell][:, :, cell]
  noise = np.random.default_rng((1, SPLITS.index(split))).integers(
    0, 128, (num_examples, image_size, image_size, 3), np.uint8
  )
  return Source(
    images=patterns[labels] + noise,
    labels=labels.astype(np.int32),
    num_classes=num_classes,
    class_names=tuple(f"class {i}" for i in range(num_classes)),
    # Of the sum of two uniform values in 0..127.
    mean=(127 / 255,) * 3,
    std=(float(np.sqrt((128**2 - 1) / 6) / 255),) * 3,
    name=name,
  )
