"""Classifies image files with an exported model.

python -m kd_jax predict --model DIR image.png ...
"""

import argparse
import pathlib

import jax
import numpy as np
from PIL import Image

from kd_jax.cli import convert
from kd_jax.data import images
from kd_jax.interop import model as model_lib
from kd_jax.interop import opening
from kd_jax.runs import logs


def read_image(path: pathlib.Path, *, height: int, width: int) -> np.ndarray:
  """Reads an image file as the model wants it.

  Args:
    path: of the formats that `kd_jax.data.images` reads.
    height: in pixels; another size is resized (bilinear, antialiased).
    width: in pixels.

  Returns:
    uint8 [height, width, 3].

  Raises:
    BadImageError: if it is no image.
    UnreadableError: if it cannot be read.
  """
  image = images.load(images.read_file(path), str(path))
  if image.size != (width, height):
    image = image.resize((width, height), Image.Resampling.BILINEAR)
  return np.asarray(image, np.uint8)


def top_classes(
  model: model_lib.Model, images: np.ndarray, *, k: int = 5
) -> list[list[tuple[str, float]]]:
  """The most probable classes of each image.

  Args:
    model: an exported model.
    images: uint8 [B, H, W, 3].
    k: how many; at most the number of classes.

  Returns:
    For each image (class name, probability), the most probable first.
  """
  probabilities = np.asarray(jax.nn.softmax(model.logits(images), axis=-1))
  names = model.card["class_names"]
  order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :k]
  return [
    [(names[i], float(row[i])) for i in best]
    for row, best in zip(probabilities, order, strict=True)
  ]


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax predict",
    description="Prints the five most probable classes of each image.",
  )
  convert.add_model_arguments(parser)
  parser.add_argument("images", nargs="+", type=pathlib.Path)
  args = parser.parse_args()
  logs.configure_logging()
  try:
    model = opening.open_model(args.model, model_name=args.model_name)
    height, width, _ = model.card["image_shape"]
    pictures = [read_image(p, height=height, width=width) for p in args.images]
  except (ValueError, ImportError, images.UnreadableError) as error:
    parser.exit(2, f"{error}\n")
  answers = top_classes(model, np.stack(pictures))
  for path, best in zip(args.images, answers, strict=True):
    shown = ", ".join(f"{name} {100 * p:.1f} %" for name, p in best)
    print(f"{path}: {shown}")
