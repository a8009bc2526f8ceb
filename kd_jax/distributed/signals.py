"""SIGTERM and SIGINT: stop after a checkpoint, or exit cleanly."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from kd_jax.distributed import processes

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class _Stop(SystemExit):
  """Ends the process. asyncio, which Orbax uses, lets SystemExit through."""


@contextlib.contextmanager
def ended_by_signals(code: int) -> Iterator[None]:
  """Makes SIGTERM and SIGINT end this process, releasing what it holds.

  For phases in which nothing needs saving. Each process ends by itself. A
  second signal has its usual effect.

  Args:
    code: the exit code.
  """
  before = {number: signal.getsignal(number) for number in _WATCHED}
  received = ""

  def stop(number, frame):
    del frame
    nonlocal received
    received = signal.Signals(number).name
    signal.signal(number, before[number])
    raise _Stop(code)

  for number in _WATCHED:
    signal.signal(number, stop)
  try:
    yield
  except _Stop:
    print(
      f"launch.py: stopped by {received}. Run the same command again to resume",
      file=sys.stderr,
      flush=True,
    )
    processes.end(code)
    raise
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class StopSignals:
  """Context that notes SIGTERM and SIGINT instead of dying.

  A second signal of the same kind has its usual effect.

  Attributes:
    received: name of the signal, or None.
  """

  def __init__(self):
    """Watches nothing until entered."""
    self.received: str | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is threading.main_thread():
      for number in _WATCHED:
        self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    self.received = signal.Signals(number).name
    signal.signal(number, self._before[number])

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
