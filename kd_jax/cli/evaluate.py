"""Evaluates a model of any form on a test set.

    python -m kd_jax evaluate --model DIR --data ../data
    python -m kd_jax evaluate --model weights.pth --model_name vgg13 \\
        --data ../data --teacher runs/teacher

A model is an export, a finished run or a file of weights; data are a folder of
CIFAR's or ImageNet's layout, or a name of `kd_jax.data`.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from kd_jax import data
from kd_jax.cli import convert
from kd_jax.interop import opening
from kd_jax.interop.model import Model
from kd_jax.runs import logs
from kd_jax.training import eval_step, metrics


def evaluate(
  model: Model,
  source: data.Source | data.EncodedSource,
  *,
  batch_size: int = 500,
  teacher: Model | None = None,
) -> dict[str, Any]:
  """Scores a model; every example counts once.

  Args:
    model: to score.
    source: the test set.
    batch_size: images at a time.
    teacher: another model, to which it is compared.

  Returns:
    "top1" and "top5" in percent, "ce" in nats, "ece" (expected calibration
    error, see `metrics.calibration_error`) in percent, "examples"; with a
    teacher "agreement", the share of the images, in percent, for which both
    name the same class, and "teacher_top1".

  Raises:
    ValueError: if the images or classes are not those of a model.
  """
  for each in (model, *([teacher] if teacher else [])):
    _check(each.card, source)
  score = jax.jit(eval_step.prediction_sums)
  sums, confidences, hits, agreements, teacher_hits = [], [], [], [], []
  for batch in data.eval_stream(source, batch_size):
    label, mask = batch["label"], batch["mask"]
    logits = model.logits(batch["image"])
    sums.append(jax.device_get(score(logits, label, mask)))
    chosen, confidence = _choose(logits)
    confidences.append(confidence[mask])
    hits.append((chosen == label)[mask])
    if teacher is not None:
      theirs, _ = _choose(teacher.logits(batch["image"]))
      agreements.append((chosen == theirs)[mask])
      teacher_hits.append((theirs == label)[mask])
  stacked = {name: np.stack([s[name] for s in sums]) for name in sums[0]}
  correct = np.concatenate(hits)
  scores = {
    **metrics.means(stacked),
    "ece": 100
    * metrics.calibration_error(np.concatenate(confidences), correct),
    "examples": len(correct),
  }
  if teacher is not None:
    scores["agreement"] = 100 * float(np.concatenate(agreements).mean())
    scores["teacher_top1"] = 100 * float(np.concatenate(teacher_hits).mean())
  return scores


def _choose(logits: jax.Array) -> tuple[np.ndarray, np.ndarray]:
  """The most probable class of each row, and its probability."""
  wide = np.asarray(logits, np.float64)
  wide -= wide.max(axis=1, keepdims=True)
  return wide.argmax(axis=1), 1 / np.exp(wide).sum(axis=1)


def _check(
  card: dict[str, Any], source: data.Source | data.EncodedSource
) -> None:
  for what, expected, got in (
    ("classes", card["num_classes"], source.num_classes),
    ("image shape", card["image_shape"], list(source.image_shape)),
  ):
    if expected != got:
      raise ValueError(
        f"{what}: the model takes {expected}, {source.name} has {got}."
        f" It was trained on {card['trained_on']}; choose data like it"
      )


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax evaluate",
    description="Prints a model's top-1, top-5, cross-entropy and calibration.",
  )
  convert.add_model_arguments(parser)
  parser.add_argument(
    "--data",
    help="folder of a data set, or the name of one (default: what the model was"
    " trained on)",
  )
  parser.add_argument(
    "--data_dir", default="../data", help="folder of a data set that is named"
  )
  parser.add_argument(
    "--image_size", type=int, help="pixels (default: as the model was trained)"
  )
  parser.add_argument(
    "--resize",
    type=int,
    help="of image files: pixels of the shorter side before the centre crop"
    " (default: 256/224 of the image size)",
  )
  parser.add_argument(
    "--on_bad_image",
    choices=("error", "skip"),
    help="of image files that cannot be decoded (default: error)",
  )
  parser.add_argument("--split", default="test", choices=("test", "train"))
  parser.add_argument("--batch_size", type=int, default=500)
  parser.add_argument(
    "--teacher",
    type=pathlib.Path,
    help="another model, to print how often both name the same class",
  )
  parser.add_argument("--teacher_name", help="as --model_name")
  args = parser.parse_args()
  logs.configure_logging()
  try:
    model, source = _open(args)
    teacher = None
    if args.teacher is not None:
      teacher = opening.open_model(
        args.teacher,
        model_name=args.teacher_name,
        origin=opening.Origin(source=source),
      )
    scores = evaluate(
      model, source, batch_size=args.batch_size, teacher=teacher
    )
  except (ValueError, ImportError, data.UnreadableError) as error:
    parser.exit(2, f"{error}\n")
  line = (
    f"{model.card['architecture']} on {source.name} ({args.split},"
    f" {scores['examples']} images): top-1 {scores['top1']:.2f} %, top-5"
    f" {scores['top5']:.2f} %, cross-entropy {scores['ce']:.4f}, calibration"
    f" error {scores['ece']:.2f} %"
  )
  if teacher is not None:
    line += (
      f", agreement with {teacher.card['architecture']} (top-1"
      f" {scores['teacher_top1']:.2f} %) {scores['agreement']:.2f} %"
    )
  print(line)


def _open(
  args: argparse.Namespace,
) -> tuple[Model, data.Source | data.EncodedSource]:
  """The model, and the data that it is asked about or was trained on."""
  given = {
    name: getattr(args, name)
    for name in ("image_size", "resize", "on_bad_image")
    if getattr(args, name) is not None
  }

  def load(name: str, folder: str, **options: Any) -> Any:
    return data.load(name, split=args.split, dir=folder, **{**options, **given})

  if args.data is not None and pathlib.Path(args.data).is_dir():
    source = load(data.detect(args.data), args.data)
    model = _open_model(args, opening.Origin(source=source))
    return model, _at_size(source, model, args)
  model = _open_model(args, opening.Origin(args.data, args.image_size))
  trained_on = model.card["trained_on"]
  name = args.data or trained_on
  options = model.card["data_options"] if name == trained_on else {}
  return model, _at_size(load(name, args.data_dir, **options), model, args)


def _at_size(source: Any, model: Model, args: argparse.Namespace) -> Any:
  """Images in files at the size that the model was trained at."""
  size = model.card["image_shape"][0]
  if args.image_size is not None or not isinstance(source, data.EncodedSource):
    return source
  if size == source.image_size:
    return source
  return dataclasses.replace(source, image_size=size, resize=args.resize or 0)


def _open_model(args: argparse.Namespace, origin: opening.Origin) -> Model:
  return opening.open_model(
    args.model, model_name=args.model_name, origin=origin
  )
