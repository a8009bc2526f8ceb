"""Source classes of all kinds of data sets, and their checks."""

import abc
import codecs
import dataclasses
import logging
import os
from collections.abc import Iterable

import numpy as np

from kd_jax.registry import did_you_mean

_log = logging.getLogger(__name__)

SPLITS = ("train", "test")
ON_BAD_IMAGE = ("error", "skip")

# Of ILSVRC 2012; torchvision, timm and SimKD normalise with these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def one_line(error: Exception) -> str:
  """An error of a library as the part of a message: its type and its text."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:200]}"


# More than any list of labels or words of a data set has.
_MAX_TEXT = 256 << 20


def read_text(path: str | os.PathLike[str]) -> str:
  """Reads a text file: UTF-8, UTF-16 with its mark, or else Latin-1.

  Raises:
    ValueError: it cannot be read, is too large or no text.
  """
  try:
    with open(path, "rb") as file:
      content = file.read(_MAX_TEXT + 1)
  except OSError as error:
    raise ValueError(
      f"{path}: expected a text file, got one that cannot be read"
      f" ({error.strerror}). Check the disk, or the file's permissions"
    ) from error
  try:
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if utf16 else "utf-8-sig")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    _log.warning(
      "%s, line %d: expected UTF-8, got other bytes; the file is read as"
      " Latin-1. Save it as UTF-8",
      *(path, line),
    )
    text = content.decode("latin-1")
  if len(content) > _MAX_TEXT or "\0" in text:
    raise ValueError(
      f"{path}: expected a text file of at most {_MAX_TEXT:,} bytes, got"
      f" {'more' if len(content) > _MAX_TEXT else 'one with null bytes'}."
      " Correct or remove it."
    )
  return text


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
  """Raises ValueError unless a value is one of the known ones."""
  known = list(known)
  if value not in known:
    raise ValueError(
      f"unknown {what} {value!r}.{did_you_mean(value, known)} Expected one of"
      f" {', '.join(known)}"
    )


def check_range(name: str, value: tuple[float, float], most: float) -> None:
  """Raises ValueError unless 0 < value[0] <= value[1] <= most."""
  if len(value) != 2 or not 0 < value[0] <= value[1] <= most:
    raise ValueError(
      f"{name} must be (least, largest) with 0 < least <= largest <= {most},"
      f" got {value}."
    )


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
  """Raises ValueError unless labels [N] are in 0..num_classes - 1."""
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if wrong.size:
    raise ValueError(
      f"The labels of {where} must be in 0..{num_classes - 1}"
      f" ({num_classes} classes), got {labels[wrong[0]]} at position"
      f" {wrong[0]} ({wrong.size} of {labels.size} are out of range)."
      " Correct the labels, or the number of classes."
    )


def _check_classes(
  labels: np.ndarray,
  count: int,
  num_classes: int,
  class_names: tuple[str, ...],
  where: str,
) -> None:
  """Raises ValueError unless labels, images and class names fit together."""
  if num_classes < 2:
    raise ValueError(
      f"{where} has {num_classes} class: expected at least 2. Check the folder,"
      " or the number of classes."
    )
  if labels.dtype != np.int32 or labels.shape != (count,):
    raise ValueError(
      f"The labels of {where} must be int32 [{count}], one per image, got"
      f" {labels.dtype} {labels.shape}."
    )
  if len(class_names) != num_classes:
    raise ValueError(
      f"{where} has {num_classes} classes but {len(class_names)} class names;"
      " give one name per class."
    )
  check_labels(labels, num_classes, where)


@dataclasses.dataclass(frozen=True)
class Constants:
  """What is known of a set without its files.

  Attributes:
    num_classes: K.
    class_names: K names, in the labels' order.
    image_shape: (height, width, channels) as networks take them.
    mean: per channel, of x / 255; see `Source`.
    std: per channel, of x / 255.
    resize: of image files, see `EncodedSource`.
  """

  num_classes: int
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  resize: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """One split of a labelled image set, in memory.

  Attributes:
    images: uint8 [N, H, W, 3]; kept C-contiguous.
    labels: int32 [N], in 0..num_classes - 1.
    num_classes: K.
    class_names: K names, in the labels' order.
    mean: per channel, of x / 255, of the training split.
    std: per channel, of x / 255, of the training split.
    name: as given to `load`.
  """

  images: np.ndarray
  labels: np.ndarray
  num_classes: int
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  name: str

  def __post_init__(self):
    images, labels = self.images, self.labels
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(
        f"The images of {self.name} must be uint8 [N, H, W, 3], got"
        f" {images.dtype} {images.shape}."
      )
    _check_classes(
      labels, len(images), self.num_classes, self.class_names, self.name
    )
    # With any other layout, numpy's take copies the whole set for every batch.
    object.__setattr__(self, "images", np.ascontiguousarray(images))
    object.__setattr__(self, "labels", np.ascontiguousarray(labels))

  def __len__(self) -> int:
    return len(self.images)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the network's input."""
    height, width, channels = self.images.shape[1:]
    return height, width, channels


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EncodedSource(abc.ABC):
  """One split of a labelled image set, as encoded files or records.

  Pickles, for worker processes.

  Attributes:
    labels: int32 [N], in 0..num_classes - 1.
    num_classes: K.
    class_names: K names, in the labels' order.
    mean: per channel, of x / 255, of the training split.
    std: per channel, of x / 255, of the training split.
    name: as given to `load`.
    image_size: height and width of the network's input, in pixels.
    resize: pixels of the shorter side before evaluation's centre crop; 0:
      `round(image_size * 256 / 224)`.
    on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
  """

  labels: np.ndarray
  num_classes: int
  class_names: tuple[str, ...]
  mean: tuple[float, ...] = IMAGENET_MEAN
  std: tuple[float, ...] = IMAGENET_STD
  name: str
  image_size: int = 224
  resize: int = 0
  on_bad_image: str = "error"

  def __post_init__(self):
    _check_classes(
      self.labels, len(self), self.num_classes, self.class_names, self.name
    )
    if not self.resize:
      object.__setattr__(self, "resize", round(self.image_size * 256 / 224))
    if not 1 <= self.image_size <= self.resize:
      raise ValueError(
        f"image_size must be at least 1 and at most resize ({self.resize}, the"
        " shorter side before the centre crop), got"
        f" {self.image_size}."
      )
    check_choice("on_bad_image", self.on_bad_image, ON_BAD_IMAGE)

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the network's input."""
    return self.image_size, self.image_size, 3

  @abc.abstractmethod
  def read_bytes(self, i: int) -> bytes:
    """Reads the encoded image at position `i`.

    Raises:
      UnreadableError: its file is gone or cannot be read.
      BadImageError: its record is damaged.
    """

  @abc.abstractmethod
  def describe(self, i: int) -> str:
    """Names the image at position `i`, for messages."""
