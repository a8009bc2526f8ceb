"""SIGTERM, SIGINT and SIGHUP: stop after a checkpoint, or exit at once.

No handler raises: Python drops what is raised while it runs a finaliser or a
weak reference's callback, and C++ code that it passes through aborts.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextlib.contextmanager
def ended_by_signals(code: int) -> Iterator[None]:
  """Makes these signals end this process at once, as if it were killed.

  For phases in which nothing needs saving. Each process ends by itself.

  Args:
    code: the exit code.
  """

  def end(number, frame):
    del frame
    text = (
      f"launch.py: stopped by {signal.Signals(number).name}. Run the same"
      " command again to resume\n"
    )
    # `print` may be what was interrupted.
    with contextlib.suppress(OSError, RuntimeError):
      sys.stdout.flush()
    with contextlib.suppress(OSError):
      os.write(2, text.encode())
    os._exit(code)

  before = _handlers()
  for number in before:
    signal.signal(number, end)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _handlers() -> dict[int, Any]:
  """The handlers of the watched signals; one that is ignored stays so."""
  found = {number: signal.getsignal(number) for number in WATCHED}
  return {n: h for n, h in found.items() if h is not signal.SIG_IGN}


class StopSignals:
  """Context that notes signals instead of dying.

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
      for number in _handlers():
        self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    self.received = signal.Signals(number).name
    signal.signal(number, self._before[number])

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
