"""Metrics: sums on the device, means on the host, and where they are written.

A device never divides: a step returns sums over its global batch and their
count, so that means over any number of steps, batches or devices are exact.
"""

import contextlib
import errno
import gzip
import json
import logging
import os
import pathlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import parallel

_log = logging.getLogger(__name__)


COUNT = "count"


def topk_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
  """Whether each label is among the k largest logits.

  Args:
    logits: [B, C].
    labels: [B] int.
    k: at most C is used. Ties count against the label, NaNs too.

  Returns:
    [B] float32, 1 for a hit.
  """
  own = jnp.take_along_axis(logits, labels[:, None], axis=1)
  # Comparisons with NaN are false: count what is surely smaller instead of
  # what is larger, so that a diverged network scores 0 and not 100 %.
  smaller = jnp.sum((logits < own).astype(jnp.int32), axis=1)
  return (smaller >= logits.shape[1] - min(k, logits.shape[1])).astype(
    jnp.float32
  )


def global_sums(
  values: Mapping[str, jax.Array],
  count: jax.Array,
  axis_name: str | None,
) -> dict[str, jax.Array]:
  """Adds local sums and their count over the devices.

  Args:
    values: name -> local sum.
    count: local number of examples.
    axis_name: the mapped axis, or None.

  Returns:
    The global sums, and the global count under "count".
  """
  return parallel.axis_sum({**values, COUNT: count}, axis_name)


def means(sums: Mapping[str, Any]) -> dict[str, float]:
  """Divides sums (scalars, or arrays over steps) by their count.

  Args:
    sums: what a step returned, fetched to the host.

  Returns:
    name -> mean, without the count; hits ("top1", "top5") in percent.

  Raises:
    ValueError: if there was no example.
  """
  count = float(np.sum(sums[COUNT], dtype=np.float64))
  if not count:
    raise ValueError(
      "expected images to score, got none: not one could be decoded. Check the"
      " data"
    )
  return {
    name: float(np.sum(value, dtype=np.float64))
    * (100.0 if name.startswith("top") else 1.0)
    / count
    for name, value in sums.items()
    if name != COUNT
  }


def calibration_error(
  confidence: np.ndarray, correct: np.ndarray, *, bins: int = 15
) -> float:
  """The expected calibration error (Guo et al., ICML 2017, equation 3).

  Predictions are sorted into bins of equal width by their confidence; the
  error is the mean over them of |accuracy - confidence| of their bin.

  Args:
    confidence: [N], the probability of the predicted class.
    correct: [N] bool.
    bins: how many; the m-th holds ((m - 1) / bins, m / bins].

  Returns:
    Between 0 and 1.
  """
  bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.asarray(correct, np.float64) - confidence
  sums = np.bincount(bin_of, weights=gaps, minlength=bins)
  return float(np.abs(sums).sum() / len(confidence))


def first_non_finite(sums: Mapping[str, Any]) -> tuple[int, list[str]] | None:
  """Finds the first step whose sums are not all finite.

  Args:
    sums: arrays [k] over k steps, on the host.

  Returns:
    (position in 0..k-1, the names that are not finite there), or None.
  """
  bad = {name: ~np.isfinite(value) for name, value in sums.items()}
  anywhere = np.logical_or.reduce(list(bad.values()))
  if not anywhere.any():
    return None
  first = int(np.argmax(anywhere))
  return first, [name for name, flags in bad.items() if flags[first]]


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
        _log.warning(
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
  kept = [r for r in read(path) if r["step"] <= step]
  temporary = path.with_suffix(".tmp")
  temporary.write_text(
    "".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8"
  )
  os.replace(temporary, path)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads a `metrics.jsonl`; a last line cut short by a crash is left out.

  Args:
    path: of the file, or of one compressed by gzip, whose name ends in .gz.
  """
  raw = path.read_bytes()
  if path.suffix == ".gz":
    raw = gzip.decompress(raw)
  records = []
  for line in raw.decode("utf-8").splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      _log.warning("%s: left out a line that was cut short", path)
  return records


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
