"""TensorBoard's HParams view of finished runs: a session for each.

tensorboard --logdir RUNS/hparams
"""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from kd_jax import storage
from kd_jax.runs import identity

# Settings that every session shows, even if all runs have the same.
_ALWAYS = ("distiller.name", "seed", "student.name", "teacher.name")


def write(rows: Sequence[dict[str, Any]], folder: pathlib.Path) -> None:
  """Replaces the folder by the events of the HParams view.

  A session has the settings that differ between runs, and the scores of the
  last and of the best epoch.

  Args:
    rows: of `runs.collect`.
    folder: to write into; each run has its path below it.

  Raises:
    ValueError: if the folder holds other files, such as a run of that name.
  """
  import tensorboardX

  for path in folder.rglob("*"):
    if path.is_file() and "tfevents" not in path.name:
      raise ValueError(
        f"{folder}: expected only TensorBoard's events, which the report"
        f" replaces, found {path}. Move it, or report --to another folder"
      )
  settings = [identity.config_fingerprint(row["config"]) for row in rows]
  # TensorBoard lists only the columns of one session: all have to be alike.
  shown = [
    name
    for name in sorted(set().union(*settings))
    if name in _ALWAYS
    or any(found.get(name) != settings[0].get(name) for found in settings)
  ]
  draft = storage.draft(folder)
  with tensorboardX.SummaryWriter(str(draft)) as writer:
    for row, found in zip(rows, settings):
      scores = {
        f"{word}_epoch/{name}": row[epoch][name]
        for epoch, word in (("final", "last"), ("best", "best"))
        for name in ("top1", "top5", "ce", "epoch")
      }
      hparams = {name: _value(found.get(name, "")) for name in shown}
      # The folder itself has the events of the writer.
      session = "run" if row["run"] == "." else row["run"]
      writer.add_hparams(hparams, scores, session, row["final"]["epoch"])
  shutil.rmtree(folder, ignore_errors=True)
  try:
    draft.rename(folder)
  except OSError:  # another process has just written it
    shutil.rmtree(draft)


def _value(value):
  return value if isinstance(value, bool | int | float | str) else str(value)
