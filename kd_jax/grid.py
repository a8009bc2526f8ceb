"""Several runs in one: each cell of a grid is an ordinary run of its own.

A cell is a delta of the config, in a workdir of its own below the grid's, so
that it can be resumed, exported or named as a teacher like any other run.
"""

import copy
import difflib
import functools
import pathlib
from typing import Any

from ml_collections import ConfigDict

from kd_jax import processes, report, train

# Free-form sections: a cell that names one replaces it.
_REPLACED = ("distiller", "loss_weights", "loss_ramp_epochs")


def cells(config: ConfigDict) -> dict[str, ConfigDict]:
  """The config of every cell, by name, in alphabetical order.

  Raises:
    ValueError: if a cell sets a field that configs do not have.
  """
  made = {}
  for name, delta in config.grid.items():
    cell = copy.deepcopy(config)
    with cell.unlocked():
      cell.grid = ConfigDict()
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
  """Runs every cell, then writes and prints the table and the figure.

  Args:
    config: with a `grid`.
    workdir: folder of the grid.

  Returns:
    The rows of the table; other processes than the first have none.
  """
  folder = pathlib.Path(workdir).absolute()
  made = cells(config)
  for name, cell in made.items():  # a mistake in the last one is found now
    try:
      processes.together(functools.partial(train.prepare, cell, folder / name))
    except processes.RefusedError as error:
      raise processes.RefusedError(f"config.grid.{name}: {error}") from error
    except ValueError as error:
      raise ValueError(f"config.grid.{name}: {error}") from error
  for number, (name, cell) in enumerate(made.items(), 1):
    if processes.is_first():
      print(f"\n[{number}/{len(made)}] {name}", flush=True)
    train.train_and_evaluate(cell, str(folder / name))
  if not processes.is_first():
    return []
  rows = report.collect(folder)
  text = report.table(rows)
  (folder / "table.md").write_text(text, encoding="utf-8")
  report.curves(folder, folder / "curves.png")
  print(f"\n{text}\n{folder / 'table.md'}\n{folder / 'curves.png'}", flush=True)
  return rows
