"""Scores a model of any form on a data set.

    python -m kd_jax evaluate --model DIR --data ../data
    python -m kd_jax evaluate --model weights.pth --model_name vgg13 \\
        --data ../data --teacher runs/teacher
"""

import argparse
import functools
import pathlib
from typing import Any

from kd_jax import data
from kd_jax.cli import arguments
from kd_jax.interop import opening, scoring
from kd_jax.interop.model import Model


def main() -> None:
  """Run the command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax evaluate",
    description="Prints a model's top-1, top-5, cross-entropy and calibration.",
  )
  arguments.add_model_arguments(parser)
  parser.add_argument(
    "--data",
    help="folder of a data set, or the name of one (default: what the model was"
    " trained on)",
  )
  parser.add_argument(
    "--data_dir", default="../data", help="folder of a data set that is named"
  )
  parser.add_argument(
    "--image_size",
    type=arguments.positive,
    help="pixels (default: as the model was trained)",
  )
  parser.add_argument(
    "--resize",
    type=arguments.positive,
    help="of image files: pixels of the shorter side before the centre crop"
    " (default: as the model was trained)",
  )
  parser.add_argument(
    "--on_bad_image",
    choices=("error", "skip"),
    help="of image files that cannot be decoded (default: error)",
  )
  parser.add_argument("--split", default="test", choices=("test", "train"))
  parser.add_argument("--batch_size", type=arguments.positive, default=500)
  parser.add_argument(
    "--teacher",
    type=arguments.path,
    help="another model, to print how often both name the same class",
  )
  parser.add_argument("--teacher_name", help="as --model_name")
  args = parser.parse_args()
  with arguments.exit_on_error(parser):
    model, source = _open(args)
    teacher = None
    if args.teacher is not None:
      teacher = opening.open_model(
        args.teacher,
        model_name=args.teacher_name,
        origin=opening.Origin(source=source),
      )
    scores = scoring.evaluate(
      model, source, batch_size=args.batch_size, teacher=teacher
    )
    print(_line(args, model, source, teacher, scores))


def _line(
  args: argparse.Namespace,
  model: Model,
  source: data.Source | data.EncodedSource,
  teacher: Model | None,
  scores: dict[str, Any],
) -> str:
  """The scores in words."""
  top = [f"top-1 {scores['top1']:.2f} %"]
  if source.num_classes > 5:
    top.append(f"top-5 {scores['top5']:.2f} %")
  line = (
    f"{model.card['architecture']} on {source.name} ({args.split},"
    f" {scores['examples']} images): {', '.join(top)}, cross-entropy"
    f" {scores['ce']:.4f}, calibration error {scores['ece']:.2f} %"
  )
  if teacher is not None:
    line += (
      f", agreement with {teacher.card['architecture']} (top-1"
      f" {scores['teacher_top1']:.2f} %) {scores['agreement']:.2f} %"
    )
  return line


def _open(
  args: argparse.Namespace,
) -> tuple[Model, data.Source | data.EncodedSource]:
  """Open the model, and the data that --data names or it was trained on."""
  given = {
    name: getattr(args, name)
    for name in ("image_size", "resize", "on_bad_image")
    if getattr(args, name) is not None
  }
  name, folder = args.data, args.data_dir
  if name is not None and pathlib.Path(name).expanduser().is_dir():
    name, folder = data.detect(name), name

  def load(**options: Any) -> Any:
    return data.load(name, split=args.split, dir=folder, **{**options, **given})

  # A file without a card has its classes and its normalisation from the data.
  known = functools.cache(load)
  origin = opening.Origin(name, args.image_size)
  if folder == args.data or name == "folder":
    origin = opening.Origin(source=known)
  model = opening.open_model(
    args.model, model_name=args.model_name, origin=origin
  )
  if known.cache_info().currsize:
    return model, known()
  card = model.card
  name = name or card["trained_on"]
  options = dict(card["data_options"]) if name == card["trained_on"] else {}
  if "resize" in data.options(name):
    options["image_size"] = card["image_shape"][0]
    # Another size has a resize of its own.
    options["resize"] = None if "image_size" in given else card.get("resize")
  return model, load(**options)
