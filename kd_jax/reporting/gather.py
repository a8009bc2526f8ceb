"""Keeps the results of finished runs, and writes their tables into a document.

Of each run a few kilobytes: `result.json`, `config.json`, `environment.json`
(the command, versions, hardware) and `metrics.jsonl.gz`, without absolute
paths. `report` reads such a folder like a folder of runs.
"""

import gzip
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import pandas as pd

from kd_jax import distillers, storage
from kd_jax.reporting import published, runs, statistics
from kd_jax.reporting import tables as tables_lib
from kd_jax.runs import records

BEGIN = "<!-- results: written by python -m kd_jax results -->"


END = "<!-- results: end -->"


_ENVIRONMENT = "environment.json"


# An absolute path: an argument, its value, or an item of a tuple.
_PATH = re.compile(r"""(?:(?<=[='"(\[,])|^)/[^'",]+""")


# The table of the README: its recipe, and the teacher.
_RECIPE, _TEACHER = "SimKD", "resnet32x4"

_NOT_RUN = "not run"


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
  rows, _ = runs.collect_whole(folder, also=_command)
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


def _command(run: pathlib.Path) -> list[str]:
  """The command line of a run.

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


def tables(folder: pathlib.Path) -> str:
  """Tables of gathered results, in Markdown.

  Args:
    folder: of folders of results; it may be missing.

  Returns:
    The published table beside the runs of its recipe, with a row for every
    method of the registry; then a table for each folder that has other runs.

  Raises:
    ValueError: see `runs.collect`.
  """
  found = folder.exists() and runs.find_runs(folder)
  groups = runs.group(runs.collect(folder)) if found else []
  table, others = _published_table(groups)
  parts = [table]
  by_folder: dict[str, list[runs.Group]] = {}
  for g in others:
    name = pathlib.Path(g.first["run"]).parts[0]
    by_folder.setdefault(name, []).append(g)
  for name, members in by_folder.items():
    parts.append(_own_table(folder, name, members))
  return "\n".join(parts)


def _published_table(groups):
  """The published table beside the runs of its recipe, and the other groups."""
  published_values = [v for v in published.values() if v.recipe == _RECIPE]
  students = dict.fromkeys(
    v.student for v in published_values if v.teacher == _TEACHER
  )
  alone = {v.method for v in published_values if not v.teacher}
  left = list(groups)

  def cells(method, recipe, student):
    teacher = "" if method in alone else _TEACHER
    theirs = [
      f"{v.top1:.2f}"
      for v in published_values
      if (v.teacher, v.student, v.config) == (teacher, student, recipe)
    ]
    ours = [
      g
      for g in groups
      if g.first["student"] == student
      and g.first["config"]["teacher"]["name"] == teacher
      and published.follows(g.first["config"], recipe)
    ]
    left[:] = [g for g in left if not any(g is one for one in ours)]
    scores = [
      f"{statistics.mean_std(g.values('best', 'top1'), 2)} ({len(g.rows)})"
      for g in ours
    ]
    return "; ".join(theirs) or "-", "; ".join(scores) or _NOT_RUN

  lines = []
  for method, cls in distillers.DISTILLERS.items():
    recipes = dict.fromkeys(
      v.config for v in published_values if v.method == method
    )
    for recipe in recipes or [f"{method}_cifar"]:
      file, *changes = recipe.split()
      title = "student alone" if method in alone else cls.__name__
      settings = [c.rpartition(".")[2].replace("=", " ") for c in changes]
      line = [", ".join([title, *settings]), f"`{file}.py`"]
      for student in students:
        line += cells(method, recipe, student)
      lines.append(line)
  header = ["method", "config"]
  for student in students:
    header += [f"`{student}`, published", "kd_jax"]
  text = tables_lib.markdown(pd.DataFrame(lines, columns=header))
  theirs, ours = cells("none", "teacher_cifar", _TEACHER)
  text += (
    f"\nPublished values: {_RECIPE}'s recipe, "
    f"{published_values[0].source}.\n"
    f"\nThe teacher, `{_TEACHER}`: published {theirs}, kd_jax {ours}.\n"
  )
  return text, left


_COLUMNS = [
  *("network", "teacher", "method", "n", "top-1, last epoch"),
  *("top-1, best epoch", "published", "difference"),
]


def _own_table(folder, name, groups):
  """The table of one folder, after a line about its runs."""
  commands, hardware, recipes = [], [], []
  for g in groups:
    for row in g.rows:
      command = shlex.join(_command(folder / row["run"]))
      commands.append(f"`python {command}`")
      hardware.append(row["hardware"])
    config = g.first["config"]
    if not g.is_teacher:
      recipes.append(
        f"{config['epochs']} epochs of batches of {config['batch_size']}"
      )
  about = [
    f"{word}{'; '.join(dict.fromkeys(found))}"
    for word, found in (("", recipes), ("on ", hardware), ("by ", commands))
    if found
  ]
  table = tables_lib.accuracy(groups)[_COLUMNS]
  table = table.loc[:, (table != "-").any()]
  return f"`{name}`: {', '.join(about)}.\n\n{tables_lib.markdown(table)}"


def rewrite(text: str, content: str) -> str:
  """Replaces the content between the lines `BEGIN` and `END` of a document.

  Raises:
    ValueError: unless the document has one of each, in this order.
  """
  before, begin, rest = text.partition(f"{BEGIN}\n")
  _, end, after = rest.partition(f"{END}\n")
  if not begin or not end or BEGIN in after or END in before + after:
    raise ValueError(
      f"expected one line {BEGIN!r} and after it one line {END!r}. Write them"
      " where the tables belong"
    )
  return f"{before}{begin}\n{content}\n{end}{after}"
