"""Labelled sets of encoded images: class folders, ImageNet, Tiny ImageNet.

Such a set holds file names and labels; the images are read, decoded and
cropped by the pipelines, when they are needed.
"""

import collections
import dataclasses
import logging
import os
from collections.abc import Iterable

import numpy as np

from kd_jax import storage
from kd_jax.data import images, val_labels
from kd_jax.data.common import SPLITS, EncodedSource, read_text

_log = logging.getLogger(__name__)

# Other files are looked into.
_EXTENSIONS = (
  *(".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif"),
  *(".tiff", ".webp"),
)
# The first that exists holds the split. Published `test` folders often have no
# labels, so that one comes last.
_FOLDERS = {"train": ("train",), "test": ("val", "validation", "test")}
# WordNet's numbers with words: of the devkit, of Kaggle, of Tiny ImageNet.
_WORDS = ("synset_words.txt", "LOC_synset_mapping.txt", "words.txt")
_CLASS_INDEX = "imagenet_class_index.json"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FolderSource(EncodedSource):
  """Image files; see `EncodedSource`.

  Attributes:
    paths: N absolute paths.
  """

  paths: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.paths)

  def read_bytes(self, i: int) -> bytes:
    """The content of file `i`."""
    return images.read_file(self.paths[i])

  def describe(self, i: int) -> str:
    """The path of file `i`."""
    return self.paths[i]


def _few(names: Iterable[str], limit: int = 10) -> str:
  names = sorted(names)
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


def _subfolders(folder: str) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(
      entry.name
      for entry in entries
      if entry.is_dir() and not entry.name.startswith(".")
    )


def image_files(
  folder: str, others: collections.Counter[str] | None = None
) -> list[str]:
  """The image files below a folder, sorted.

  Args:
    folder: its hidden files are left out.
    others: counts the endings of files that are no images.
  """
  others = collections.Counter() if others is None else others
  found, left = [], [folder]
  while left:
    with os.scandir(left.pop()) as entries:
      for entry in entries:
        name = entry.name
        if name.startswith("."):
          continue
        if entry.is_dir():
          left.append(entry.path)
        elif name.lower().endswith(_EXTENSIONS) or images.is_image(entry.path):
          found.append(entry.path)
        else:
          others[os.path.splitext(name)[1].lower() or "no ending"] += 1
  return sorted(found)


def _split_folder(root: str, split: str) -> str | None:
  for name in _FOLDERS[split]:
    if os.path.isdir(os.path.join(root, name)):
      return os.path.join(root, name)
  return None


def _is_flat(folder: str) -> bool:
  """Whether images lie in one folder (Tiny ImageNet's `val/images` too)."""
  return set(_subfolders(folder)) <= {"images"}


def _check_same_classes(root: str) -> None:
  """Raises ValueError if the class folders of the splits differ."""
  train, test = (_split_folder(root, split) for split in SPLITS)
  if train is None or test is None or _is_flat(test):
    return
  one, other = set(_subfolders(train)), set(_subfolders(test))
  if one != other:
    parts = [
      f"only in {folder}: {_few(names)}"
      for folder, names in ((train, one - other), (test, other - one))
      if names
    ]
    raise ValueError(
      f"The class folders of {train} and {test} differ ({'; '.join(parts)}):"
      " expected the same in both, since they number the classes. Add, rename"
      " or remove folders."
    )


def _readable(root: str) -> dict[str, str]:
  """WordNet numbers with a word, of the first list that the folder holds."""
  path = os.path.join(root, _CLASS_INDEX)
  if os.path.isfile(path):
    remedy = 'Expected {"0": ["n01440764", "tench"], ...}. Correct the file'
    content = storage.parse_json(read_text(path), path, remedy)
    pairs = storage.convert(content, dict[str, tuple[str, str]], path, remedy)
    return dict(pairs.values())
  for name in _WORDS:
    path = os.path.join(root, name)
    if os.path.isfile(path):
      lines = read_text(path).split("\n")
      parts = [line.split(None, 1) for line in lines if line.strip()]
      return {p[0]: p[-1].split(",")[0].strip() for p in parts}
  return {}


def _check_depth(folder: str, classes: list[str]) -> None:
  """Raises ValueError for one class, whose folder may be one too many."""
  if len(classes) != 1:
    return
  only = os.path.join(folder, classes[0])
  inner = _subfolders(only)
  with os.scandir(only) as entries:
    files = any(not e.is_dir() and e.name[0] != "." for e in entries)
  deep = ""
  if len(inner) > 1 and not files:
    deep = (
      f", and in it are only folders ({_few(inner)}). If those are the classes,"
      f" move them from {only} to {folder}"
    )
  raise ValueError(
    f"{folder} has one class folder, {classes[0]}: expected at least 2"
    f" classes{deep}."
  )


def _known_classes(root: str) -> list[str]:
  """The classes in order, from elsewhere than a flat folder; [] if unknown."""
  train = _split_folder(root, "train")
  if train is not None:
    return _subfolders(train)
  path = os.path.join(root, "wnids.txt")
  if os.path.isfile(path):
    return sorted(set(read_text(path).split()))
  path = os.path.join(root, _CLASS_INDEX)
  return sorted(_readable(root)) if os.path.isfile(path) else []


def load(
  name: str,
  *,
  split: str,
  dir: str | os.PathLike[str],
  image_size: int = 224,
  resize: int = 0,
  on_bad_image: str = "error",
) -> FolderSource:
  """Lists one split of a set of image files.

  The folder holds `train/<class>/` and `val/<class>/` (or `validation`, or
  `test`: the first of the three that exists), the images directly in the class
  folders or deeper. Classes are numbered in the order of the sorted folder
  names, as torchvision's ImageFolder does. A `val` without class folders
  (ImageNet's, Tiny ImageNet's) needs its labels; see `val_labels.read`. If the
  folder has imagenet_class_index.json, synset_words.txt,
  LOC_synset_mapping.txt or words.txt, its words become the class names.

  Args:
    name: of the source.
    split: "train" or "test".
    dir: the folder.
    image_size: height and width of the network's input, in pixels.
    resize: see `EncodedSource`.
    on_bad_image: "error" or "skip".

  Returns:
    The split; no image has been read.

  Raises:
    ValueError: the split is missing or has no images, a class folder is empty,
      the class folders of the splits differ, labels are missing or ambiguous,
      or a value is out of range.
  """
  root = os.path.abspath(dir)
  folder = _split_folder(root, split)
  if folder is None:
    wanted = " or ".join(_FOLDERS[split])
    exists, where = "which does not exist", "FOLDER"
    if os.path.isdir(root):
      exists = f"which holds {_few(os.listdir(root)) or 'nothing'}"
      deeper = [os.path.join(root, item) for item in _subfolders(root)]
      if len(deeper) == 1 and _split_folder(deeper[0], split):
        where = deeper[0]
    raise ValueError(
      f"No {split} images: expected a folder {wanted} with one folder per"
      f" class in {root!r}, {exists}. Name the folder that has it with"
      f" --config.data.dir={where}."
    )
  _check_same_classes(root)
  flat = split == "test" and _is_flat(folder)
  others: collections.Counter[str] = collections.Counter()
  if flat:
    paths = image_files(folder, others)
  else:
    classes = _subfolders(folder)
    _check_depth(folder, classes)
    by_class = [
      image_files(os.path.join(folder, item), others) for item in classes
    ]
    with os.scandir(folder) as entries:
      others["beside the class folders"] += sum(
        not entry.is_dir() and not entry.name.startswith(".")
        for entry in entries
      )
    empty = [item for item, files in zip(classes, by_class) if not files]
    if empty and len(empty) < len(classes):
      raise ValueError(
        f"Class folders without an image in {folder}: {_few(empty)}. Expected"
        f" files that end in {', '.join(_EXTENSIONS)}. Fill the folders, or"
        " remove them from every split."
      )
    paths = [path for files in by_class for path in files]
    labels = np.repeat(
      np.arange(len(classes), dtype=np.int32), [len(f) for f in by_class]
    )
  if not paths:
    raise ValueError(
      f"No images in {folder}: expected <class>/<file> there, with files that"
      f" end in {', '.join(_EXTENSIONS)}. Unpack the images there."
    )
  if flat:
    known = _known_classes(root)
    classes, labels = val_labels.read(root, folder, paths, known)
  if +others:
    listed = ", ".join(f"{n} {name}" for name, n in (+others).most_common(10))
    _log.warning(
      "%s: left out %d files that are no images of a class (%s)",
      *(folder, others.total(), listed),
    )
  words = _readable(root)
  return FolderSource(
    paths=tuple(paths),
    labels=labels,
    num_classes=len(classes),
    class_names=tuple(words.get(item, item) for item in classes),
    name=name,
    image_size=image_size,
    resize=resize,
    on_bad_image=on_bad_image,
  )


def load_tiny_imagenet(
  name: str,
  *,
  split: str,
  dir: str | os.PathLike[str],
  image_size: int = 64,
  resize: int = 64,
  on_bad_image: str = "error",
) -> FolderSource:
  """Lists one split of Tiny ImageNet, whose images have their networks' size.

  See `load`.
  """
  return load(
    name,
    split=split,
    dir=dir,
    image_size=image_size,
    resize=resize,
    on_bad_image=on_bad_image,
  )
