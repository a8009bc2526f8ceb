"""CIFAR-10 and CIFAR-100 in the publisher's python version.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import dataclasses
import gzip
import hashlib
import io
import os
import pathlib
import tarfile
from typing import Any

import numpy as np

from kd_jax.data import safe_pickle
from kd_jax.data.common import Constants, Source, check_labels, one_line


@dataclasses.dataclass(frozen=True)
class Layout:
  """The publisher's files of a set, and its usual normalisation."""

  folder: str
  archive: str
  files: dict[str, tuple[str, ...]]
  meta: str
  names_key: str
  labels_key: str
  num_classes: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]


LAYOUTS = {
  "cifar10": Layout(
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    files={
      "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
      "test": ("test_batch",),
    },
    meta="batches.meta",
    names_key="label_names",
    labels_key="labels",
    num_classes=10,
    mean=(0.49139968, 0.48215841, 0.44653091),
    std=(0.24703223, 0.24348513, 0.26158784),
  ),
  "cifar100": Layout(
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    files={"train": ("train",), "test": ("test",)},
    meta="meta",
    names_key="fine_label_names",
    labels_key="fine_labels",
    num_classes=100,
    # The values that the reference toolboxes normalise with.
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
  ),
}


_CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee clock
cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper
snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


# Twice the bytes of the largest file, and of the largest unpacked archive.
_MAX_FILE = 320 << 20
_MAX_ARCHIVE = 400 << 20


# MD5 of the publisher's large files. Scanning these takes a second.
_PUBLISHED = frozenset(
  (
    "c99cafc152244af753f735de768cd75f",
    "d4bba439e000b95fd0a9bffe97cbabec",
    "54ebc095f3ab1f0389bbae665268c751",
    "634d18415352ddfa80567beed471001a",
    "482c414d41f54cd18b22e5b47cb7c3cb",
    "40351d587109b95175f43aff81a1287e",
    "16019d7e3df5f24257cddd939b257f8d",
    "f0ef6b0ae62326f3e7ffdfab6717acfc",
  )
)


def _unpickle(content: bytes | memoryview, where: str) -> dict[str, Any]:
  """Reads a pickle, after a scan unless it is the publisher's own file."""
  known = hashlib.md5(content, usedforsecurity=False).hexdigest()
  return safe_pickle.load(content, where, trusted=known in _PUBLISHED)


def _read_folder(
  folder: pathlib.Path, members: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
  read = {}
  for member in members:
    path = folder / member
    if not path.is_file():
      raise ValueError(
        f"{folder} lacks the file {member} (expected {', '.join(members)})."
        " Unpack the archive again."
      )
    with path.open("rb") as file:
      content = file.read(_MAX_FILE + 1)
    if len(content) > _MAX_FILE:
      raise ValueError(
        f"{path}: expected at most {_MAX_FILE:,} bytes, got more: it is not the"
        " publisher's file. Unpack the archive again."
      )
    read[member] = _unpickle(content, str(path))
  return read


def _read_archive(
  archive: pathlib.Path, folder: str, members: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
  wanted = {f"{folder}/{member}": member for member in members}
  read = {}
  for name, content in _unpack(archive).items():
    member = wanted.get(name.removeprefix("./"))
    if member:
      read[member] = _unpickle(content, f"{archive}: {name}")
  missing = sorted(set(members) - set(read))
  if missing:
    raise ValueError(
      f"{archive} lacks {', '.join(missing)} (expected {', '.join(wanted)}):"
      " it is cut short or another archive. Download it again."
    )
  return read


def _unpack(archive: pathlib.Path) -> dict[str, memoryview]:
  """The plain files of an archive by name, without links and sparse ones."""
  try:
    # To its very end, where gzip keeps the checksum.
    with gzip.open(archive) as stream:
      content = stream.read(_MAX_ARCHIVE + 1)
    if len(content) > _MAX_ARCHIVE:
      raise tarfile.TarError(f"more than {_MAX_ARCHIVE:,} bytes in it")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
      return {
        entry.name: memoryview(content)[entry.offset_data :][: entry.size]
        for entry in tar
        if entry.isreg() and not entry.issparse()
      }
  # A damaged header raises nearly any exception.
  except Exception as error:
    raise ValueError(
      f"{archive} is cut short or damaged: expected a whole .tar.gz archive,"
      f" got {one_line(error)}. Delete it and download it again."
    ) from error


def _read(
  name: str, layout: Layout, base: pathlib.Path, members: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
  """Reads `members` from the folder or the archive."""
  if (base / layout.folder).is_dir():
    return _read_folder(base / layout.folder, members)
  if any((base / member).is_file() for member in members):
    return _read_folder(base, members)
  for archive in (base / layout.archive, base):
    if archive.is_file():
      return _read_archive(archive, layout.folder, members)
  exists = "holds neither" if base.is_dir() else "does not exist"
  raise ValueError(
    f"No {name} data: expected the folder {layout.folder} or the file"
    f" {layout.archive} in {str(base)!r}, which {exists}. Either download"
    f" {layout.archive} from the CIFAR page of the University of Toronto and"
    " put it there (it need not be unpacked), or name the folder that has it"
    f" with --config.data.dir=FOLDER, or use the data set tfds:{name}"
    " (TensorFlow Datasets). The data set 'digits' needs no file."
  )


def _rows(
  content: dict[str, Any], layout: Layout, where: str
) -> tuple[np.ndarray, np.ndarray]:
  """The checked rows and labels of one data file."""
  for key in ("data", layout.labels_key):
    if key not in content:
      raise ValueError(
        f"{where} has no {key!r}, got {str(sorted(content))[:200]}: it is of"
        " another data set. Check the folder, or the data set's name."
      )
  data, labels = content["data"], content[layout.labels_key]
  if (
    not isinstance(data, np.ndarray)
    or data.dtype != np.uint8
    or data.ndim != 2
    or data.shape[1] != 3072
  ):
    got = getattr(data, "shape", type(data).__name__)
    raise ValueError(
      f"The data of {where} must be uint8 rows of 3072 values (3 x 32 x 32),"
      f" got {got}. Download the archive again."
    )
  # int64: a wrong label may be too large for int32.
  if not isinstance(labels, list) or not all(
    isinstance(label, int) and -(2**63) <= label < 2**63 for label in labels
  ):
    raise ValueError(
      f"The {layout.labels_key} of {where} must be a list of integers, got"
      f" {type(labels).__name__}. Download the archive again."
    )
  if len(labels) != len(data):
    raise ValueError(
      f"Wrong row count in {where}: expected one label per image, got"
      f" {len(data)} images and {len(labels)} labels. Download the archive"
      " again."
    )
  wide = np.array(labels, np.int64)
  check_labels(wide, layout.num_classes, where)
  return data, wide.astype(np.int32)


def constants(name: str) -> Constants:
  """Classes, image shape and normalisation of "cifar10" or "cifar100"."""
  layout = LAYOUTS[name]
  listed = {10: _CIFAR10_NAMES, 100: _CIFAR100_NAMES}[layout.num_classes]
  return Constants(
    layout.num_classes,
    tuple(listed.split()),
    (32, 32, 3),
    layout.mean,
    layout.std,
  )


def load(name: str, *, split: str, dir: str | os.PathLike[str]) -> Source:
  """Loads "cifar10" or "cifar100"; see `kd_jax.data.load`."""
  layout = LAYOUTS[name]
  members = layout.files[split]
  content = _read(name, layout, pathlib.Path(dir), (*members, layout.meta))
  parts = [
    _rows(content[member], layout, f"{name} in {dir} ({member})")
    for member in members
  ]
  names = content[layout.meta].get(layout.names_key)
  if (
    not isinstance(names, list)
    or len(names) != layout.num_classes
    or not all(isinstance(item, bytes | str) for item in names)
  ):
    got = len(names) if isinstance(names, list) else "none"
    raise ValueError(
      f"The file {layout.meta} of {name} in {dir} must list"
      f" {layout.num_classes} {layout.names_key}, got {got}. Download the"
      " archive again."
    )
  rows = np.concatenate([data for data, _ in parts])
  images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return Source(
    images=images,
    labels=np.concatenate([labels for _, labels in parts]),
    num_classes=layout.num_classes,
    class_names=tuple(
      item.decode("latin1") if isinstance(item, bytes) else item
      for item in names
    ),
    mean=layout.mean,
    std=layout.std,
    name=name,
  )
