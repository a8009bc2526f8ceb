"""Labels of validation images that lie in one folder."""

import collections
import csv
import io
import os
from collections.abc import Iterator

import numpy as np

from kd_jax.data.common import one_line, read_text

_DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
_DEVKIT_FOLDERS = ("", "data", "ILSVRC2012_devkit_t12/data")


def _stem(name: str) -> str:
  return os.path.splitext(os.path.basename(name))[0]


def _wrong_line(path: str, number: int, line: str, expected: str) -> ValueError:
  return ValueError(
    f"{path}, line {number}: expected {expected}, got"
    f" {line.strip()[:100]!r}."
    " Correct the line, or download the file again."
  )


def _read_pairs(path: str) -> Iterator[tuple[str, str]]:
  """Lines of a file's name and its class, parted by a tab, comma or blank."""
  for number, line in enumerate(read_text(path).splitlines(), 1):
    parts = line.split("\t") if "\t" in line else line.split()
    # Tiny ImageNet's have four numbers more: a box.
    if len(parts) == 6 and all(part.strip().isdecimal() for part in parts[2:]):
      parts = parts[:2]
    elif len(parts) != 2 or ("," in line and "\t" not in line):
      row = next(csv.reader([line]), [])
      commas = len(row) == 2 and (_ending(row[0]) or " " not in line.strip())
      parts = row if commas else line.rsplit(None, 1)
    name, label = (
      [part.strip(" ,") for part in parts] if len(parts) == 2 else ("", "")
    )
    # "a.png 1 2" is no file "a.png 1".
    if not name or not label or " " in _ending(name):
      raise _wrong_line(path, number, line, "'<file> <class>'")
    yield _stem(name), label


def _ending(name: str) -> str:
  return os.path.splitext(name)[1]


def _read_kaggle(path: str) -> Iterator[tuple[str, str]]:
  """Kaggle's: the class and a box for each object, all of one class."""
  for number, row in enumerate(csv.reader(io.StringIO(read_text(path))), 1):
    if number == 1 and row[:1] == ["ImageId"]:
      continue
    classes = set(row[1].split()[::5]) if len(row) == 2 else set()
    if len(classes) != 1:
      raise _wrong_line(
        path, number, ",".join(row), "'<file>,<class> <4 numbers> ...'"
      )
    yield _stem(row[0]), classes.pop()


def _read_devkit(path: str) -> Iterator[tuple[str, str]]:
  """The development kit's: a number per image, in the kit's own order."""
  meta = os.path.join(os.path.dirname(path), "meta.mat")
  if not os.path.isfile(meta):
    raise ValueError(
      f"{path} numbers the classes in the development kit's own order, and"
      f" {meta}, which says which class a number is, is missing. Copy it from"
      " the kit (ILSVRC2012_devkit_t12/data), or put LOC_val_solution.csv, or"
      " a val_labels.txt with lines of '<file> <class folder>', beside the"
      " images."
    )
  import scipy.io

  try:
    synsets = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
    wnids = {
      int(number): str(wnid)
      for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])
    }
  # The reader raises whatever it stumbles over.
  except Exception as error:
    raise ValueError(
      f"{meta}: expected the development kit's table of synsets, got"
      f" {one_line(error)}. Copy it from the kit again."
    ) from error
  for number, line in enumerate(read_text(path).splitlines(), 1):
    text = line.strip()
    if not _is_number(text) or int(text) not in wnids:
      raise _wrong_line(path, number, line, f"a number of {meta}")
    yield f"ILSVRC2012_val_{number:08d}", wnids[int(text)]


def _is_number(text: str) -> bool:
  return text.isdecimal() and len(text) < 10


_READERS = {
  "val_labels.txt": _read_pairs,
  "val.txt": _read_pairs,
  "val_annotations.txt": _read_pairs,
  "LOC_val_solution.csv": _read_kaggle,
  _DEVKIT: _read_devkit,
}


def _find(root: str, folder: str) -> dict[str, dict[str, str]]:
  """The label files, each as {file name without its ending: label}."""
  found: dict[str, dict[str, str]] = {}
  for name, reader in _READERS.items():
    for place in (folder, *(os.path.join(root, p) for p in _DEVKIT_FOLDERS)):
      path = os.path.join(place, name)
      if os.path.isfile(path):
        labels: dict[str, str] = {}
        found[path] = labels
        try:
          for stem, label in reader(path):
            if labels.setdefault(stem, label) != label:
              raise ValueError(
                f"{path} gives {stem} two classes, {labels[stem]} and {label}."
                " Correct it."
              )
        except csv.Error as error:
          raise ValueError(
            f"{path}: expected lines of commas, got {one_line(error)}."
          ) from error
        break
  return found


def _few(names: set[str]) -> str:
  return f"{len(names)}, such as {', '.join(sorted(names)[:3])}"


def _numbers(
  labels: list[str], classes: list[str], path: str
) -> tuple[list[str], list[int]]:
  """Labels that are numbers: positions in the sorted classes, from 0."""
  numbers = [int(label) for label in labels]
  if not classes:
    raise ValueError(
      f"{path} numbers the classes, and nothing says which class a number is:"
      " expected the class folders of train, a wnids.txt or an"
      " imagenet_class_index.json beside it. Add one of them."
    )
  if max(numbers) >= len(classes):
    raise ValueError(
      f"{path} has the class number {max(numbers)}, expected 0 to"
      f" {len(classes) - 1}, positions in the sorted class names. Numbers that"
      " begin at 1 are often the development kit's, which have another order:"
      f" call such a file {_DEVKIT} and put meta.mat beside it."
    )
  return classes, numbers


def read(
  root: str, folder: str, paths: list[str], classes: list[str]
) -> tuple[list[str], np.ndarray]:
  """Reads the labels of images that lie in one folder.

  Looks in `folder` and in `root` for
    val_labels.txt, val.txt: lines "<file> <class>", the class a folder's name
      (WordNet number) or a position in the sorted class names, from 0.
    val_annotations.txt: Tiny ImageNet's.
    LOC_val_solution.csv: Kaggle's.
    ILSVRC2012_validation_ground_truth.txt: the ImageNet development kit's,
      with its meta.mat beside it (also in `ILSVRC2012_devkit_t12/data`).

  Args:
    root: the data set's folder.
    folder: where the images are.
    paths: the images.
    classes: the classes' names in order; empty if unknown.

  Returns:
    The classes' names in order, and the labels, int32, one per path.

  Raises:
    ValueError: no such file, several that disagree, images without a label or
      labels without an image, or a label that is ambiguous or unknown.
  """
  found = _find(root, folder)
  if not found:
    raise ValueError(
      f"{folder} has no class folders, and its labels are missing: expected"
      f" {', '.join(_READERS)} in it or in {root}. Add one of them, or sort"
      " the images into class folders."
    )
  stems = [_stem(path) for path in paths]
  if len(set(stems)) < len(stems):
    twice = {s for s, n in collections.Counter(stems).items() if n > 1}
    raise ValueError(
      f"{folder} has images that only their endings tell apart: {_few(twice)}."
      " Labels are given to names without endings. Rename or remove them."
    )
  results = {}
  for path, label_of in found.items():
    missing = set(stems) - label_of.keys()
    extra = label_of.keys() - set(stems)
    if missing or extra:
      parts = [
        *([f"images without a label: {_few(missing)}"] if missing else []),
        *([f"labels without an image: {_few(set(extra))}"] if extra else []),
      ]
      raise ValueError(
        f"{path} does not fit the images in {folder}; {'; '.join(parts)}."
        " Expected one label for every image and no other. Unpack the images"
        " again, or correct the file."
      )
    labels = [label_of[stem] for stem in stems]
    if all(map(_is_number, labels)):
      order, numbers = _numbers(labels, classes, path)
    else:
      order = classes or sorted(set(labels))
      position = {item: i for i, item in enumerate(order)}
      unknown = set(labels) - set(order)
      if unknown:
        raise ValueError(
          f"{path} names classes that do not exist: {_few(unknown)}. Expected"
          f" one of the {len(order)} class folders of train. Correct it."
        )
      numbers = [position[label] for label in labels]
    results[path] = (order, np.array(numbers, np.int32))
  (first, (order, result)), *others = results.items()
  for path, (_, other) in others:
    if (other != result).any():
      wrong = int(np.flatnonzero(other != result)[0])
      raise ValueError(
        f"{first} and {path} disagree on the class of {paths[wrong]} and of"
        f" {int((other != result).sum()) - 1} other images. Remove the wrong"
        " file."
      )
  return order, result
