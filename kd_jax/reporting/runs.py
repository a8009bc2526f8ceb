"""Collects runs and groups their trials."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from kd_jax import storage
from kd_jax.runs import identity, workdir

# What a run writes line by line, and the same as `kd_jax.results` keeps it.
METRICS = "metrics.jsonl"


PACKED = "metrics.jsonl.gz"


@dataclasses.dataclass(frozen=True)
class Group:
  """Trials: runs that differ in their seed alone.

  Attributes:
    rows: of `collect`, by seed.
    label: the method, its teacher if those of the task have several, and the
      settings by which it differs from other groups of the same method. No
      other group of the task has the same.
  """

  rows: list[dict[str, Any]]
  label: str = ""

  @property
  def first(self) -> dict[str, Any]:
    """The trial of the lowest seed."""
    return self.rows[0]

  @property
  def teacher(self) -> str:
    """The teacher's network, or those of several; "" if there is none."""
    return _names(self.first)

  @property
  def task(self) -> tuple[str, str]:
    """Data set and student: what methods are compared on."""
    return self.first["config"]["data"]["name"], self.first["student"]

  @property
  def is_teacher(self) -> bool:
    """Whether it was trained because others needed it."""
    return "teachers" in pathlib.Path(self.first["run"]).parts

  def values(self, epoch: str, name: str) -> np.ndarray:
    """[n]: a score of the "final" or the "best" epoch of each trial."""
    return np.array([row[epoch][name] for row in self.rows], np.float64)


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
  """The finished runs at or below a folder: teachers first, then by age.

  What `kd_jax.results` has gathered is in the order of its names: files that
  were committed are as old as their checkout.
  """

  def order(run):
    gathered = (run / PACKED).exists()
    age = 0.0 if gathered else (run / "result.json").stat().st_mtime
    return "teachers" not in run.parts, age, run

  return sorted((p.parent for p in folder.rglob("result.json")), key=order)


def collect(folder: pathlib.Path) -> list[dict[str, Any]]:
  """One row for each finished run at or below a folder.

  Args:
    folder: of a run or of many.

  Returns:
    The content of each `result.json`, with `run` (its path below `folder`),
    `config` (the content of its `config.json`) and `evals` (its evaluations,
    in order).

  Raises:
    ValueError: if there is no finished run, or one without its config or its
      metrics.
  """
  rows = []
  for run in find_runs(folder):
    lines = run / (PACKED if (run / PACKED).exists() else METRICS)
    for path in (run / "config.json", lines):
      if not path.exists():
        raise ValueError(
          f"{run}: expected {path.name} beside result.json, found none. Copy it"
          " from the run, or remove this folder"
        )
    config = storage.read_json(run / "config.json")
    records = storage.read_metrics(lines)
    rows.append(
      {
        "run": str(run.relative_to(folder)),
        **(workdir.result(run) or {}),
        "config": config,
        "evals": [r for r in records if r["kind"] == "eval"],
      }
    )
  if not rows:
    raise ValueError(
      f"{folder}: expected finished runs (result.json) at or below it, found"
      " none. Give the --workdir of launch.py, or the folder above it"
    )
  return rows


def group(rows: Iterable[dict[str, Any]]) -> list[Group]:
  """Puts trials together; a seed that was run twice counts once.

  Trials of one line have had the same teacher's weights.

  Args:
    rows: of `collect`.

  Returns:
    Teachers first, then student by student, in the order of the rows.
  """
  found: dict[str, dict[int, dict[str, Any]]] = {}
  for row in rows:
    same = {**identity.config_fingerprint(row["config"]), "seed": None}
    key = json.dumps([same, _fingerprints(row)], sort_keys=True)
    trials = found.setdefault(key, {})
    trials.setdefault(row["seed"], row)
  groups = [
    Group([trials[seed] for seed in sorted(trials)])
    for trials in found.values()
  ]
  tasks = list(dict.fromkeys(g.task for g in groups))
  groups.sort(key=lambda g: (not g.is_teacher, tasks.index(g.task)))
  return [dataclasses.replace(g, label=_label(g, groups)) for g in groups]


def _teachers(row):
  """What a row says of its teachers: a list of dicts."""
  teacher = row["teacher"] or []
  return teacher if isinstance(teacher, list) else [teacher]


def _fingerprints(row):
  """Those of its teachers' weights; None of one that was noted without."""
  return [entry.get("fingerprint") for entry in _teachers(row)]


def _names(row, *, precise=False):
  """The networks of its teachers; if precise, with their fingerprints."""
  return " + ".join(
    f"{entry['name']} {entry['fingerprint']:08x}"
    if precise and entry.get("fingerprint") is not None
    else entry["name"]
    for entry in _teachers(row)
  )


def _label(one, groups):
  """The method, and what tells it from the task's other groups."""
  settings = identity.config_fingerprint(one.first["config"])
  differ: dict[str, str] = {}
  taught = [g.first for g in groups if g.task == one.task and g.teacher]
  if one.teacher and len({_names(row, precise=True) for row in taught}) > 1:
    same = [row for row in taught if _names(row) == one.teacher]
    precise = len({_names(row, precise=True) for row in same}) > 1
    differ["teacher"] = f"teacher={_names(one.first, precise=precise)}"
  for other in groups:
    alike = (other.task, other.first["method"], other.teacher)
    if alike != (one.task, one.first["method"], one.teacher):
      continue
    theirs = identity.config_fingerprint(other.first["config"])
    for name in sorted(settings.keys() | theirs.keys()):
      if name != "seed" and settings.get(name) != theirs.get(name):
        short = name.removeprefix("distiller.")
        differ[short] = f"{short}={settings.get(name)}"
  method = one.first["method"]
  return f"{method} ({', '.join(differ.values())})" if differ else method


def mean_std(values: np.ndarray, digits: int) -> str:
  """The mean of trials in words, ± their sample standard deviation."""
  text = f"{values.mean():.{digits}f}"
  if len(values) > 1:
    text += f" ± {values.std(ddof=1):.{digits}f}"
  return text
