"""CIFAR-10 and CIFAR-100 in the publisher's python version.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import dataclasses
import gzip
import io
import os
import pathlib
import tarfile
import zlib
from typing import Any

import numpy as np

from kd_jax.data import safe_pickle
from kd_jax.data.common import Constants, Source, check_labels


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
      read[member] = safe_pickle.load(file, str(path))
  return read


def _read_archive(
  archive: pathlib.Path, folder: str, members: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
  wanted = {f"{folder}/{member}": member for member in members}
  read = {}
  try:
    # In the order of the archive, so that it is decompressed only once, and to
    # its very end, where gzip keeps the checksum.
    with (
      gzip.open(archive) as stream,
      tarfile.open(fileobj=stream, mode="r:") as tar,
    ):
      for entry in tar:
        member = wanted.get(entry.name.removeprefix("./"))
        file = tar.extractfile(entry) if member else None
        if member is None or file is None:
          continue
        content = io.BytesIO(file.read())
        read[member] = safe_pickle.load(content, f"{archive}: {entry.name}")
      while stream.read(1 << 20):
        pass
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise ValueError(
      f"{archive} is cut short or damaged: expected a whole .tar.gz archive,"
      f" got {type(error).__name__}: {error}. Delete it and download it again."
    ) from error
  missing = sorted(set(members) - set(read))
  if missing:
    raise ValueError(
      f"{archive} lacks {', '.join(missing)} (expected {', '.join(wanted)}):"
      " it is cut short or another archive. Download it again."
    )
  return read


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
        f"{where} has no {key!r}, got {sorted(content)}: it is of another"
        " data set. Check the folder, or the data set's name."
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
  if not isinstance(labels, list) or not all(
    isinstance(label, int) for label in labels
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
  # int64 first: a label may be too large for int32.
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
    _rows(content[member], layout, f"{name} ({member})") for member in members
  ]
  names = content[layout.meta].get(layout.names_key)
  if not isinstance(names, list) or len(names) != layout.num_classes:
    got = len(names) if isinstance(names, list) else "none"
    raise ValueError(
      f"The file {layout.meta} of {name} must list {layout.num_classes}"
      f" {layout.names_key}, got {got}. Download the archive again."
    )
  rows = np.concatenate([data for data, _ in parts])
  images = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return Source(
    images=images,
    labels=np.concatenate([labels for _, labels in parts]),
    num_classes=layout.num_classes,
    class_names=tuple(
      item.decode("latin1") if isinstance(item, bytes) else str(item)
      for item in names
    ),
    mean=layout.mean,
    std=layout.std,
    name=name,
  )
