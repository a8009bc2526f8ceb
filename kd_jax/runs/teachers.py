"""Teachers: what a config says about them, their weights and their scores."""

import copy
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_jax import data, distillers, models, storage
from kd_jax.distributed import processes
from kd_jax.interop import files, opening
from kd_jax.interop import model as model_lib
from kd_jax.runs import fingerprint as fingerprint_lib
from kd_jax.runs import identity, logs, records
from kd_jax.runs import workdir as workdir_lib

_log = logging.getLogger(__name__)

_FIELDS = ("name", "checkpoint", "weight")


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen network that a student learns from.

  Attributes:
    name: of its network.
    network: the network.
    variables: its variables; None until it has been trained.
    weight: of its losses.
    where: the field of the config that names it.
    checkpoint: a run, an export or a file of weights; "" to be trained.
  """

  name: str
  network: models.Classifier
  variables: Any
  weight: float = 1.0
  where: str = "config.teacher"
  checkpoint: str = ""


class Teachers(NamedTuple):
  """Teachers that are ready.

  Attributes:
    members: with their variables, placed on the devices.
    about: name, checkpoint, fingerprint and scores: a dict of one teacher, a
      list of several, {} without any.
  """

  members: tuple[Teacher, ...]
  about: Any


def resolve_teachers(config: ConfigDict) -> ConfigDict:
  """Fill what a config leaves open about its teachers.

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
  teacher = config.teacher
  named = teacher.name or teacher.checkpoint or config.teachers
  method = distillers.DISTILLERS.get(config.distiller.name)
  if named and method is not None and not method.needs_teacher:
    raise ValueError(
      "config.distiller.name: expected a method that learns from a teacher, got"
      f" 'none' with the teacher {named!r}. Leave config.teacher.name,"
      " config.teacher.checkpoint and config.teachers empty, or name a method"
    )
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
    path = storage.local_path(checkpoint, "path")
    return opening.name_of(path)
  except ValueError as error:
    raise ValueError(f"{where}.checkpoint: {error}") from error


def find(
  config: ConfigDict, source: data.Source | data.EncodedSource
) -> tuple[Teacher, ...]:
  """Load the teachers that have a checkpoint; the others have no variables.

  Args:
    config: with all defaults resolved.
    source: the training set.

  Raises:
    ValueError: if a checkpoint cannot be read, or does not fit the config or
      the data; with what to do about it.
    ImportError: if it takes PyTorch and there is none.
  """
  entries = [dict(entry) for entry in config.teachers]
  where = "config.teachers[{}]"
  if not entries and config.teacher.name:
    fields = ("name", "checkpoint")
    entries = [{name: config.teacher[name] for name in fields}]
    where = "config.teacher"
  found = []
  for i, entry in enumerate(entries):
    network = models.create(
      entry["name"], source.num_classes, dtype=jnp.dtype(config.dtype)
    )
    teacher = Teacher(
      network=network, variables=None, where=where.format(i), **entry
    )
    if teacher.checkpoint:
      teacher = load(teacher, source, dtype=config.dtype)
    found.append(teacher)
  return tuple(found)


def load(
  teacher: Teacher, source: data.Source | data.EncodedSource, *, dtype: str
) -> Teacher:
  """Read a teacher's network and weights, as numpy arrays, see `find`.

  Args:
    teacher: with a checkpoint.
    source: the training set.
    dtype: of the arithmetic.
  """
  where = teacher.where
  path = storage.local_path(teacher.checkpoint, f"{where}.checkpoint")
  is_file = files.is_weights_file(path)
  try:
    model = opening.open_model(
      path,
      # A file does not say what it holds; a card does.
      model_name=teacher.name if is_file else None,
      num_classes=source.num_classes if is_file else None,
      origin=opening.Origin(source=source),
    )
  except ValueError as error:
    hint = (
      f" ({where}.name is {teacher.name}, and the data has"
      f" {source.num_classes} classes)"
      if is_file
      else ". Leave it empty to train the teacher first"
    )
    raise ValueError(f"{where}.checkpoint: {error}{hint}") from error
  _check(model.card, teacher, source)
  network = model_lib.build({**model.card, "dtype": dtype})
  return dataclasses.replace(
    teacher, network=network, variables=model.variables
  )


def obtain(
  teachers: Sequence[Teacher],
  config: ConfigDict,
  *,
  workdir: pathlib.Path,
  source: data.Source | data.EncodedSource,
  place: Callable[[Any], Any],
  score: Callable[[nn.Module, Any], dict[str, float]],
  train: Callable[[ConfigDict, str], Any],
) -> Teachers:
  """Train the teachers without weights, place all, and score them once.

  Args:
    teachers: see `find`.
    config: of the student's run.
    workdir: of the student's run; `teacher.json` is written there.
    source: the training set.
    place: puts variables on the devices.
    score: (network, variables) -> scores on the test set.
    train: trains a config in a workdir, resuming if it was begun.

  Raises:
    ValueError: if the weights are not those that the run began with.
  """
  path = workdir / "teacher.json"
  kept = processes.broadcast(records.read_teachers(workdir, len(teachers)))
  members, about = [], []
  for i, teacher in enumerate(teachers):
    if teacher.variables is None:
      folder = _train(teacher, config, workdir, source, train)
      teacher = dataclasses.replace(teacher, checkpoint=folder)
      teacher = processes.on_all_processes(
        functools.partial(load, teacher, source, dtype=config.dtype)
      )
    weights = fingerprint(teacher.variables)
    teacher = dataclasses.replace(teacher, variables=place(teacher.variables))
    known = kept[i] if kept else None
    if known is None:
      known = {
        "name": teacher.name,
        "checkpoint": teacher.checkpoint,
        "fingerprint": weights,
        **score(teacher.network, teacher.variables),
      }
    elif known["fingerprint"] != weights:
      raise ValueError(
        f"{teacher.where}.checkpoint: expected the weights that {workdir} began"
        f" with, those of {known['checkpoint']}, got others in"
        f" {teacher.checkpoint}. Name the same teacher, or give another"
        " --workdir"
      )
    logs.say(
      f"teacher {teacher.name}: {logs.scores_in_words(known)}"
      f" ({teacher.checkpoint})"
    )
    members.append(teacher)
    about.append(known)
  content: Any = about[0] if len(about) == 1 else about or {}
  if about and kept is None and processes.is_first():
    storage.write_json(path, content)
  return Teachers(tuple(members), content)


def _train(
  teacher: Teacher,
  config: ConfigDict,
  workdir: pathlib.Path,
  source: data.Source | data.EncodedSource,
  train: Callable[[ConfigDict, str], Any],
) -> str:
  """Train a teacher beside the workdir, unless it is there; its folder."""
  own = teacher_config(config, teacher.name)
  folder = pathlib.Path(
    processes.broadcast(str(teacher_workdir(workdir, own, source)))
  )

  def is_trained() -> bool:
    return processes.broadcast(workdir_lib.result(folder)) is not None

  if is_trained():
    logs.say(f"teacher {teacher.name}: reusing {folder}")
    return str(folder)
  recipe = f"{own.epochs} epochs, learning rate {own.optim.learning_rate:g}"
  if config.label_smoothing or config.data.mixup or config.data.cutmix:
    recipe += ", without the student's label smoothing, mixup and CutMix"
  # Runs that start at the same time train it once.
  with workdir_lib.locked(folder, wait=True):
    if not is_trained():
      logs.say(
        f"no {teacher.where}.checkpoint: training {teacher.name} first in"
        f" {folder} ({recipe})"
      )
      train(own, str(folder))
  return str(folder)


def teacher_config(config: ConfigDict, name: str) -> ConfigDict:
  """The run that trains a config's teacher of that name.

  It has the recipe of `config.teacher`, and of the student's run its data,
  batch and optimiser; no label smoothing, mixup or CutMix.
  """
  teacher = copy.deepcopy(config)
  with teacher.unlocked():
    teacher.seed, teacher.data.seed = config.teacher.seed, None
    teacher.student.name = name
    teacher.teachers, teacher.preset = (), ""
    teacher.teacher.name = ""
    teacher.teacher.checkpoint = ""
    teacher.distiller = ConfigDict({"name": "none"})
    teacher.loss_weights = ConfigDict({"ce": 1.0})
    teacher.loss_ramp_epochs = ConfigDict()
    teacher.label_smoothing = 0.0
    teacher.data.mixup = teacher.data.cutmix = 0.0
    teacher.optim.dot_delta = 0.0
    teacher.optim.learning_rate = config.teacher.learning_rate
    if teacher.optim.learning_rate is None:
      teacher.optim.learning_rate = models.entry(name).learning_rate
    for field, place in (("epochs", teacher), ("milestones", teacher.optim)):
      if config.teacher[field] is not None:
        place[field] = config.teacher[field]
    # Its own teacher settings are spent.
    for field in ("epochs", "learning_rate", "milestones", "cache_dtype"):
      teacher.teacher[field] = None
    teacher.teacher.seed = teacher.teacher.cache_top_k = 0
    teacher.teacher.cache = teacher.init_from = ""
    teacher.grid = teacher.stages = ConfigDict()
    teacher.verify_export = False
  return teacher


def teacher_workdir(
  workdir: pathlib.Path,
  config: ConfigDict,
  source: data.Source | data.EncodedSource,
) -> pathlib.Path:
  """Where the teacher of a config is kept for all runs beside `workdir`."""
  mine = identity.config_fingerprint(config)
  name = f"{config.student.name}_{source.name}".replace(":", "_")
  # Its name may come from a version that took other fields for its identity.
  for path in sorted(workdir.parent.glob(f"teachers/{name}_*/config.json")):
    if (
      identity.config_fingerprint(records.read_config(path.parent) or {})
      == mine
    ):
      return path.parent
  text = json.dumps(mine, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  return workdir.parent / "teachers" / f"{name}_{digest}"


def fingerprint(variables: Any) -> int:
  """32 bits that tell a teacher's weights from others."""
  return zlib.crc32(repr(fingerprint_lib.fingerprint(variables)).encode())


def _check(
  card: Mapping[str, Any],
  teacher: Teacher,
  source: data.Source | data.EncodedSource,
) -> None:
  where, path = teacher.where, teacher.checkpoint
  if card["architecture"] != teacher.name:
    raise ValueError(
      f"{where}.checkpoint: expected weights of {teacher.name} ({where}.name),"
      f" got {card['architecture']} in {path}. Set"
      f" --{where}.name={card['architecture']}, or leave the name empty"
    )
  if card["num_classes"] != source.num_classes:
    raise ValueError(
      f"{where}.checkpoint: expected a teacher of {source.num_classes}"
      f" classes, as the data has, got {card['num_classes']} in {path}, trained"
      f" on {card['trained_on']}. Name a teacher of this data set (a new"
      " classifier on its trunk cannot be trained yet), or set config.data.name"
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
