"""Writers of metrics and progress."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from kd_jax import storage
from kd_jax.training import metrics

_log = logging.getLogger(__name__)


class Writer:
  """Writes scalars to `metrics.jsonl` and to TensorBoard event files.

  One line per call: `{"step": .., "kind": "train" | "eval", name: value}`.
  What a full disk does not take is kept and written with a later call.
  """

  def __init__(
    self, workdir: pathlib.Path, *, resume_step: int, enabled: bool = True
  ):
    """Opens the files.

    Args:
      workdir: folder to write to.
      resume_step: what was written after this step is removed: those steps
        are about to be made again.
      enabled: whether anything is written at all.
    """
    self._enabled = enabled
    if not enabled:
      return
    self._path = workdir / "metrics.jsonl"
    _drop_after(self._path, resume_step)
    self._lines = self._path.open("ab", buffering=0)
    self._size = self._path.stat().st_size
    self._unwritten = b""
    self._full = False
    self._events = _Events(workdir / "tensorboard", purge_step=resume_step + 1)

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
    """Appends one record and hands it to the operating system."""
    if not self._enabled:
      return
    record = {"step": step, "kind": kind, **scalars}
    self._unwritten += (json.dumps(record) + "\n").encode()
    self._flush()
    for name, value in scalars.items():
      self._events.add(f"{kind}/{name}", value, step)
    self._events.flush()

  def _flush(self):
    if not self._unwritten:
      return
    try:
      written = self._lines.write(self._unwritten)
      if written < len(self._unwritten):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
      os.truncate(self._path, self._size)  # half a line
      if not self._full:
        metrics._log.warning(
          "%s could not be written (%s); its lines are kept and written when"
          " there is room",
          self._path,
          error,
        )
      self._full = True
      return
    self._size += len(self._unwritten)
    self._unwritten, self._full = b"", False

  def close(self) -> None:
    """Flushes and closes both files."""
    if not self._enabled:
      return
    self._flush()
    self._lines.close()
    self._events.flush()
    self._events.close()


class _Events:
  """TensorBoard's event files, written without a thread that may die."""

  def __init__(self, folder: pathlib.Path, *, purge_step: int):
    # After a restore, and not by those who only read.
    from tensorboardX.proto import event_pb2

    folder.mkdir(exist_ok=True)
    self._new, self._folder = event_pb2.Event, folder
    self._path, self._size, self._files = folder, 0, 0
    self._file: Any = None
    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._pending = [self._new(step=purge_step, session_log=log)]

  def add(self, name: str, value: float, step: int) -> None:
    """Adds a value, to be written with the next `flush`."""
    from tensorboardX import summary

    scalar = summary.scalar(name, value)
    now = time.time()
    self._pending.append(self._new(step=step, wall_time=now, summary=scalar))

  def flush(self) -> None:
    """Writes what there is, or keeps it if the disk is full."""
    from tensorboardX import record_writer

    events = self._pending
    try:
      if self._file is None:
        self._path = self._folder / (
          f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
          f".{os.getpid()}.{self._files}"
        )
        self._files, self._size = self._files + 1, 0
        self._file = record_writer.RecordWriter(str(self._path))
        now = time.time()
        version = self._new(wall_time=now, file_version="brain.Event:2")
        events = [version, *events]
      for event in events:
        self._file.write(event.SerializeToString())
      self._file.flush()
    except OSError:  # `Writer` says so
      self.close()
      if self._path.exists():  # without half an event at its end
        os.truncate(self._path, self._size)
    else:
      self._size, self._pending = self._path.stat().st_size, []

  def close(self) -> None:
    """Closes the file; what is added later goes into another."""
    if self._file is not None:
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Removes records of later steps, and a last line that was cut short."""
  if not path.exists():
    return
  kept = [r for r in storage.read_metrics(path) if r["step"] <= step]
  temporary = path.with_suffix(".tmp")
  temporary.write_text(
    "".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8"
  )
  os.replace(temporary, path)


class Progress:
  """A progress bar on a terminal, plain lines elsewhere."""

  def __init__(self, *, total: int, initial: int, title: str, enabled: bool):
    """Shows `initial` of `total` steps under `title`."""
    from tqdm import tqdm

    self._enabled = enabled
    self._bar = tqdm(
      total=total,
      initial=initial,
      desc=title,
      unit="step",
      dynamic_ncols=True,
      mininterval=0.5,
      disable=not (enabled and sys.stderr.isatty()),
    )

  def advance(self, steps: int, **shown: str) -> None:
    """Moves on by `steps` and shows `shown` beside the bar."""
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update(steps)

  def line(self, text: str) -> None:
    """Prints a line without disturbing the bar."""
    if self._enabled:
      self._bar.write(text, file=sys.stdout)
      sys.stdout.flush()

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()
