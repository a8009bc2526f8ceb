"""The model card of an export: `model.json`."""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax import storage

FORMAT = "kd_jax export 2"
CARD = "model.json"
# Options of `data.load`, besides the name, that change what a model sees.
DATA_OPTIONS = ("image_size", "resize", "num_examples", "num_classes")


def make(
  architecture: str,
  *,
  num_classes: int,
  image_shape: Sequence[int],
  class_names: Sequence[str],
  mean: Sequence[float],
  std: Sequence[float],
  trained_on: str,
  data_options: Mapping[str, Any],
  resize: int | None = None,
  dtype: str = "float32",
  head: Mapping[str, Any] | None = None,
  method: str = "none",
  test: Mapping[str, float] | None = None,
) -> dict[str, Any]:
  """Make the card of a model: all that building and using it takes.

  Args:
    architecture: name of the network, see `kd_jax.models.names()`.
    num_classes: width of its logits.
    image_shape: (height, width, channels) of its images.
    class_names: one a class.
    mean: of the training images, per channel, in 0..1.
    std: likewise.
    trained_on: name of the data set.
    data_options: what `data.load` was given besides the name; see
      `DATA_OPTIONS`.
    resize: pixels of the shorter side before the centre crop of evaluation;
      None: data without image files, whose images are not cropped.
    dtype: of the arithmetic.
    head: the reused classifier, see `reused_head`; None: the network's own.
    method: that trained it.
    test: scores on the test set.

  Returns:
    JSON-able content of `model.json`.
  """
  return {
    "format": FORMAT,
    "architecture": architecture,
    "num_classes": num_classes,
    "image_shape": list(image_shape),
    "dtype": dtype,
    "batch_norm_folded": False,
    "head": head,
    "class_names": list(class_names),
    "normalization": {
      "mean": [float(v) for v in mean],
      "std": [float(v) for v in std],
      "of": "pixel / 255, per channel: (x - mean) / std",
    },
    "trained_on": trained_on,
    "data_options": dict(data_options),
    "resize": resize,
    "method": method,
    "test": dict(test or {}),
  }


def reused_head(
  distiller: dict[str, Any],
  *,
  names: Sequence[str],
  weights: Sequence[float],
  maps: Sequence[Sequence[int]],
) -> dict[str, Any]:
  """Make a card's `head`: whose classifier a student reuses.

  Args:
    distiller: name of the method and fields of its module.
    names: of the teachers' networks.
    weights: of the teachers.
    maps: (height, width, channels) of their last maps.
  """
  return {
    "distiller": distiller,
    "teachers": list(names),
    "weights": [float(w) for w in weights],
    "teacher_maps": [list(shape) for shape in maps],
  }


def require_imported(card: Mapping[str, Any]) -> None:
  """Raise ValueError if a card names code that nobody has imported.

  A card may name a user's own network or method, "package.module:attribute".
  A card is data, so building its model must not import a module that the
  reader of the card never named.
  """
  head = card["head"] or {"distiller": {"name": ""}}
  for name in (card["architecture"], head["distiller"]["name"]):
    module, colon, _ = str(name).partition(":")
    if colon and module not in sys.modules:
      raise ValueError(
        f"the model card asks for {name}, which is code outside kd_jax. If you"
        f" trust it, import {module} first, or give {name} as the model's name"
      )


def describe(card: Mapping[str, Any]) -> str:
  """Describe the model in a few words."""
  words = card["architecture"]
  if card["head"] is not None:
    words += f" with the classifier of {' and '.join(card['head']['teachers'])}"
  return f"{words}, {card['num_classes']} classes"


def read_card_or_none(directory: pathlib.Path) -> dict[str, Any] | None:
  """Read the model card of an export; None if the folder is not one."""
  card = storage.read_json(directory / CARD)
  if isinstance(card, dict) and card.get("format") == FORMAT:
    return card
  return None


def read_card(directory: pathlib.Path) -> dict[str, Any]:
  """Read the model card of an export.

  Raises:
    ValueError: if the folder is not an export.
  """
  card = read_card_or_none(directory)
  if card is None:
    raise ValueError(
      f"{directory}: expected an export, a folder with {CARD} of format"
      f" {FORMAT!r}. Make one with python -m kd_jax export --workdir RUN --to"
      " DIR"
    )
  return card
