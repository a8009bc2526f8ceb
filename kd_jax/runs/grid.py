"""Several runs in one: each cell of a grid is an ordinary run.

A cell is a delta of the config, in its own workdir below the grid's. It can be
resumed, exported or used as a teacher like any other run. To divide a grid
between machines, give each its own shard; the same command again skips what is
finished and retries what failed.
"""

import copy
import functools
import pathlib
import sys
import traceback

import jax
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.distributed import processes
from kd_jax.runs import config as config_lib
from kd_jax.runs import errors, limits, train


def is_grid(config: ConfigDict) -> bool:
  """Whether a config asks for several runs."""
  return bool(config.grid) or config.trials != 1


def cells(config: ConfigDict) -> dict[str, ConfigDict]:
  """The config of every cell, by name: all first trials, then all second ones.

  The first trial has the cell's own name and seed; trial N + 1 is called
  NAME_seedS, where S is that seed plus N. A config without a grid is one cell,
  named after its method.

  Raises:
    ValueError: if a cell sets an unknown field, or config.trials is below 1.
  """
  if not limits.LIMITS["trials"].allow(config.trials):
    raise ValueError(
      f"config.trials: expected {limits.LIMITS['trials']}, got {config.trials}"
    )
  first = _first_trials(config)
  made = dict(first)
  for trial in range(1, config.trials):
    for name, cell in first.items():
      again = copy.deepcopy(cell)
      again.seed = cell.seed + trial
      made[f"{name}_seed{again.seed}"] = again
  return made


def _first_trials(config: ConfigDict) -> dict[str, ConfigDict]:
  made = {}
  deltas = config.grid or ConfigDict({config.distiller.name: {}})
  for name, delta in deltas.items():
    cell = config_lib.with_delta(config, delta, f"config.grid.{name}")
    with cell.unlocked():
      cell.grid, cell.trials = ConfigDict(), 1
    made[name] = cell
  return made


def run_grid(
  config: ConfigDict, workdir: str, *, shard: tuple[int, int] = (0, 1)
) -> list[pathlib.Path]:
  """Run the cells of a shard that are not finished, one after another.

  Args:
    config: with a `grid`, or with several trials.
    workdir: folder of the grid.
    shard: (index, count): run cells index, index + count, and so on.

  Returns:
    The workdirs of the shard's finished cells.

  Raises:
    ValueError: for a mistake in one of these cells, before anything is written.
    CellsFailedError: at the end, naming each cell that failed.
    PreemptedError: see `train_and_evaluate`.
    StoppedUnsavedError: likewise.
  """
  folder = storage.local_path(workdir, "--workdir")
  made = cells(config)
  names, (index, count) = list(made), shard
  mine = range(index, len(names), count)
  # Trials differ only in their seeds: checking the first ones is enough.
  first = len(names) // config.trials
  for name in [names[i] for i in sorted({number % first for number in mine})]:
    try:
      processes.on_all_processes(
        functools.partial(train.prepare, made[name], folder / name)
      )
    except processes.RefusedError as error:
      raise processes.RefusedError(f"config.grid.{name}: {error}") from error
    except ValueError as error:
      raise ValueError(f"config.grid.{name}: {error}") from error
  failed = {}
  for number in mine:
    name = names[number]
    if processes.is_first():
      print(f"\n[{number + 1}/{len(names)}] {name}", flush=True)
    try:
      train.train_and_evaluate(made[name], str(folder / name))
    except (errors.PreemptedError, errors.StoppedUnsavedError):
      raise
    except Exception as error:
      failed[name] = _describe(error)
      if processes.is_first():
        print(f"{name} failed: {failed[name]}", file=sys.stderr)
  if failed:
    lines = [f"  {name}: {text}" for name, text in failed.items()]
    raise errors.CellsFailedError(
      f"{len(failed)} of {len(mine)} cells failed; the same command tries them"
      " again:\n" + "\n".join(lines)
    )
  return [folder / names[number] for number in mine]


def _describe(error: Exception) -> str:
  """A failed cell's error in words; raises it if other processes may hang."""
  agreed = isinstance(error, (*errors.AGREED, processes.RefusedError))
  if jax.process_count() > 1 and not agreed:
    raise error
  expected = agreed or isinstance(error, (ValueError, OSError))
  if processes.is_first() and not expected:
    traceback.print_exception(error)
  return f"{type(error).__name__}: {error}"
