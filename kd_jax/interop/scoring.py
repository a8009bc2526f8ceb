"""Scores and predictions of models: what `evaluate` and `predict` compute."""

import pathlib
from typing import Any

import jax
import numpy as np

from kd_jax import data
from kd_jax.data import images as images_lib
from kd_jax.interop import card as card_lib
from kd_jax.interop.model import Model


def evaluate(
  model: Model,
  source: data.Source | data.EncodedSource,
  *,
  batch_size: int = 500,
  teacher: Model | None = None,
) -> dict[str, Any]:
  """Score a model; every example counts once.

  Args:
    model: to score.
    source: the test set.
    batch_size: images at a time.
    teacher: another model, to compare with.

  Returns:
    "top1" and "top5" in percent, "ce" in nats, "ece" (see
    `calibration_error`) in percent, "examples"; with a teacher "teacher_top1"
    and "agreement", the share of images, in percent, for which both name the
    same class.

  Raises:
    ValueError: if the images or classes are not those of a model, or if no
      image could be decoded.
  """
  orders = [
    match_source(each.card, source)
    for each in (model, *([teacher] if teacher else []))
  ]
  rows: dict[str, list[np.ndarray]] = {}

  def keep(name: str, values: np.ndarray, mask: np.ndarray) -> None:
    rows.setdefault(name, []).append(np.asarray(values, np.float64)[mask])

  for batch in data.eval_stream(source, batch_size):
    labels, mask = batch["label"], batch["mask"]
    logits = np.asarray(model.logits(batch["image"]))[:, orders[0]]
    log_p = _log_probabilities(logits)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    # Ties count against the label, NaNs too: they are never smaller.
    rank = logits.shape[1] - np.sum(logits < own, axis=1)
    chosen = logits.argmax(axis=1)
    keep("top1", 100.0 * (rank <= 1), mask)
    keep("top5", 100.0 * (rank <= 5), mask)
    keep("ce", -np.take_along_axis(log_p, labels[:, None], axis=1)[:, 0], mask)
    keep("confidence", np.exp(log_p.max(axis=1)), mask)
    keep("correct", chosen == labels, mask)
    if teacher is not None:
      theirs = np.asarray(teacher.logits(batch["image"]))[:, orders[1]]
      theirs = theirs.argmax(axis=1)
      keep("agreement", 100.0 * (chosen == theirs), mask)
      keep("teacher_top1", 100.0 * (theirs == labels), mask)
  joined = {name: np.concatenate(parts) for name, parts in rows.items()}
  if not joined["ce"].size:
    raise ValueError(
      "expected images to score, got none: not one could be decoded. Check the"
      " data"
    )
  confidence, correct = joined.pop("confidence"), joined.pop("correct")
  return {
    **{name: float(values.mean()) for name, values in joined.items()},
    "ece": 100 * calibration_error(confidence, correct),
    "examples": len(correct),
  }


def calibration_error(
  confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15
) -> float:
  """Compute the expected calibration error (Guo et al., ICML 2017, eq. 3).

  Predictions are sorted into bins of equal width by their confidence; the
  error is the mean over them of |accuracy - confidence| of their bin.

  Args:
    confidence: [N], the probability of the predicted class.
    correct: [N] bool.
    bins: how many; the m-th holds ((m - 1) / bins, m / bins].

  Returns:
    Between 0 and 1.
  """
  # The NaNs of a diverged network give NaN.
  with np.errstate(invalid="ignore"):
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.asarray(correct, np.float64) - confidence
  sums = np.bincount(bin_of, weights=gaps, minlength=bins)
  return float(np.abs(sums).sum() / len(confidence))


def top_classes(
  model: Model, images: np.ndarray, *, k: int = 5
) -> list[list[tuple[str, float]]]:
  """Find the most probable classes of each image.

  Args:
    model: that predicts.
    images: uint8 [B, H, W, 3].
    k: how many; at most the number of classes.

  Returns:
    For each image (class name, probability), the most probable first.
  """
  probabilities = np.exp(_log_probabilities(model.logits(images)))
  names = model.card["class_names"]
  order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :k]
  return [
    [(names[i], float(row[i])) for i in best]
    for row, best in zip(probabilities, order, strict=True)
  ]


def read_image(path: pathlib.Path, card: dict[str, Any]) -> np.ndarray:
  """Read an image file as the evaluation of a model does.

  The shorter side is resized as the model's data were, and the centre cut out.

  Args:
    path: of a format that `kd_jax.data.images` reads.
    card: the model's.

  Returns:
    uint8 [height, width, 3].

  Raises:
    BadImageError: if it is not an image.
    UnreadableError: if it cannot be read.
  """
  if path.exists() and not path.is_file():  # a pipe would wait for its writer
    raise data.UnreadableError(
      f"{path}: expected an image file, got a pipe or a device"
    )
  size = card["image_shape"][0]
  image = images_lib.load(images_lib.read_file(path), str(path))
  return images_lib.evaluate_crop(
    image, size=size, resize=card.get("resize") or size
  )


def _log_probabilities(logits: jax.Array | np.ndarray) -> np.ndarray:
  wide = np.asarray(logits, np.float64)
  wide -= wide.max(axis=1, keepdims=True)
  return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def match_source(
  card: dict[str, Any], source: data.Source | data.EncodedSource
) -> np.ndarray | slice:
  """Match a model to data: its images' shape and its classes.

  Returns:
    Index of the logits that puts them into the data's order.

  Raises:
    ValueError: if they differ, see also `card.match_classes`.
  """
  for what, expected, got in (
    ("classes", card["num_classes"], source.num_classes),
    ("image shape", card["image_shape"], list(source.image_shape)),
  ):
    if expected != got:
      raise ValueError(
        f"{what}: the model takes {expected}, {source.name} has {got}."
        f" It was trained on {card['trained_on']}; choose data like it"
      )
  what = f"{card['architecture']} on {source.name}"
  order = card_lib.match_classes(card["class_names"], source.class_names, what)
  return slice(None) if order is None else order
