"""Several runs in one: each cell of a grid is an ordinary run of its own.

A cell is a delta of the config, in a workdir of its own below the grid's, so
that it can be resumed, exported or named as a teacher like any other run.
Whoever starts the same grid again, at once or later and on whatever machine,
takes the cells that are not finished and that no other is at work on.
"""

import copy
import difflib
import functools
import pathlib
import sys
import time
import traceback
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax.distributed import claims, processes
from kd_jax.reporting import report, runs, tables
from kd_jax.runs import errors, train

# Seconds between looks at cells of which it is not yet known whether another
# is at work on them.
_POLL = 1.0


# Free-form sections: a cell that names one replaces it.
_REPLACED = ("distiller", "loss_weights", "loss_ramp_epochs")


class CellsFailedError(RuntimeError):
  """Cells of a grid have failed; the others have been run."""


def is_grid(config: ConfigDict) -> bool:
  """Whether a config is one of several runs."""
  return bool(config.grid) or config.trials != 1


def cells(config: ConfigDict) -> dict[str, ConfigDict]:
  """The config of every cell, by name: all first trials, then all second ones.

  The first trial has the cell's own name and seed, the others NAME_seedN and
  the seeds that follow. A config without a grid is one cell, of its method's
  name.

  Raises:
    ValueError: if a cell sets a field that configs do not have, or there is
      no trial.
  """
  if config.trials < 1:
    raise ValueError(f"config.trials: expected 1 or more, got {config.trials}")
  first = _first_trials(config)
  made = dict(first)
  for trial in range(1, config.trials):
    for name, cell in first.items():
      again = copy.deepcopy(cell)
      again.seed = cell.seed + trial
      made[f"{name}_seed{again.seed}"] = again
  return made


def _first_trials(config):
  made = {}
  deltas = config.grid or ConfigDict({config.distiller.name: {}})
  for name, delta in deltas.items():
    cell = copy.deepcopy(config)
    with cell.unlocked():
      cell.grid, cell.trials = ConfigDict(), 1
      for section in _REPLACED:
        if section in delta:
          cell[section] = ConfigDict(delta[section].to_dict())
    rest = {k: v for k, v in delta.to_dict().items() if k not in _REPLACED}
    _apply(rest, cell.lock(), f"config.grid.{name}")
    made[name] = cell
  return made


def _apply(delta, section, where):
  for name, value in delta.items():
    place = f"{where}.{name}"
    if name not in section:
      near = difflib.get_close_matches(name, section, n=3)
      hint = f" Did you mean {' or '.join(near)}?" if near else ""
      raise ValueError(
        f"{place}: no such field.{hint} The fields are: {', '.join(section)}"
      )
    if isinstance(section[name], ConfigDict) != isinstance(value, dict):
      raise ValueError(
        f"{place}: expected what configs/base.py has there, got {value!r}"
      )
    if isinstance(value, dict):
      _apply(value, section[name], place)
      continue
    try:
      section[name] = value
    except TypeError as error:
      kind = section.get_type(name).__name__
      raise ValueError(f"{place}: expected {kind}, got {value!r}") from error


def run_grid(config: ConfigDict, workdir: str) -> list[dict[str, Any]]:
  """Runs the cells that are left, then writes and prints the report.

  Args:
    config: with a `grid`, or of several trials.
    workdir: folder of the grid.

  Returns:
    The rows of the table; other processes than the first have none.

  Raises:
    ValueError: for a mistake in the config, before anything is written.
    CellsFailedError: at the end, if cells have failed; it names them.
    PreemptedError: see `train_and_evaluate`.
  """
  folder = pathlib.Path(workdir).absolute()
  made = cells(config)
  # A mistake in the last one is found now. Trials differ in their seeds alone.
  for name in list(made)[: len(made) // config.trials]:
    try:
      processes.on_all_processes(
        functools.partial(train.prepare, made[name], folder / name)
      )
    except processes.RefusedError as error:
      raise processes.RefusedError(f"config.grid.{name}: {error}") from error
    except ValueError as error:
      raise ValueError(f"config.grid.{name}: {error}") from error
  work = _Work(folder, made)
  try:
    work.run()
  finally:
    work.release()
  rows = []
  if processes.is_first() and runs.find_runs(folder):
    rows = runs.collect(folder)
    print(f"\n{tables.table(rows)}", flush=True)
    for path in report.write(folder, folder):
      print(path, flush=True)
  work.conclude()
  return rows


class _Work:
  """What a process, or several as one, does of a grid."""

  def __init__(self, folder, made):
    self.folder, self.made = folder, made
    self.claims = {name: claims.Claim(folder / name) for name in made}
    self.left = list(made)
    self.failed: dict[str, str] = {}
    self.held: list[str] = []

  def run(self):
    """Goes round until every cell is done, or another's."""
    while self.left:
      before = len(self.left)
      for name in list(self.left):
        self._try(name)
      if len(self.left) < before:
        continue
      if not processes.broadcast(
        any(self.claims[name].others_alive is None for name in self.left)
      ):
        return
      time.sleep(_POLL)

  def _try(self, name):
    """Makes a cell, if it can be taken."""
    finished = (self.folder / name / "result.json").exists()
    try:
      if not processes.broadcast(finished) and not self._take(name):
        return
      if processes.is_first():
        number = list(self.made).index(name) + 1
        print(f"\n[{number}/{len(self.made)}] {name}", flush=True)
      train.train_and_evaluate(self.made[name], str(self.folder / name))
    except errors.PreemptedError:
      raise
    except Exception as error:
      self._fail(name, error)
    else:
      if name in self.held:
        self._release(name)
      self.left.remove(name)

  def _fail(self, name, error):
    """Notes the failure of a cell."""
    agreed = isinstance(error, (*errors.AGREED, processes.RefusedError))
    if jax.process_count() > 1 and not agreed:
      raise error  # the other processes may not come along
    told = agreed or isinstance(error, (ValueError, OSError))
    if processes.is_first() and not told:
      traceback.print_exception(error)
    # Until the end it stays this process's: others would only fail as well.
    self.failed[name] = f"{type(error).__name__}: {error}"
    self.left.remove(name)
    if processes.is_first():
      print(f"{name} has failed: {self.failed[name]}", file=sys.stderr)

  def _take(self, name) -> bool:
    claim = self.claims[name]
    taken = processes.on_all_processes(
      lambda: processes.is_first() and claim.take()
    )
    if processes.broadcast(taken):
      self.held.append(name)
    return name in self.held

  def _release(self, name):
    self.held.remove(name)
    if processes.is_first():
      self.claims[name].release()

  def release(self):
    """Leaves to others what was not finished."""
    for name in list(self.held):
      self._release(name)

  def conclude(self):
    """Says what others do, and what has failed."""
    if self.left and processes.is_first():
      print(
        f"other processes are at work on {', '.join(self.left)}: who ends last"
        " writes the table of all",
        flush=True,
      )
    if self.failed:
      lines = [f"  {name}: {text}" for name, text in self.failed.items()]
      raise CellsFailedError(
        f"{len(self.failed)} of {len(self.made)} cells have failed, the same"
        " command tries them again:\n" + "\n".join(lines)
      )
