"""Collects finished runs and groups their trials."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from kd_jax import storage
from kd_jax.runs import identity, records

_log = logging.getLogger(__name__)

# Metrics of a run, and the same as `gather` keeps them.
METRICS = "metrics.jsonl"
PACKED = "metrics.jsonl.gz"


@dataclasses.dataclass(frozen=True)
class Group:
  """Trials: runs that differ only in their seed.

  Attributes:
    rows: of `collect`, by seed.
    label: the method, and in brackets its teacher if the task has several and
      the settings that vary between groups of the method. Unique in the task.
  """

  rows: list[dict[str, Any]]
  label: str = ""

  @property
  def first(self) -> dict[str, Any]:
    """The trial of the lowest seed."""
    return self.rows[0]

  @property
  def teacher(self) -> str:
    """Networks of the teachers; "" without a teacher."""
    return " + ".join(entry["name"] for entry in self.first["teachers"])

  @property
  def teacher_weights(self) -> str:
    """Networks of the teachers, each with its weights' fingerprint."""
    return " + ".join(
      f"{entry['name']} {entry['fingerprint']:08x}"
      if entry.get("fingerprint") is not None
      else entry["name"]
      for entry in self.first["teachers"]
    )

  @property
  def task(self) -> tuple[str, str]:
    """Data set and student; methods of one task are compared."""
    return self.first["config"]["data"]["name"], self.first["student"]

  @property
  def is_teacher(self) -> bool:
    """Whether the runs were trained to teach others."""
    return "teachers" in pathlib.Path(self.first["run"]).parts

  def values(self, epoch: str, name: str) -> np.ndarray:
    """[n]: a score of the "final" or the "best" epoch of each trial."""
    return np.array([row[epoch][name] for row in self.rows], np.float64)


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
  """Finished runs at or below a folder: teachers first, then by age.

  Stages of a run are left out, unless `folder` is one.
  Gathered runs are sorted by name: a checkout changes the age of its files.
  """

  def order(run):
    gathered = (run / PACKED).exists()
    age = 0.0 if gathered else (run / "result.json").stat().st_mtime
    return "teachers" not in run.parts, age, run

  def is_stage(run):  # it lies in the folder of a run
    return run != folder and (run.parent / "config.json").exists()

  found = (path.parent for path in folder.rglob("result.json"))
  return sorted((run for run in found if not is_stage(run)), key=order)


def metrics_file(run: pathlib.Path) -> pathlib.Path:
  """The metrics of a run, packed if it has been gathered."""
  packed = run / PACKED
  return packed if packed.exists() else run / METRICS


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Reads every finished run at or below a folder.

  Args:
    folder: of a run or of many.

  Returns:
    For each run the content of its `result.json`, with `run` (path below
    `folder`), `config`, `teachers` (a list, empty without a teacher) and
    `evals` (its evaluations, in order).

  Raises:
    ValueError: if there is no finished run, or if one is damaged, or lacks its
      config or its metrics.
  """
  rows, damaged = collect_whole(folder)
  for problem in damaged.values():
    raise ValueError(problem)
  return rows


def collect_whole(
  folder: pathlib.Path, also: Callable[[pathlib.Path], Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
  """Reads the finished runs that can be read; warns of the others.

  Args:
    folder: see `collect`.
    also: reads more of a run, and raises ValueError if it is damaged.

  Returns:
    Rows, as `collect`; and for each other run its path and what is wrong.

  Raises:
    ValueError: if there is no finished run, or none can be read.
  """
  rows, damaged = [], {}
  for run in find_runs(folder):
    name = str(run.relative_to(folder))
    try:
      row = {"run": name, **_read(run)}
      if also is not None:
        also(run)
      rows.append(row)
    except (ValueError, OSError) as error:
      damaged[name] = str(error)
      _log.warning("left out a run: %s", error)
  if damaged and not rows:
    raise ValueError(next(iter(damaged.values())))
  if not rows:
    raise ValueError(
      f"{folder}: expected finished runs (result.json) at or below it, found"
      " none. Give the --workdir of launch.py, or the folder above it"
    )
  return rows, damaged


def _read(run: pathlib.Path) -> dict[str, Any]:
  lines = metrics_file(run)
  for path in (run / "config.json", lines):
    if not path.exists():
      raise ValueError(
        f"{run}: expected {path.name} beside result.json, found none. Copy it"
        " from the run, or remove this folder"
      )
  result, config = records.read_result(run), records.read_config(run)
  assert result is not None
  evals = [r for r in storage.read_metrics(lines) if r["kind"] == "eval"]
  return {
    **result,
    "teachers": records.teachers(result),
    "config": config,
    "evals": storage.convert(evals, list[records.Eval], f"{lines}, evals"),
  }


def group(rows: Iterable[dict[str, Any]]) -> list[Group]:
  """Groups trials; a seed that was run twice counts once.

  All trials of a group had teachers of the same weights.

  Args:
    rows: of `collect`.

  Returns:
    Teachers first, then student by student, in the order of the rows.
  """
  found: dict[str, dict[int, dict[str, Any]]] = {}
  for row in rows:
    weights = [entry.get("fingerprint") for entry in row["teachers"]]
    key = json.dumps([_settings(row), weights], sort_keys=True)
    found.setdefault(key, {}).setdefault(row["seed"], row)
  groups = [
    Group([trials[seed] for seed in sorted(trials)])
    for trials in found.values()
  ]
  tasks = list(dict.fromkeys(g.task for g in groups))
  groups.sort(key=lambda g: (not g.is_teacher, tasks.index(g.task)))
  return [dataclasses.replace(g, label=_label(g, groups)) for g in groups]


def _settings(row):
  settings = identity.config_fingerprint(row["config"])
  return {name: value for name, value in settings.items() if name != "seed"}


def _label(one: Group, groups: Sequence[Group]) -> str:
  method, differ = one.first["method"], []
  members = [g for g in groups if g.task == one.task]
  if one.teacher and len({g.teacher_weights for g in members if g.teacher}) > 1:
    alike = {g.teacher_weights for g in members if g.teacher == one.teacher}
    name = one.teacher_weights if len(alike) > 1 else one.teacher
    differ.append(f"teacher={name}")
  rivals = [
    _settings(g.first)
    for g in members
    if (g.first["method"], g.teacher) == (method, one.teacher)
  ]
  mine = _settings(one.first)
  for name in sorted(set().union(*rivals)):
    if any(theirs.get(name) != mine.get(name) for theirs in rivals):
      short = name.removeprefix("distiller.")
      differ.append(f"{short}={mine.get(name)}")
  return f"{method} ({', '.join(differ)})" if differ else method
