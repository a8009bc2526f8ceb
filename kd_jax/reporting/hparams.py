"""TensorBoard's HParams view of finished runs: a session for each.

tensorboard --logdir RUNS/hparams
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from kd_jax import storage
from kd_jax.runs import identity

# What every session shows, whether it differs or not.
_ALWAYS = ("distiller.name", "seed", "student.name", "teacher.name")


_SCORES = {
  f"{word}_epoch/{name}": (epoch, name)
  for epoch, word in (("final", "last"), ("best", "best"))
  for name in ("top1", "top5", "ce")
}


# TensorBoard reads files with "tfevents" in their names.
_FILE = "events.out.tfevents.0.kd_jax"


def write(rows: Sequence[dict[str, Any]], folder: pathlib.Path) -> None:
  """Writes events of which the HParams view is made.

  A session has the settings that are not the same in all runs, and the scores
  of the last and of the best epoch. Sessions of other runs are removed.

  Args:
    rows: of `report.collect`.
    folder: to write into; each run has its path below it. The same runs give
      the same files.
  """
  from tensorboardX import summary

  settings = [_values(row["config"]) for row in rows]
  every = {name: value for found in settings for name, value in found.items()}
  shown = {
    name
    for name in every
    if name in _ALWAYS
    or any(found.get(name) != every[name] for found in settings)
  }
  experiment, _, _ = summary.hparams(
    {name: every[name] for name in sorted(shown)}, _SCORES
  )
  files = {folder: [(0, experiment)]}
  for row, found in zip(rows, settings):
    mine = {name: found[name] for name in sorted(shown & found.keys())}
    _, begin, end = summary.hparams(mine, _SCORES)
    scalars = [
      (row[epoch]["epoch"], summary.scalar(title, row[epoch][name]))
      for title, (epoch, name) in _SCORES.items()
    ]
    # A run that is itself the folder has both in one file.
    events = files.setdefault(folder / row["run"], [])
    events += [(0, begin), *scalars, (0, end)]
  for place, events in files.items():
    _write_events(place, events)
  for path in folder.rglob(_FILE):
    if path.parent not in files:
      path.unlink(missing_ok=True)


def _values(config):
  """The settings of a run; text for what is no number, truth or text."""
  return {
    name: value if isinstance(value, bool | int | float | str) else str(value)
    for name, value in identity.config_fingerprint(config).items()
    if value is not None
  }


def _write_events(folder, events):
  """Writes (step, summary) into one file, which appears whole."""
  from tensorboardX import record_writer
  from tensorboardX.proto import event_pb2

  folder.mkdir(parents=True, exist_ok=True)
  draft = storage.draft(folder / "draft")
  writer = record_writer.RecordWriter(str(draft))
  for event in (
    event_pb2.Event(file_version="brain.Event:2"),
    *(event_pb2.Event(step=step, summary=s) for step, s in events),
  ):
    writer.write(event.SerializeToString())
  writer.close()
  draft.replace(folder / _FILE)
