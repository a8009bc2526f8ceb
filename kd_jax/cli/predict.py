"""Classifies image files: `python -m kd_jax predict --model DIR image.png`.

A folder stands for all images in it. An image that cannot be read is named,
the others are answered, and the exit code is 1.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from kd_jax import data
from kd_jax.cli import arguments
from kd_jax.data import folder
from kd_jax.interop import opening, scoring
from kd_jax.interop.model import Model

_BATCH = 64


def main() -> None:
  """Run the command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax predict",
    description="Prints the (at most five) most probable classes of images.",
  )
  arguments.add_model_arguments(parser)
  arguments.add_origin_arguments(parser)
  parser.add_argument(
    "images", nargs="+", type=arguments.path, help="files, and folders of them"
  )
  args = parser.parse_args()
  with arguments.exit_on_error(parser):
    model = opening.open_model(
      args.model,
      model_name=args.model_name,
      origin=opening.Origin(args.data, args.image_size),
    )
    paths = list(itertools.chain.from_iterable(map(_list, args.images)))
    bad = 0
    for start in range(0, len(paths), _BATCH):
      bad += _answer(model, paths[start : start + _BATCH], len(paths))
  if bad:
    sys.exit(1)


def _list(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A file, or the images in a folder."""
  if not path.is_dir():
    yield path
    return
  found = folder.image_files(str(path))
  if not found:
    raise ValueError(f"{path}: expected images in the folder, found none")
  yield from map(pathlib.Path, found)


def _answer(model: Model, paths: list[pathlib.Path], total: int) -> int:
  """Print the answers for some images; returns how many are bad."""
  images = []
  for path in paths:
    try:
      images.append((path, scoring.read_image(path, model.card)))
    except (data.BadImageError, data.UnreadableError) as error:
      print(error, file=sys.stderr)
  if images:
    batch = np.stack([image for _, image in images])
    if total > _BATCH:  # one shape, so that it compiles once
      batch = np.resize(batch, (_BATCH, *batch.shape[1:]))
    answers = scoring.top_classes(model, batch)
    for (path, _), best in zip(images, answers, strict=False):
      shown = ", ".join(f"{name} {100 * p:.1f} %" for name, p in best)
      print(f"{path}: {shown}")
  return len(paths) - len(images)
