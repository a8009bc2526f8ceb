"""Where teachers come from: what a config says of them, and their weights."""

import copy
import dataclasses
import hashlib
import json
import logging
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kd_jax import data, models, storage
from kd_jax.interop import files, opening
from kd_jax.interop import model as model_lib
from kd_jax.runs import identity

_log = logging.getLogger(__name__)


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


def teacher_config(config: ConfigDict, name: str) -> ConfigDict:
  """The run that trains a config's teacher of that name."""
  teacher = copy.deepcopy(config)
  with teacher.unlocked():
    teacher.seed, teacher.data.seed = config.teacher.seed, None
    teacher.student.name = name
    teacher.teachers = ()
    teacher.teacher.name = ""
    teacher.teacher.checkpoint = ""
    teacher.distiller = ConfigDict({"name": "none"})
    teacher.loss_weights = ConfigDict({"ce": 1.0})
    teacher.loss_ramp_epochs = ConfigDict()
    teacher.optim.learning_rate = config.teacher.learning_rate
    if teacher.optim.learning_rate is None:
      teacher.optim.learning_rate = models.entry(name).learning_rate
    for field, place in (("epochs", teacher), ("milestones", teacher.optim)):
      if config.teacher[field] is not None:
        place[field] = config.teacher[field]
    # Its own teacher settings are spent.
    for field in ("epochs", "learning_rate", "milestones"):
      teacher.teacher[field] = None
    teacher.teacher.seed = 0
    teacher.grid = ConfigDict()
    teacher.verify_export = False
  return teacher


def teacher_workdir(
  workdir: pathlib.Path,
  config: ConfigDict,
  source: data.Source | data.EncodedSource,
) -> pathlib.Path:
  """Where the teacher of a config is kept for all runs beside `workdir`."""
  text = json.dumps(identity.config_fingerprint(config), sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  name = f"{config.student.name}_{source.name.replace(':', '_')}_{digest}"
  return workdir.parent / "teachers" / name


_log = logging.getLogger(__name__)


_FIELDS = ("name", "checkpoint", "weight")


def resolve_teachers(config: ConfigDict) -> ConfigDict:
  """Fills what a config leaves open of its teachers.

  A teacher without a name is named by its checkpoint; entries of
  `config.teachers` become dicts of all their fields.

  Args:
    config: as a config file made it; changed in place.

  Returns:
    The config.

  Raises:
    ValueError: for an entry that makes no sense, or a checkpoint that cannot
      be read.
    ImportError: if a checkpoint takes PyTorch and there is none.
  """
  with config.unlocked():
    if not config.teachers:
      teacher = config.teacher
      if teacher.checkpoint and not teacher.name:
        teacher.name = _name_of("config.teacher", teacher.checkpoint)
      return config
    if config.teacher.checkpoint:
      raise ValueError(
        "config.teachers and config.teacher.checkpoint: expected one of them,"
        f" got both ({config.teacher.checkpoint!r} is the second). Put all"
        " teachers into config.teachers"
      )
    entries = [
      _entry(f"config.teachers[{i}]", entry)
      for i, entry in enumerate(config.teachers)
    ]
    if len(entries) == 1:
      config.teacher.name = entries[0]["name"]
      config.teacher.checkpoint = entries[0]["checkpoint"]
      config.teachers = ()
    else:
      config.teacher.name = ""
      config.teachers = tuple(entries)
  return config


def _entry(where: str, entry: Any) -> dict[str, Any]:
  if isinstance(entry, str):
    entry = {"checkpoint": entry}
  if isinstance(entry, ConfigDict):
    entry = entry.to_dict()
  if not isinstance(entry, Mapping) or set(entry) - set(_FIELDS):
    raise ValueError(
      f"{where}: expected a checkpoint or a dict of {', '.join(_FIELDS)}, got"
      f" {entry!r}"
    )
  full = {"name": "", "checkpoint": "", "weight": 1.0, **entry}
  weight = full["weight"]
  if not isinstance(weight, int | float) or not 0 < weight < np.inf:
    raise ValueError(f"{where}: expected a weight above 0, got {weight!r}")
  if not full["name"] and not full["checkpoint"]:
    raise ValueError(
      f"{where}: expected the name of a network or a checkpoint, got neither"
    )
  if not full["name"]:
    full["name"] = _name_of(where, full["checkpoint"])
  return {**full, "weight": float(weight)}


def _name_of(where: str, checkpoint: str) -> str:
  try:
    return opening.name_of(pathlib.Path(checkpoint))
  except ValueError as error:
    raise ValueError(f"{where}.checkpoint: {error}") from error


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a config says of one teacher.

  Attributes:
    where: the field that says it.
    name: of the network.
    checkpoint: a run, an export or a file of weights; "": to be trained.
    weight: of its losses.
  """

  where: str
  name: str
  checkpoint: str
  weight: float = 1.0


def specs(config: ConfigDict) -> tuple[Spec, ...]:
  """The teachers of a settled config; none if its method has none."""
  if config.teachers:
    return tuple(
      Spec(f"config.teachers[{i}]", **dict(entry))
      for i, entry in enumerate(config.teachers)
    )
  teacher = config.teacher
  if not teacher.name:
    return ()
  return (Spec("config.teacher", teacher.name, teacher.checkpoint),)


def create(spec: Spec, *, num_classes: int, dtype: Any) -> Teacher:
  """A teacher whose weights are still to be trained."""
  network = models.create(spec.name, num_classes, dtype=dtype)
  return Teacher(spec.name, network, None, spec.weight)


def load(
  spec: Spec, source: data.Source | data.EncodedSource, *, dtype: str
) -> Teacher:
  """A teacher with its weights, as numpy arrays.

  Args:
    spec: with a checkpoint.
    source: the training set.
    dtype: of the arithmetic.

  Returns:
    The teacher.

  Raises:
    ValueError: if the checkpoint cannot be read, or does not fit the spec or
      the data; with what to do about it.
    ImportError: if it takes PyTorch and there is none.
  """
  where, path = spec.where, pathlib.Path(spec.checkpoint)
  is_file = files.is_weights_file(path)
  try:
    models.entry(spec.name)  # imports a network of the user's own
    model = opening.open_model(
      path,
      # Of a file, the name says what to look for; a card says it itself.
      model_name=spec.name if is_file else None,
      num_classes=source.num_classes if is_file else None,
      origin=opening.Origin(source=source),
    )
  except ValueError as error:
    hint = (
      f" ({where}.name is {spec.name}, and the data has"
      f" {source.num_classes} classes)"
      if is_file
      else ". Leave it empty to train the teacher first"
    )
    raise ValueError(f"{where}.checkpoint: {error}{hint}") from error
  _check(model.card, spec, source)
  card = {**model.card, "dtype": dtype}
  return Teacher(spec.name, model_lib.build(card), model.variables, spec.weight)


def fingerprint(variables: Any) -> int:
  """32 bits that tell a teacher's weights from others, as a result has them."""
  return zlib.crc32(repr(storage.fingerprint(variables)).encode())


def _check(
  card: Mapping[str, Any], spec: Spec, source: data.Source | data.EncodedSource
) -> None:
  where, path = spec.where, spec.checkpoint
  if card["architecture"] != spec.name:
    raise ValueError(
      f"{where}.checkpoint: expected weights of {spec.name} ({where}.name), got"
      f" {card['architecture']} in {path}. Set"
      f" --{where}.name={card['architecture']}, or leave the name empty"
    )
  if card["num_classes"] != source.num_classes:
    raise ValueError(
      f"{where}.checkpoint: expected a teacher of {source.num_classes}"
      f" classes, as the data has, got {card['num_classes']} in {path}, trained"
      f" on {card['trained_on']}. Name a teacher of this data set, or set"
      " config.data.name"
    )
  shape = list(source.image_shape)
  # A projection is onto maps of the size that this image size gives.
  if card["head"] is not None and card["image_shape"] != shape:
    raise ValueError(
      f"{where}.checkpoint: expected a teacher for images of {shape}, as the"
      f" data has, got a {card['method']} student for {card['image_shape']} in"
      f" {path}. Set config.data.image_size, or name another teacher"
    )
  ours = [*source.mean, *source.std]
  theirs = [*card["normalization"]["mean"], *card["normalization"]["std"]]
  if not np.allclose(ours, theirs, atol=5e-3):
    _log.warning(
      "%s.checkpoint: %s was trained on images of mean %s and std %s, and gets"
      " those of %s, normalised with mean %s and std %s",
      where,
      path,
      *(card["normalization"][name] for name in ("mean", "std")),
      source.name,
      list(source.mean),
      list(source.std),
    )
