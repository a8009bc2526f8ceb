"""Keeps the results of finished runs.

Of each run a few kilobytes: `result.json`, `config.json`, `environment.json`
(the command, versions, hardware) and `metrics.jsonl.gz`, without absolute
paths. `report` reads such a folder like a folder of runs.
"""

import gzip
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from kd_jax import storage
from kd_jax.reporting import runs
from kd_jax.runs import records

_ENVIRONMENT = "environment.json"
# An absolute path: an argument, its value, or an item of a tuple.
_PATH = re.compile(r"""(?:(?<=[='"(\[,])|^)/[^'",]+""")


def gather(folder: pathlib.Path, to: pathlib.Path) -> list[pathlib.Path]:
  """Copies the results of the finished runs at or below a folder.

  The same runs give the same bytes. Other runs in `to` stay. A damaged run is
  left out, with a warning that names it.

  Args:
    folder: of a run or of many, gathered ones too.
    to: folder to write into; runs have their paths below `folder` there.

  Returns:
    The folders of the runs in `to`.

  Raises:
    ValueError: if there is no finished run, or none can be read. Nothing is
      written then.
    OSError: if a file cannot be written; no half of one is left.
  """
  folder = folder.absolute()
  repository = pathlib.Path(__file__).resolve().parents[2]
  copies = []
  rows, _ = runs.collect_whole(folder, also=command_of)
  for row in rows:
    run = folder / row["run"]
    # The result comes last: with it, the copy is a finished run.
    contents = {
      name: storage.read_json(run / name)
      for name in ("config.json", _ENVIRONMENT, "result.json")
    }
    shown = _portable(contents, [repository, folder.parent])
    lines = runs.metrics_file(run).read_bytes()
    if not (run / runs.PACKED).exists():
      lines = gzip.compress(lines, mtime=0)
    copies.append((to / row["run"], shown, lines))
  for target, contents, lines in copies:
    target.mkdir(parents=True, exist_ok=True)
    storage.write_whole(target / runs.PACKED, lines)
    for name, content in contents.items():
      storage.write_json(target / name, content)
  return [target for target, _, _ in copies]


def command_of(run: pathlib.Path) -> list[str]:
  """The command line of a run.

  Args:
    run: its folder, or what was kept of it.

  Raises:
    ValueError: if its environment is missing or damaged.
  """
  found = storage.read_json(run / _ENVIRONMENT, records.Environment)
  if found is None:
    raise ValueError(
      f"{run}: expected {_ENVIRONMENT} beside result.json, found none. Copy"
      " it from the run, or remove this folder"
    )
  command: list[str] = found["command"]
  return command


def _portable(tree: Any, roots: Sequence[pathlib.Path]) -> Any:
  """Shortens absolute paths in JSON: relative to a root, or the name alone."""

  def shorten(match):
    path = pathlib.PurePath(match[0])
    for root in roots:
      if path.is_relative_to(root):
        return str(path.relative_to(root))
    return f".../{path.name}"

  if isinstance(tree, dict):
    return {name: _portable(value, roots) for name, value in tree.items()}
  if isinstance(tree, list):
    return [_portable(value, roots) for value in tree]
  return _PATH.sub(shorten, tree) if isinstance(tree, str) else tree
