"""The model card of an export: `model.json`."""

import hashlib
import json
import logging
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
from msgspec import Meta

from kd_jax import distillers, models, storage

_log = logging.getLogger(__name__)

FORMAT = "kd_jax export 2"
CARD = "model.json"
SEAL = "card_sha256"
# Options of `data.load`, besides the name, that change what a model sees.
DATA_OPTIONS = ("image_size", "resize", "num_examples", "num_classes")

_Size = Annotated[int, Meta(ge=1, le=1 << 24)]
_Shape = Annotated[list[_Size], Meta(min_length=3, max_length=3)]


class _Normalization(TypedDict):
  mean: list[float]
  std: list[float]
  of: NotRequired[str]


class _Head(TypedDict):
  distiller: dict[str, Any]
  teachers: list[str]
  weights: list[float]
  teacher_maps: list[_Shape]


class _Card(TypedDict):
  """See `make`; `store.write` adds the fields that may be missing."""

  format: Literal["kd_jax export 2"]
  architecture: str
  num_classes: _Size
  image_shape: _Shape
  dtype: Literal["float32", "bfloat16", "float16"]
  batch_norm_folded: bool
  head: _Head | None
  class_names: list[str]
  normalization: _Normalization
  trained_on: str
  data_options: dict[str, int | None]
  resize: NotRequired[_Size | None]
  method: str
  test: dict[str, storage.Score]
  parameters: NotRequired[_Size]
  sha256: NotRequired[str]
  card_sha256: NotRequired[str]


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
  head = card["head"] or {"distiller": {}}
  for name in (card["architecture"], head["distiller"].get("name", "")):
    module, colon, _ = str(name).partition(":")
    if colon and module not in sys.modules:
      raise ValueError(
        f"the model card asks for {name}, which is code outside kd_jax. If you"
        f" trust it, import {module} first, or give {name} as the model's name"
      )


def match_classes(
  expected: Sequence[str], got: Sequence[str], what: str
) -> np.ndarray | None:
  """Match the classes of data to those of a model by their names.

  Case, and blanks, hyphens and underscores, make no difference. Numbers
  ("0", "class 0") and WordNet's identifiers beside words tell nothing, so such
  names are not compared.

  Args:
    expected: names of the model's classes.
    got: names of the data's, as many.
    what: names both in errors and in the log.

  Returns:
    None if they are the same in the same order, or not compared; else int [K],
    the model's class of each class of the data: `logits[:, order]` has the
    data's order.

  Raises:
    ValueError: if they differ; it lists some differences.
  """
  ours, theirs = (
    [re.sub(r"[\s_-]+", " ", str(n)).strip().casefold() for n in names]
    for names in (expected, got)
  )
  generic = any(
    all(re.fullmatch(r"(class )?\d+", name) for name in names)
    for names in (ours, theirs)
  )
  wordnet = [
    all(re.fullmatch(r"n\d{8}", name) for name in names)
    for names in (ours, theirs)
  ]
  if generic or ours == theirs or wordnet[0] != wordnet[1]:
    return None
  place = {name: i for i, name in enumerate(ours)}
  if sorted(ours) != sorted(theirs) or len(place) < len(ours):
    different = [
      f"{i}: {a!r} and {b!r}"
      for i, (a, b) in enumerate(zip(expected, got, strict=True))
      if ours[i] != theirs[i]
    ]
    raise ValueError(
      f"{what}: expected the same classes, got {len(different)} of"
      f" {len(ours)} that differ ({', '.join(different[:3])}"
      f"{', ...' if len(different) > 3 else ''}). Choose data of the model's"
      " classes, or rename the class folders"
    )
  _log.info(
    "%s: the same classes in another order; labels are matched by name", what
  )
  return np.array([place[name] for name in theirs])


def describe(card: Mapping[str, Any]) -> str:
  """Describe the model in a few words."""
  words = card["architecture"]
  if card["head"] is not None:
    words += f" with the classifier of {' and '.join(card['head']['teachers'])}"
  return f"{words}, {card['num_classes']} classes"


def seal(card: Mapping[str, Any]) -> dict[str, Any]:
  """Add a digest of the card to it, which `check` compares.

  Returns:
    The card as JSON keeps it.
  """
  plain = json.loads(storage.to_json(card))
  return {**plain, SEAL: _digest(plain)}


def _digest(card: Mapping[str, Any]) -> str:
  """Hash a card's canonical JSON, without its digest."""
  content = {name: value for name, value in card.items() if name != SEAL}
  text = json.dumps(content, sort_keys=True, separators=(",", ":"))
  return hashlib.sha256(text.encode()).hexdigest()


def check(content: Any, where: object) -> dict[str, Any]:
  """Check a model card: its types, and that its values make sense.

  Args:
    content: parsed JSON.
    where: names the file in errors.

  Returns:
    The card.

  Raises:
    ValueError: naming the field, what was expected and what came; or that the
      card was changed since `seal`.
  """
  if not isinstance(content, dict) or content.get("format") != FORMAT:
    found = content.get("format") if isinstance(content, dict) else content
    raise ValueError(
      f"{where}: expected a model card of format {FORMAT!r}, got"
      f" {str(found)[:40]!r}. {_REMEDY}"
    )
  if content.get(SEAL, sealed := _digest(content)) != sealed:
    raise ValueError(
      f"{where}: expected the model card as it was written, got one that was"
      f" changed (its {SEAL} differs). {_REMEDY}"
    )
  card: Any = storage.convert(content, _Card, where, _REMEDY)
  require_imported(card)
  norm, head = card["normalization"], card["head"] or _NO_HEAD
  channels, count = card["image_shape"][2], len(head["teachers"])
  for name, good, expected in (
    (
      "class_names",
      len(card["class_names"]) == card["num_classes"],
      "one a class",
    ),
    ("normalization.mean", len(norm["mean"]) == channels, "one a channel"),
    (
      "normalization.std",
      len(norm["std"]) == channels and all(v > 0 for v in norm["std"]),
      "one a channel, above 0",
    ),
    (
      "head.weights",
      len(head["weights"]) == count and all(v > 0 for v in head["weights"]),
      "one a teacher, above 0",
    ),
    ("head.teacher_maps", len(head["teacher_maps"]) == count, "one a teacher"),
  ):
    if not good:
      got: Any = card
      for part in name.split("."):
        got = got[part]
      raise ValueError(
        f"{where}, at {name}: expected {expected}, got {str(got)[:60]}."
        f" {_REMEDY}"
      )
  try:
    models.entry(card["architecture"])
    if card["head"] is not None:
      distillers.create_for_teachers(
        weights=head["weights"], **head["distiller"]
      )
  except (ValueError, TypeError) as error:
    raise ValueError(f"{where}: {error}. {_REMEDY}") from error
  return card


_REMEDY = "Export or copy the model again"
_NO_HEAD: dict[str, Any] = dict.fromkeys(
  ("weights", "teachers", "teacher_maps"), ()
)


def read_card_or_none(directory: pathlib.Path) -> dict[str, Any] | None:
  """Read the model card of an export; None if the folder is not one.

  Raises:
    ValueError: if its card is damaged.
  """
  path = directory / CARD
  content = storage.read_json(path, remedy=_REMEDY)
  if isinstance(content, dict) and content.get("format") == FORMAT:
    return check(content, path)
  return None


def read_card(directory: pathlib.Path) -> dict[str, Any]:
  """Read the model card of an export.

  Raises:
    ValueError: if the folder is not an export, or its card is damaged.
  """
  card = read_card_or_none(directory)
  if card is None:
    raise ValueError(
      f"{directory}: expected an export, a folder with {CARD} of format"
      f" {FORMAT!r}. Make one with python -m kd_jax export --workdir RUN --to"
      " DIR"
    )
  return card
