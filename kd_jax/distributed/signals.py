"""SIGTERM and SIGINT: stop after a checkpoint, or exit cleanly."""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from kd_jax.distributed import processes


class _Stop(SystemExit):
  """Ends the process; asyncio, in which Orbax works, hands on such alone."""


@contextlib.contextmanager
def ended_by_signals(code: int) -> Iterator[None]:
  """Makes SIGTERM and SIGINT end this process, with what it holds released.

  For where nothing has to be saved first: what is finished is whole on the
  disk, and the rest is done again. Of several processes each ends by itself.
  A second signal acts as it would have without this.

  Args:
    code: the exit code.
  """
  watched = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.getsignal(number) for number in watched}
  received = ""

  def stop(number, frame):
    del frame
    nonlocal received
    received = signal.Signals(number).name
    signal.signal(number, before[number])
    raise _Stop(code)

  for number in watched:
    signal.signal(number, stop)
  try:
    yield
  except _Stop:
    complain(f"stopped by {received}: the same command goes on")
    processes.end(code)
    raise
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def complain(text: str) -> None:
  """Prints a line to stderr."""
  print(f"launch.py: {text}", file=sys.stderr, flush=True)


_log = logging.getLogger(__name__)


class StopSignals:
  """Notes SIGTERM and SIGINT instead of dying, while the context lasts.

  A second signal of the same kind acts as it would have without it.

  Attributes:
    received: the signal's name, or None.
  """

  _WATCHED = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    """Watches nothing yet."""
    self.received: str | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is threading.main_thread():
      for number in self._WATCHED:
        self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    self.received = signal.Signals(number).name
    signal.signal(number, self._before[number])

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
