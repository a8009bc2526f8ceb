"""Data sets by name: loading, constants, layout detection."""

import inspect
import os
import pathlib
from collections.abc import Callable
from typing import Any

from kd_jax.data import cifar, folder, generated, tfds
from kd_jax.data.common import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  SPLITS,
  Constants,
  EncodedSource,
  Source,
  check_choice,
)
from kd_jax.registry import resolve

_SOURCES: dict[str, Callable[..., Source | EncodedSource]] = {
  "cifar10": cifar.load,
  "cifar100": cifar.load,
  "digits": generated.load_digits,
  "folder": folder.load,
  "imagenet": folder.load,
  "synthetic": generated.load_synthetic,
  "tfds:cifar10": tfds.load_cifar,
  "tfds:cifar100": tfds.load_cifar,
  "tfds:imagenet2012": tfds.load_imagenet,
  "tiny-imagenet": folder.load_tiny_imagenet,
}

# Classes, and pixels of the network's input.
_IMAGENET = {
  "imagenet": (1000, 224),
  "tfds:imagenet2012": (1000, 224),
  "tiny-imagenet": (200, 64),
}


def names() -> list[str]:
  """Lists the names that `load` knows."""
  return sorted(_SOURCES)


def load(
  name: str,
  *,
  split: str,
  dir: str | os.PathLike[str] = "../data",
  image_size: int | None = None,
  num_classes: int | None = None,
  num_examples: int | None = None,
  resize: int | None = None,
  on_bad_image: str | None = None,
) -> Any:
  """Reads one split of an image set into memory, or lists its files.

  Args:
    name: "cifar10" or "cifar100" (the publisher's python version: the folder
      or the .tar.gz), "tfds:cifar10", "tfds:cifar100" or "tfds:imagenet2012"
      (TensorFlow Datasets; read without TensorFlow once prepared), "digits"
      (scikit-learn's handwritten digits), "synthetic", "folder" (class folders
      of images), "imagenet" or "tiny-imagenet" (image files in the layouts of
      `kd_jax.data.folder.load`); or "package.module:function", a function of
      your own that takes these arguments and returns the split.
    split: "train" or "test".
    dir: the folder that holds the publisher's folder or archive, or that
      folder or archive itself; for image files the folder of `train` and
      `val`; for "tfds:..." TFDS's data folder (TFDS's own default is searched
      too). "~" is the home folder.
    image_size: pixels, height and width (digits, synthetic: 32; image files:
      224; tiny-imagenet: 64).
    num_classes: of the synthetic set (10).
    num_examples: of the synthetic set's split (1024).
    resize: pixels of the shorter side before evaluation's centre crop (image
      files: 256/224 of image_size; tiny-imagenet: 64).
    on_bad_image: "error", or "skip" to leave out image files that cannot be
      decoded.

  Returns:
    The split: a `Source`, or an `EncodedSource` of image files. The test split
    carries the training split's mean and std.

  Raises:
    ValueError: unknown name, split or option; data missing, cut short,
      damaged or inconsistent; a pickle that holds more than plain data.
    ImportError: the source's package is not installed.
  """
  loader = resolve(name, _SOURCES, what="data set")
  check_choice("split", split, SPLITS)
  given = {
    "image_size": image_size,
    "num_classes": num_classes,
    "num_examples": num_examples,
    "resize": resize,
    "on_bad_image": on_bad_image,
  }
  chosen = {key: value for key, value in given.items() if value is not None}
  allowed = options(name) & given.keys()
  for key, value in chosen.items():
    if key not in allowed:
      raise ValueError(
        f"The data set {name} has no option {key}, got {value}; expected"
        f" {' or '.join(sorted(allowed)) or 'no option'}. Leave it unset"
        " (None)."
      )
    if isinstance(value, int) and value < 1:
      raise ValueError(f"{key} must be at least 1, got {value}.")
  return loader(name, split=split, dir=os.path.expanduser(dir), **chosen)


def options(name: str) -> frozenset[str]:
  """Options of `load` that a set takes; image files take "resize"."""
  loader = resolve(name, _SOURCES, what="data set")
  return frozenset(inspect.signature(loader).parameters)


def constants(name: str) -> Constants:
  """Returns what is known of a set without its files.

  Args:
    name: a name for `load` except "folder". "tfds:cifar10" is the same as
      "cifar10". The classes of ImageNet are called "0" to "999", those of
      Tiny ImageNet "0" to "199".

  Raises:
    ValueError: unknown name, or "folder".
  """
  if name in _IMAGENET:
    count, size = _IMAGENET[name]
    classes = tuple(map(str, range(count)))
    shape = (size, size, 3)
    resize = size if name == "tiny-imagenet" else round(size * 256 / 224)
    return Constants(count, classes, shape, IMAGENET_MEAN, IMAGENET_STD, resize)
  if name.removeprefix("tfds:") in cifar.LAYOUTS:
    return cifar.constants(name.removeprefix("tfds:"))
  if name == "folder":
    raise ValueError(
      "Nothing is known of the data set 'folder' without its files. Name the"
      f" set that has the same classes ({', '.join(_IMAGENET)}), or load it."
    )
  # Generated sets, and a user's own.
  source = load(name, split="test")
  return Constants(
    source.num_classes,
    source.class_names,
    source.image_shape,
    source.mean,
    source.std,
  )


def detect(dir: str | os.PathLike[str]) -> str:
  """Finds out which set's layout a folder has.

  Args:
    dir: a folder as `load` takes it.

  Returns:
    A name for `load`: that of a CIFAR, "tiny-imagenet" or "folder".

  Raises:
    ValueError: the folder has no known layout, or more than one.
  """
  base = pathlib.Path(dir).expanduser()
  found = [
    name
    for name, layout in cifar.LAYOUTS.items()
    if any(
      (base / item).exists()
      for item in (layout.folder, layout.archive, layout.meta)
    )
  ]
  if any((base / item).is_dir() for item in ("train", "val")):
    # Tiny ImageNet's list of classes.
    tiny = (base / "wnids.txt").is_file()
    found.append("tiny-imagenet" if tiny else "folder")
  if len(found) != 1:
    expected = [layout.folder for layout in cifar.LAYOUTS.values()]
    raise ValueError(
      f"{base}: expected one data set, {', '.join(expected)} or train and val,"
      f" got {' and '.join(found) or 'none of them'}. Name the set and its"
      " folder"
    )
  return found[0]
