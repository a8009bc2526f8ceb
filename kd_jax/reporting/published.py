"""Published accuracies of CIFAR-100, shown beside runs of the same recipe.

`published.csv` has a line for each value. `recipe` names the toolbox whose
settings it was made with, `config` says them: a file of `configs/` with its
preset (`dkd_cifar:mdistiller`), and the fields that differ. `epoch` is the
epoch of a run to compare with: "best" (on the test set) or "final", the last.
`n` is the number of runs; empty where the source does not say.
"""

import csv
import dataclasses
import functools
import importlib
import json
import logging
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

from kd_jax import distillers, models
from kd_jax.runs import identity, presets

_log = logging.getLogger(__name__)

# Fields that a run of the recipe may choose.
_FREE = re.compile(
  r"(.+\.)?seed|student\.name|teacher\.(name|checkpoint)|trials\w*"
  r"|steps_per_dispatch|eval\.batch_size"
  r"|data\.(pipeline|decoder|on_bad_image)"
)
# Sections of terms, of which a missing one is 0.
_TERMS = ("loss_weights", "loss_ramp_epochs")


@dataclasses.dataclass(frozen=True)
class Published:
  """A line of `published.csv`.

  Attributes:
    source: where it was published.
    teacher: network; "" for a student alone.
    student: network.
    method: name in `distillers`.
    recipe: name of the recipe.
    config: file of `configs/` with its preset, and FIELD=VALUE for what
      differs.
    top1: in percent.
    epoch: which epoch of a run compares with it, "final" or "best".
    n: number of runs; "" if not stated.
  """

  source: str
  teacher: str
  student: str
  method: str
  recipe: str
  config: str
  top1: float
  epoch: str
  n: str

  @property
  def name(self) -> str:
    """The recipe and the epoch, to show beside the value."""
    return f"{self.recipe}, {'last' if self.epoch == 'final' else self.epoch}"


@functools.cache
def values() -> tuple[Published, ...]:
  """All lines of `published.csv`."""
  path = pathlib.Path(__file__).with_name("published.csv")
  with path.open(encoding="utf-8", newline="") as file:
    lines: list[dict[str, Any]] = list(csv.DictReader(file))
  return tuple(
    Published(**{**line, "top1": float(line["top1"])}) for line in lines
  )


def find(config: Mapping[str, Any]) -> list[Published]:
  """The published values of a run.

  Args:
    config: the content of its `config.json`. A teacher that is named by its
      checkpoint is taken to be the published one.

  Returns:
    One for each recipe that has the run's pair and method and that the run
    follows.
  """
  run = (
    *(config["teacher"]["name"], config["student"]["name"]),
    config["distiller"]["name"],
  )
  return [
    value
    for value in values()
    if (value.teacher, value.student, value.method) == run
    and follows(config, value.config)
  ]


def follows(config: Mapping[str, Any], recipe: str) -> bool:
  """Whether a run has the settings of a recipe, for any pair of networks.

  Seeds, the input pipeline and the size of a dispatch are free. A field that
  the run's config does not have yet has the recipe's value.

  Args:
    config: the content of its `config.json`.
    recipe: as `Published.config`.
  """
  pair = {name: config[name]["name"] for name in ("student", "teacher")}
  found = load(recipe, **pair)
  if found is None:
    return False
  theirs = _settings(found, **pair)
  ours = _settings(config, **pair)
  return theirs == {
    **theirs,
    **{name: x for name, x in ours.items() if x or name in theirs},
  }


@functools.cache
def load(recipe: str, *, student: str, teacher: str) -> dict[str, Any] | None:
  """Reads a recipe for a pair of networks.

  Args:
    recipe: as `Published.config`.
    student: network.
    teacher: network; "" for a student alone.

  Returns:
    The content of a `config.json`, with the preset filled in; None without its
    file in `configs/`.
  """
  file, *changes = recipe.split()
  name, _, preset = file.partition(":")
  root = str(pathlib.Path(__file__).resolve().parents[2])
  if root not in sys.path:
    sys.path.append(root)  # configs/ is not part of the package
  try:
    config = importlib.import_module(f"configs.{name}").get_config(preset)
  except ModuleNotFoundError:
    _log.warning("configs/%s.py not found: its published values left out", name)
    return None
  fields = (change.split("=") for change in changes)
  with config.unlocked():
    config.update_from_flattened_dict(
      {field: _parse(value) for field, value in fields}
    )
    config.student.name, config.teacher.name = student, teacher
  presets.fill(config)
  return identity.as_json(config)


def _parse(value):
  try:
    return json.loads(value)
  except json.JSONDecodeError:
    return value


def _settings(config, *, student, teacher):
  """The settings that a recipe prescribes, flat, with defaults filled in."""
  flat = {
    name: value
    for name, value in identity.config_fingerprint(dict(config)).items()
    if not _FREE.fullmatch(name) and name.partition(".")[0] not in _TERMS
  }
  for section in _TERMS:
    terms = config[section].items()
    flat[section] = {name: value for name, value in terms if value}
  flat["data.name"] = flat["data.name"].rpartition(":")[2]  # also from TFDS
  defaults: dict[str, Any] = {"optim.learning_rate": _rate(student)}
  if teacher:
    defaults |= {
      "teacher.epochs": flat["epochs"],
      "teacher.milestones": flat.get("optim.milestones"),
      "teacher.learning_rate": _rate(teacher),
    }
  if method := distillers.DISTILLERS.get(config["distiller"]["name"]):
    defaults |= {
      f"distiller.{field.name}": field.default
      for field in dataclasses.fields(method)
      if field.init and field.name not in ("parent", "name")
    }
  for name, value in defaults.items():
    if flat.get(name) is None:
      flat[name] = value
  return flat


def _rate(network):
  found = models.MODELS.get(network)  # no published network is a user's own
  return found.learning_rate if found else None
