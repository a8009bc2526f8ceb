"""Writers of metrics and progress."""

import os
import pathlib
import sys
import time
from collections.abc import Mapping

from kd_jax import storage


class Writer:
  """Writes scalars to `metrics.jsonl` and to a TensorBoard event file.

  One line per call: `{"step": .., "kind": "train" | "eval", name: value}`.
  """

  def __init__(
    self, workdir: pathlib.Path, *, resume_step: int, enabled: bool = True
  ):
    """Open the files.

    Args:
      workdir: folder to write to.
      resume_step: records of later steps are removed: those steps are about to
        be made again.
      enabled: whether to write anything at all.

    Raises:
      OSError: if the files cannot be written.
    """
    self._enabled = enabled
    if not enabled:
      return
    # Imported by those who write alone.
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2

    path = workdir / "metrics.jsonl"
    _drop_after(path, resume_step)
    self._lines = path.open("a", encoding="utf-8")
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    # Not SummaryWriter: its thread dies of a full disk, and `close` then waits
    # for it forever.
    self._events = event_file_writer.EventsWriter(
      str(folder / "events"), f".{os.getpid()}.{resume_step}"
    )
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._events.write_event(
      event_pb2.Event(step=resume_step + 1, session_log=start)
    )

  def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
    """Append one record and hand it to the operating system.

    Raises:
      OSError: if it cannot be written.
    """
    if not self._enabled:
      return
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2

    record = {"step": step, "kind": kind, **scalars}
    self._lines.write(storage.to_json(record))
    self._lines.flush()
    for name, value in scalars.items():
      scalar = summary.scalar(f"{kind}/{name}", value)
      self._events.write_event(
        event_pb2.Event(step=step, wall_time=time.time(), summary=scalar)
      )
    self._events.flush()

  def close(self) -> None:
    """Close both files."""
    if self._enabled:
      self._lines.close()
      self._events.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
  """Remove records of later steps, and a last line that was cut short."""
  if not path.exists():
    return
  kept = [r for r in storage.read_metrics(path) if r["step"] <= step]
  storage.write_whole(path, "".join(map(storage.to_json, kept)))


class Progress:
  """A progress bar on a terminal, plain lines elsewhere."""

  def __init__(self, *, total: int, initial: int, title: str, enabled: bool):
    """Show `initial` of `total` steps under `title`."""
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

  def advance(self, steps: int) -> None:
    """Move on by `steps`."""
    self._bar.update(steps)

  def line(self, text: str) -> None:
    """Print a line without disturbing the bar."""
    if self._enabled:
      self._bar.write(text, file=sys.stdout)
      sys.stdout.flush()

  def close(self) -> None:
    """Leave the bar as it stands."""
    self._bar.close()
