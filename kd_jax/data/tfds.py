"""TensorFlow Datasets, read without TensorFlow once they are prepared.

CIFAR is read into memory; ImageNet stays in its records, which are read and
decoded one by one.
"""

import dataclasses
import importlib.util
import logging
import os
import pathlib
import socket
from typing import Any

import numpy as np

from kd_jax.data import cifar
from kd_jax.data.common import EncodedSource, Source
from kd_jax.data.images import BadImageError

_log = logging.getLogger(__name__)

# Records in memory at a time, of about 100 KB each.
_CHUNK = 1024


class StaleLabelsError(ValueError):
  """A list of labels does not fit the records beside it."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RecordSource(EncodedSource):
  """Records of TensorFlow Datasets; see `EncodedSource`.

  Attributes:
    records: N records, each {"image": bytes, "label": int}; pickles.
    split: TFDS's name of the split.
  """

  records: Any
  split: str

  def __len__(self) -> int:
    return len(self.records)

  def read_bytes(self, i: int) -> bytes:
    """Reads the encoded image of record `i`.

    Raises:
      BadImageError: the record cannot be read.
      StaleLabelsError: its label is not `labels[i]`.
    """
    try:
      record = self.records[i]
      # How the reader returns a record that is cut short.
      if record["image"] is None or record["label"] is None:
        raise EOFError("the record is empty")
    # The record reader raises errors of its own.
    except Exception as error:
      raise BadImageError(
        f"{self.describe(i)}: expected a record with an image, got"
        f" {type(error).__name__}: {error}"
      ) from error
    if record["label"] != self.labels[i]:
      raise StaleLabelsError(
        f"{self.describe(i)} has the label {record['label']}, expected"
        f" {self.labels[i]} as in the list of labels: the records have changed"
        " since it was written. Delete the files kd_jax_labels_*.npy beside"
        " them."
      )
    return record["image"]

  def describe(self, i: int) -> str:
    """Names record `i`, for messages."""
    return f"record {i} of {self.name} ({self.split})"


def _read_labels(records: Any, path: pathlib.Path) -> np.ndarray:
  """Lists the records' labels in a file once, and reads them from there later.

  A label lies in a record behind the image, so listing them reads the whole
  set: 1.5 minutes for ImageNet if the disk is fast.

  Args:
    records: N records, as in `RecordSource`.
    path: of the list; written if it does not exist and the folder is writable.

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
  # Several processes may write at once, each the same list. Containers on two
  # machines may have the same process id.
  me = f"{socket.gethostname()}-{os.getpid()}"
  part = path.with_name(f"{path.name}.{me}")
  try:
    with part.open("wb") as file:
      np.save(file, labels)
    part.replace(path)
  except OSError as error:
    part.unlink(missing_ok=True)
    _log.warning(
      "Could not write the labels to %s (%s): the next start lists them again",
      path,
      error,
    )
  return labels


# Sets of the publisher's files that hold the same images.
_PUBLISHED = {"imagenet2012": "imagenet"}


def _import_tfds(name: str) -> Any:
  dataset = name.removeprefix("tfds:")
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise ImportError(
      f"The data set {name} needs the package tensorflow-datasets. Install it"
      " (pip install tensorflow-datasets array_record), or use the data"
      f" set {_PUBLISHED.get(dataset, dataset)} (the publisher's files)."
    ) from error
  return tfds


def _tfds_builder(tfds: Any, dataset: str, directory: str) -> Any:
  """The builder of a set, which it prepares for random access if needed."""
  # The folder of the config, then TFDS's own.
  searched, other_format = [], None
  for data_dir in (directory, None):
    builder = tfds.builder(dataset, data_dir=data_dir)
    searched.append(str(builder.data_dir))
    if builder.is_prepared():
      formats = {item.value for item in builder.info.available_file_formats()}
      if "array_record" in formats:
        return builder
      other_format = str(builder.data_dir)
  if other_format is not None:
    raise ValueError(
      f"tfds:{dataset} is prepared in {other_format} in a format that cannot"
      " be read without TensorFlow, expected array_record. Prepare it with"
      ' file_format="array_record" in another folder, and name that one with'
      " --config.data.dir=FOLDER."
    )
  if importlib.util.find_spec("tensorflow") is None:
    raise ValueError(
      f"tfds:{dataset} is not prepared (looked in {' and '.join(searched)}),"
      " and preparing it needs TensorFlow, which is not installed. Either"
      " pip install tensorflow (needed only once) and start again, or prepare"
      f' it elsewhere with tfds.builder("{dataset}", data_dir=FOLDER,'
      ' file_format="array_record").download_and_prepare() and name that'
      " folder with --config.data.dir=FOLDER, or use the data set"
      f" {_PUBLISHED.get(dataset, dataset)} (the publisher's files)."
    )
  builder = tfds.builder(
    dataset, data_dir=directory, file_format="array_record"
  )
  builder.download_and_prepare()
  return builder


def _damaged_records(
  name: str, split: str, builder: Any, error: Exception
) -> ValueError:
  return ValueError(
    f"The {split} records of {name} are cut short or damaged, got"
    f" {type(error).__name__}: {error}. Delete {builder.data_dir} and prepare"
    " it again."
  )


def load_cifar(name: str, *, split: str, dir: str | os.PathLike[str]) -> Source:
  """Loads "tfds:cifar10" or "tfds:cifar100"; see `kd_jax.data.load`."""
  dataset = name.removeprefix("tfds:")
  tfds = _import_tfds(name)
  builder = _tfds_builder(tfds, dataset, os.fspath(dir))
  try:
    found = builder.as_data_source(split, file_format="array_record")
    examples = found.__getitems__(range(len(found)))
  # The record reader and the image decoder raise errors of their own.
  except Exception as error:
    raise _damaged_records(name, split, builder, error) from error
  layout = cifar.LAYOUTS[dataset]
  return Source(
    images=np.stack([example["image"] for example in examples]),
    labels=np.array([example["label"] for example in examples], np.int32),
    num_classes=builder.info.features["label"].num_classes,
    class_names=tuple(builder.info.features["label"].names),
    mean=layout.mean,
    std=layout.std,
    name=name,
  )


def load_imagenet(
  name: str,
  *,
  split: str,
  dir: str | os.PathLike[str],
  image_size: int = 224,
  resize: int = 0,
  on_bad_image: str = "error",
) -> RecordSource:
  """Opens the records of "tfds:imagenet2012"; see `kd_jax.data.load`."""
  tfds = _import_tfds(name)
  dataset = name.removeprefix("tfds:")
  builder = _tfds_builder(tfds, dataset, os.fspath(dir))
  published = {"train": "train", "test": "validation"}[split]
  try:
    found = builder.as_data_source(
      published,
      file_format="array_record",
      decoders={"image": tfds.decode.SkipDecoding()},
    )
    path = pathlib.Path(builder.data_dir) / f"kd_jax_labels_{published}.npy"
    labels = _read_labels(found, path)
  except StaleLabelsError:
    raise
  # The record reader raises errors of its own.
  except Exception as error:
    raise _damaged_records(name, split, builder, error) from error
  feature = builder.info.features["label"]
  return RecordSource(
    records=found,
    split=published,
    labels=labels,
    num_classes=feature.num_classes,
    class_names=tuple(feature.names),
    name=name,
    image_size=image_size,
    resize=resize,
    on_bad_image=on_bad_image,
  )
