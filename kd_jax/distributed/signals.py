"""SIGTERM, SIGINT and SIGHUP: stop after a checkpoint, or exit cleanly.

Python drops what a handler raises while it runs a finaliser or a weak
reference's callback. So every signal is noted as well, and the training loop
looks at the note when it starts and after each step.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from kd_jax.distributed import processes

_WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_noted: list[str] = []


class _Stop(SystemExit):
  """Ends the process. asyncio, which Orbax uses, lets SystemExit through."""


@contextlib.contextmanager
def ended_by_signals(code: int) -> Iterator[None]:
  """Makes these signals end this process, releasing what it holds.

  For phases in which nothing needs saving. Each process ends by itself. A
  second signal has its usual effect.

  Args:
    code: the exit code.
  """
  before = _handlers()
  _noted.clear()

  def stop(number, frame):
    del frame
    _noted.append(signal.Signals(number).name)
    signal.signal(number, before[number])
    raise _Stop(code)

  for number in before:
    signal.signal(number, stop)
  try:
    yield
  except _Stop:
    print(
      f"launch.py: stopped by {_noted[0]}. Run the same command again to"
      " resume",
      file=sys.stderr,
      flush=True,
    )
    processes.end(code)
    raise
  finally:
    _noted.clear()
    for number, handler in before.items():
      signal.signal(number, handler)


def _handlers() -> dict[int, Any]:
  """The handlers of the watched signals; one that is ignored stays so."""
  found = {number: signal.getsignal(number) for number in _WATCHED}
  return {n: h for n, h in found.items() if h is not signal.SIG_IGN}


class StopSignals:
  """Context that notes signals instead of dying.

  A signal that `ended_by_signals` noted before counts as received. A second
  signal of the same kind has its usual effect.

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
      if _noted:
        self.received = _noted[0]
    return self

  def _note(self, number, frame):
    del frame
    self.received = signal.Signals(number).name
    signal.signal(number, self._before[number])

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
