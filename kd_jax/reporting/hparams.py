"""TensorBoard's HParams view of finished runs: a session for each.

tensorboard --logdir RUNS/hparams
"""

import errno
import pathlib
import shutil
import struct
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
  try:
    with storage.drafted(folder) as draft:
      for row, found in zip(rows, settings):
        hparams = {name: _value(found.get(name, "")) for name in shown}
        session = "run" if row["run"] == "." else row["run"]
        _write_session(draft / session, hparams, row)
      shutil.rmtree(folder, ignore_errors=True)
  except OSError as error:
    if error.errno != errno.ENOTEMPTY:  # another process has just written it
      raise


def _write_session(folder, hparams, row):
  from tensorboardX import summary
  from tensorboardX.proto import event_pb2

  scores = {
    f"{word}_epoch/{name}": row[epoch][name]
    for epoch, word in (("final", "last"), ("best", "best"))
    for name in ("top1", "top5", "ce", "epoch")
  }
  epoch = int(row["final"]["epoch"])
  events = [
    event_pb2.Event(file_version="brain.Event:2"),
    *(event_pb2.Event(summary=x) for x in summary.hparams(hparams, scores)),
    *(
      event_pb2.Event(step=epoch, summary=summary.scalar(name, value))
      for name, value in scores.items()
    ),
  ]
  folder.mkdir(parents=True)
  # Not the library's writers, which leave a full disk to a thread, or a file
  # open.
  content = b"".join(_record(event.SerializeToString()) for event in events)
  (folder / "events.out.tfevents.0").write_bytes(content)


def _record(data: bytes) -> bytes:
  """A record of an event file: length, checksum, data, checksum."""
  from tensorboardX.record_writer import masked_crc32c

  size = struct.pack("<Q", len(data))
  sums = (struct.pack("<I", masked_crc32c(part)) for part in (size, data))
  return size + next(sums) + data + next(sums)


def _value(value):
  return value if isinstance(value, bool | int | float | str) else str(value)
