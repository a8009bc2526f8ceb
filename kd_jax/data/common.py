"""What every kind of source shares: constants, and errors worded once."""

import difflib
from collections.abc import Iterable

import numpy as np

SPLITS = ("train", "test")

# Of ILSVRC 2012; torchvision, timm and SimKD normalise with these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def unknown_name(what: str, name: str, names: Iterable[str]) -> ValueError:
  """The error for a name that is in no list, with the closest matches."""
  names = sorted(names)
  close = difflib.get_close_matches(name, names, n=3)
  hint = f" Did you mean {' or '.join(close)}?" if close else ""
  return ValueError(
    f"Unknown {what} {name!r}.{hint} Known: {', '.join(names)}."
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


def check_classes(
  labels: np.ndarray,
  count: int,
  num_classes: int,
  class_names: tuple[str, ...],
  where: str,
) -> None:
  """Raises ValueError unless labels, images and class names fit together."""
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
