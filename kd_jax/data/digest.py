"""Which images a set has: to tell that the data of a run have changed."""

import os
import zlib
from collections.abc import Iterable, Mapping
from typing import TypedDict

import numpy as np

from kd_jax.data.common import EncodedSource, Source
from kd_jax.data.folder import FolderSource
from kd_jax.data.images import BadImageError

# Images whose content is compared. The others' names and labels are.
_SAMPLE = 100


class Summary(TypedDict):
  """What is compared of a set.

  Attributes:
    class_names: in the labels' order.
    classes: for each class the number of its images, and a checksum of their
      files' names, or else of their positions.
    sample: checksums of the content of images that are evenly spaced.
  """

  class_names: list[str]
  classes: list[tuple[int, int]]
  sample: list[int]


def digest(source: Source | EncodedSource) -> str:
  """Describes which images a set has, independently of its folder.

  Args:
    source: the set.

  Returns:
    The number of images, and a checksum of their labels and, if there are
    files, of their paths below the folder that they share.
  """
  checksum = zlib.crc32(source.labels.tobytes())
  checksum = zlib.crc32("\n".join(_names(source)).encode(), checksum)
  return f"{len(source)} images with the checksum {checksum:08x}"


def summarize(source: Source | EncodedSource) -> Summary:
  """What `differences` compares; reads a hundred images."""
  names = np.array(_names(source), object)
  order = np.argsort(source.labels, kind="stable")
  counts = np.bincount(source.labels, minlength=source.num_classes)
  members = np.split(order.astype(np.int32), np.cumsum(counts)[:-1])
  return {
    "class_names": [_plain(name) for name in source.class_names],
    "classes": [
      (
        len(rows),
        zlib.crc32(
          "\n".join(names[rows]).encode() if len(names) else rows.tobytes()
        ),
      )
      for rows in members
    ],
    "sample": [_checksum(source, i) for i in _sampled(len(source))],
  }


def differences(
  before: Mapping[str, Summary], sources: Mapping[str, Source | EncodedSource]
) -> list[str]:
  """Names what differs between sets and their summaries, the worst first.

  Args:
    before: of `summarize`, by split.
    sources: the sets as they are now, by split.

  Returns:
    A text for each difference, "... before, ... now"; empty if there is none.
  """
  found = []
  for split, source in sources.items():
    old, new = before[split], summarize(source)
    found += [f"{split}: {text}" for text in _differences(old, new, source)]
  return found


def _differences(
  old: Summary, new: Summary, source: Source | EncodedSource
) -> list[str]:
  names, theirs = new["class_names"], old["class_names"]
  if names != theirs:
    if len(names) != len(theirs):
      return [f"{len(theirs)} classes before, {len(names)} now"]
    return _few(
      f"class {i} is {a!r} before, {b!r} now"
      for i, (a, b) in enumerate(zip(theirs, names))
      if a != b
    )
  if old["classes"] != new["classes"]:
    return _few(
      f"class {name!r} has {a[0]} images before, {b[0]} now"
      if a[0] != b[0]
      else f"class {name!r} has {a[0]} other images"
      for name, a, b in zip(names, old["classes"], new["classes"])
      if tuple(a) != tuple(b)
    )
  return _few(
    f"the content of {_where(source, i)} has changed"
    for i, a, b in zip(_sampled(len(source)), old["sample"], new["sample"])
    if a != b
  )


def _few(texts: Iterable[str]) -> list[str]:
  texts = list(texts)
  more = [f"and {len(texts) - 3} more like that"] if len(texts) > 3 else []
  return texts[:3] + more


def _plain(name: str) -> str:
  """A name as JSON can hold it: those of files may be of any bytes."""
  return name.encode("utf-8", "backslashreplace").decode()


def _names(source: Source | EncodedSource) -> list[str]:
  """The files' paths below the folder that they share; [] without files."""
  if not isinstance(source, FolderSource):
    return []
  start = len(os.path.commonpath([min(source.paths), max(source.paths)]))
  return [_plain(path[start:]) for path in source.paths]


def _sampled(count: int) -> list[int]:
  return np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist()


def _checksum(source: Source | EncodedSource, i: int) -> int:
  if isinstance(source, Source):
    return zlib.crc32(source.images[i].tobytes())
  try:
    return zlib.crc32(source.read_bytes(i))
  except BadImageError:  # left out, or an error when its turn comes
    return 0


def _where(source: Source | EncodedSource, i: int) -> str:
  return f"image {i}" if isinstance(source, Source) else source.describe(i)
