"""Data sets by name, and those that need no files."""

import sys

import numpy as np
import pytest
from PIL import Image

from kd_jax import data
from kd_jax.data import sources


def test_digits_are_split_by_class_without_overlap():
  from sklearn.datasets import load_digits

  digits = load_digits()
  train = data.load("digits", split="train", image_size=8)
  test = data.load("digits", split="test", image_size=8)
  assert train.images.shape == (1437, 8, 8, 3)
  assert test.images.shape == (360, 8, 8, 3)
  counts, test_counts = np.bincount(digits.target), np.bincount(test.labels)
  assert np.abs(test_counts - counts * 360 / 1797).max() <= 1

  # At their own size, train and test are scikit-learn's images, each once.
  def rows(images, labels):
    return sorted(
      (label, *image.ravel()) for image, label in zip(images, labels)
    )

  grey = np.rint(digits.images * 255 / 16).astype(np.uint8)
  both = np.concatenate([train.images, test.images])
  labels = np.concatenate([train.labels, test.labels])
  assert rows(both[..., 0], labels) == rows(grey, digits.target)
  assert (both == both[..., :1]).all()


def test_digits_are_enlarged_bilinearly():
  small = data.load("digits", split="test", image_size=8)
  train, test = (data.load("digits", split=s) for s in ("train", "test"))
  assert test.images.shape == (360, 32, 32, 3)
  for i in range(0, 360, 40):
    reference = Image.fromarray(small.images[i]).resize(
      (32, 32), Image.Resampling.BILINEAR
    )
    difference = np.asarray(reference, int) - test.images[i]
    assert np.abs(difference).max() <= 1
  # Both splits carry the training split's statistics.
  assert train.mean == test.mean and train.std == test.std
  x = train.images / 255
  np.testing.assert_allclose(train.mean, x.mean((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(train.std, x.std((0, 1, 2)), rtol=1e-6)
  assert train.class_names == tuple("0123456789")
  known = data.constants("digits")
  assert (known.mean, known.image_shape) == (test.mean, (32, 32, 3))


def test_synthetic_images_are_deterministic_and_learnable():
  options = {"num_examples": 210, "num_classes": 20, "image_size": 18}
  train, again, test = (
    data.load("synthetic", split=split, **options)
    for split in ("train", "train", "test")
  )
  assert train.images.shape == (210, 18, 18, 3)
  assert train.num_classes == 20 and len(train.class_names) == 20
  np.testing.assert_array_equal(train.images, again.images)
  assert (train.images != test.images).mean() > 0.9
  assert np.bincount(train.labels, minlength=20).min() == 10
  means = np.stack([train.images[train.labels == k].mean(0) for k in range(20)])
  distance = ((test.images[:, None] - means) ** 2).sum((2, 3, 4))
  assert (distance.argmin(1) == test.labels).mean() > 0.95
  x = train.images / 255
  np.testing.assert_allclose(x.mean((0, 1, 2)), train.mean, atol=0.02)
  np.testing.assert_allclose(x.std((0, 1, 2)), train.std, atol=0.02)


def own(name, *, split, dir, image_size=6):
  """A user's own loader."""
  images = np.full((4, image_size, image_size, 3), len(split), np.uint8)
  return make(images=images, name=f"{name} in {dir}")


def test_a_name_may_be_a_function_of_the_users_own(monkeypatch):
  monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
  source = data.load("mine:own", split="train", dir="here", image_size=9)
  assert source.name == "mine:own in here"
  assert source.images.shape == (4, 9, 9, 3) and source.images[0, 0, 0, 0] == 5
  assert data.constants("mine:own").image_shape == (6, 6, 3)
  with pytest.raises(ValueError, match=r"no option resize, .*image_size"):
    data.load("mine:own", split="train", resize=3)


@pytest.mark.parametrize(
  ("name", "options", "words"),
  [
    ("cifar-100", {}, r"'cifar-100'\. Did you mean cifar100.*tiny-imagenet"),
    ("mine:none", {}, "'mine:none' cannot be imported"),
    ("synthetic", {"split": "tran"}, r"split 'tran'\. Did you mean train"),
    ("cifar10", {"image_size": 64}, "cifar10 has no option image_size, got 64"),
    ("digits", {"num_classes": 3}, "no option num_classes.*image_size"),
    ("digits", {"on_bad_image": "skip"}, "digits has no option on_bad_image"),
    ("synthetic", {"num_examples": 0}, "num_examples must be at least 1"),
  ],
)
def test_unknown_names_and_options_are_refused(name, options, words):
  with pytest.raises(ValueError, match=words):
    data.load(name, **{"split": "train", **options})


def test_constants_are_known_without_files():
  assert all(
    data.constants(name).num_classes
    for name in sources.names()
    if name != "folder"
  )
  imagenet = data.constants("imagenet")
  assert len(imagenet.class_names) == imagenet.num_classes == 1000
  assert imagenet.image_shape == (224, 224, 3)
  assert imagenet.mean == (0.485, 0.456, 0.406)
  assert data.constants("tfds:imagenet2012") == imagenet
  tiny = data.constants("tiny-imagenet")
  assert (tiny.num_classes, tiny.image_shape) == (200, (64, 64, 3))
  with pytest.raises(ValueError, match=r"'folder' without its files.*imagenet"):
    data.constants("folder")
  with pytest.raises(ValueError, match=r"'cifar'\. Did you mean.*imagenet"):
    data.constants("cifar")


@pytest.mark.parametrize(
  ("name", "module", "words"),
  [
    ("tfds:cifar10", "tensorflow_datasets", "install tensorflow-datasets"),
    ("digits", "sklearn.datasets", "pip install scikit-learn.*synthetic"),
  ],
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, name, module, words):
  monkeypatch.setitem(sys.modules, module, None)  # as if not installed
  with pytest.raises(ImportError, match=words):
    data.load(name, split="test", dir=tmp_path)


def make(**changes):
  fields = {
    "images": np.zeros((4, 8, 8, 3), np.uint8),
    "labels": np.arange(4, dtype=np.int32),
    "num_classes": 4,
    "class_names": ("a", "b", "c", "d"),
    "mean": (0.5,) * 3,
    "std": (0.2,) * 3,
    "name": "mine",
  }
  return data.Source(**{**fields, **changes})


def test_images_become_contiguous():
  # With any other layout, gathering a batch copies the whole set.
  images = np.random.default_rng(0).integers(0, 9, (3, 8, 8, 4), np.uint8).T
  assert not images.flags.c_contiguous
  source = make(images=images)
  np.testing.assert_array_equal(source.images, images)
  assert source.images.flags.c_contiguous


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"images": np.zeros((4, 8, 8, 3))}, "mine must be uint8 .* got float64"),
    ({"images": np.zeros((4, 8, 8), np.uint8)}, r"got uint8 \(4, 8, 8\)"),
    ({"labels": np.arange(3, dtype=np.int32)}, r"int32 \[4\], one per image"),
    ({"labels": np.arange(4)}, "int32 .* got int64"),
    ({"num_classes": 1, "class_names": ("a",)}, "mine has 1 class: expected"),
    ({"class_names": ("a",)}, "4 classes but 1 class names"),
    (
      {"labels": np.array([0, 1, 4, -1], np.int32)},
      r"labels of mine must be in 0\.\.3 .* got 4 at position 2 \(2 of 4",
    ),
  ],
)
def test_a_source_checks_itself(changes, words):
  with pytest.raises(ValueError, match=words):
    make(**changes)
