"""Labelled sets of encoded images in records with random access."""

import dataclasses
import logging
import os
import pathlib
import socket
from typing import Any

import numpy as np

from kd_jax.data import folder, images

_log = logging.getLogger(__name__)

# Records of about 100 KB that are in memory at a time.
_CHUNK = 1024


class StaleLabelsError(ValueError):
  """A list of labels that does not fit the records beside it."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RecordSource(folder.EncodedSource):
  """Records of TensorFlow Datasets; see `EncodedSource`.

  Attributes:
    records: N records, each {"image": bytes, "label": int}; pickles.
    split: what the records are called beside `name`.
  """

  records: Any
  split: str

  def __len__(self) -> int:
    return len(self.records)

  def read_bytes(self, i: int) -> bytes:
    """The encoded image of record `i`.

    Raises:
      BadImageError: the record cannot be read.
      StaleLabelsError: its label is not `labels[i]`: they are of other records.
    """
    try:
      record = self.records[i]
      # What the reader makes of a file that is cut short.
      if record["image"] is None or record["label"] is None:
        raise EOFError("the record is empty")
    # The record reader raises errors of its own.
    except Exception as error:
      raise images.BadImageError(
        f"{self.describe(i)}: expected a record with an image, got one that"
        f" cannot be read ({type(error).__name__}: {error})"
      ) from error
    if record["label"] != self.labels[i]:
      raise StaleLabelsError(
        f"{self.describe(i)} has the label {record['label']}, expected"
        f" {self.labels[i]}, as when the labels were listed: the records were"
        " prepared anew since. Delete the files kd_jax_labels_*.npy beside"
        " them."
      )
    return record["image"]

  def describe(self, i: int) -> str:
    """The number of record `i`."""
    return f"record {i} of {self.name} ({self.split})"


def read_labels(records: Any, path: pathlib.Path) -> np.ndarray:
  """The records' labels, listed in a file once and read from there again.

  A label lies in a record behind the image, so that listing them reads the
  whole set: 1.5 minutes for ImageNet's where the disk does not hold it up.

  Args:
    records: N records, as in `RecordSource`.
    path: the list, written if it does not exist and the folder allows it.

  Returns:
    int32 [N].

  Raises:
    StaleLabelsError: the list does not fit the records.
  """
  count = len(records)
  if path.is_file():
    try:
      labels = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
      raise StaleLabelsError(
        f"{path}: expected a list of labels, got {error}. Delete it."
      ) from error
    if labels.shape != (count,) or labels.dtype != np.int32:
      raise StaleLabelsError(
        f"{path}: expected the int32 labels of {count} records, got"
        f" {labels.dtype} {labels.shape}. Delete it."
      )
    return labels
  _log.info("Listing the labels of %d records, once", count)
  labels = np.empty(count, np.int32)
  for start in range(0, count, _CHUNK):
    chunk = range(start, min(start + _CHUNK, count))
    labels[chunk.start : chunk.stop] = [
      record["label"] for record in records.__getitems__(chunk)
    ]
  # Several processes may be here: each replaces the list by an equal one.
  # Containers on two machines may have the same process id.
  me = f"{socket.gethostname()}-{os.getpid()}"
  part = path.with_name(f"{path.name}.{me}")
  try:
    with part.open("wb") as file:
      np.save(file, labels)
    part.replace(path)
  except OSError as error:
    part.unlink(missing_ok=True)
    _log.warning(
      "Could not keep the labels in %s (%s): the next start lists them again",
      path,
      error,
    )
  return labels
