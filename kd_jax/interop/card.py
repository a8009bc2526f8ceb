"""The model card of an export: `model.json`."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from kd_jax import data, storage
from kd_jax.distillers import base
from kd_jax.interop import model as model_lib
from kd_jax.interop.model import Model

FORMAT = "kd_jax export 2"


CARD = "model.json"


# Fields of `config.data` that `data.load` is given beside the name, and that
# what a model sees depends on.
DATA_OPTIONS = ("image_size", "resize", "num_examples", "num_classes")


@dataclasses.dataclass(frozen=True)
class Teacher:
  """What a student's export needs to know of a teacher.

  Attributes:
    name: of its network.
    network: the network.
    variables: its variables.
    weight: its share in the loss.
  """

  name: str
  network: Any
  variables: Any
  weight: float = 1.0


def model_card(
  config: ConfigDict,
  *,
  source: data.Source | data.EncodedSource,
  distiller: base.Distiller,
  teachers: Sequence[Teacher],
  scores: dict[str, float],
) -> dict[str, Any]:
  """Says all that is needed to build the model again and to use it.

  Args:
    config: of the run.
    source: the training set.
    distiller: the method.
    teachers: whose variables are not looked at.
    scores: of the test set, for the arrays that the card goes with.

  Returns:
    JSON-able content of `model.json`.
  """
  shape = source.image_shape
  head = None
  if distiller.predicts_with_teacher_head:
    maps = [
      model_lib.output_shapes(t.network, shape).features["last"].shape[1:]
      for t in teachers
    ]
    head = reused_head(
      config.distiller.to_dict(),
      names=[t.name for t in teachers],
      weights=[t.weight for t in teachers],
      maps=maps,
    )
  return {
    "format": FORMAT,
    "architecture": config.student.name,
    "num_classes": source.num_classes,
    "image_shape": list(shape),
    "dtype": config.dtype,
    "batch_norm_folded": False,
    "head": head,
    "class_names": list(source.class_names),
    "normalization": normalization(source.mean, source.std),
    "trained_on": source.name,
    # What `data.load` was given beside the name.
    "data_options": {
      name: config.data[name]
      for name in DATA_OPTIONS
      if config.data[name] is not None
    },
    "method": config.distiller.name,
    "test": scores,
  }


def normalization(mean: Sequence[float], std: Sequence[float]) -> Any:
  """A card's `normalization`."""
  return {
    "mean": [float(v) for v in mean],
    "std": [float(v) for v in std],
    "of": "pixel / 255, per channel: (x - mean) / std",
  }


def reused_head(
  distiller: dict[str, Any],
  *,
  names: Sequence[str],
  weights: Sequence[float],
  maps: Sequence[Sequence[int]],
) -> dict[str, Any]:
  """A card's `head`: whose classifier a student reuses.

  Args:
    distiller: `config.distiller`.
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


def describe(model: Model) -> str:
  """A model in a few words."""
  card = model.card
  words = card["architecture"]
  if card["head"] is not None:
    words += f" with the classifier of {' and '.join(card['head']['teachers'])}"
  return f"{words}, {card['num_classes']} classes"


def read_card_or_none(directory: pathlib.Path) -> dict[str, Any] | None:
  """The model card of an export, None if the folder is none."""
  card = storage.read_json(directory / CARD)
  if isinstance(card, dict) and card.get("format") == FORMAT:
    return card
  return None


def read_card(directory: pathlib.Path) -> dict[str, Any]:
  """The model card of an export.

  Raises:
    ValueError: if the folder is no export.
  """
  card = read_card_or_none(directory)
  if card is None:
    raise ValueError(
      f"{directory}: expected an export, a folder with {CARD} of format"
      f" {FORMAT!r}. Make one with python -m kd_jax export --workdir RUN --to"
      " DIR"
    )
  return card
