"""What several tests of data need."""

import jax
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def write_images():
  """write_images(root, split, count): noise of many sizes in class folders."""

  def write(root, split, count):
    rng = np.random.default_rng(0)
    for i in range(count):
      folder = root / split / f"class {i // 7}"
      folder.mkdir(parents=True, exist_ok=True)
      image = rng.integers(0, 256, (9 + i % 4, 12 - i % 5, 3), np.uint8)
      Image.fromarray(image).save(folder / f"{i:02d}.png")
    return root

  return write


@pytest.fixture(scope="session")
def assert_equal():
  """assert_equal(tree, other): the same arrays."""

  def check(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)

  return check
