"""Classifies image files: `python -m kd_jax predict --model DIR image.png`."""

import argparse
import pathlib

import numpy as np

from kd_jax.cli import arguments
from kd_jax.interop import opening, scoring


def main() -> None:
  """Run the command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax predict",
    description="Prints the (at most five) most probable classes of images.",
  )
  arguments.add_model_arguments(parser)
  arguments.add_origin_arguments(parser)
  parser.add_argument("images", nargs="+", type=pathlib.Path)
  args = parser.parse_args()
  with arguments.exit_on_error(parser):
    model = opening.open_model(
      args.model,
      model_name=args.model_name,
      origin=opening.Origin(args.data, args.image_size),
    )
    images = [scoring.read_image(path, model.card) for path in args.images]
    answers = scoring.top_classes(model, np.stack(images))
  for path, best in zip(args.images, answers, strict=True):
    shown = ", ".join(f"{name} {100 * p:.1f} %" for name, p in best)
    print(f"{path}: {shown}")
