"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from kd_jax.distributed import signals


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
def test_stop_signals(number):
  seen = []
  outside = signal.signal(number, lambda *_: seen.append("outside"))
  try:
    with signals.StopSignals() as stop:
      assert stop.received is None
      os.kill(os.getpid(), number)
      assert stop.received == signal.Signals(number).name
      assert seen == []
      os.kill(os.getpid(), number)  # the second acts as without the context
      assert seen == ["outside"]
    os.kill(os.getpid(), number)
    assert seen == ["outside", "outside"]
  finally:
    signal.signal(number, outside)


def test_stop_signals_restore_the_handlers_after_an_error():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(RuntimeError), signals.StopSignals():
    assert signal.getsignal(signal.SIGTERM) != before
    raise RuntimeError
  assert signal.getsignal(signal.SIGTERM) == before


def test_stop_signals_do_nothing_in_another_thread():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def work():
    with signals.StopSignals() as stop:
      seen.append((stop.received, signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [(None, before)]


ENDED = """
import os, sys, weakref
from kd_jax.distributed import signals

class Object:
  pass

with signals.ended_by_signals(75):
  print("begun")
  number = int(sys.argv[2])
  try:
    if sys.argv[1] == "callback":  # Python drops what is raised in there
      thing = Object()
      callback = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
      del thing
    elif sys.argv[1] == "print":
      class Reentrant:
        def flush(self):
          raise RuntimeError("reentrant call")
      sys.stdout.flush()
      sys.stdout = Reentrant()
      os.kill(os.getpid(), number)
    else:
      os.close(2)  # nobody listens
      os.kill(os.getpid(), number)
  except BaseException:
    os._exit(1)
  os._exit(2)
"""


@pytest.mark.parametrize("where", ["callback", "print", "closed"])
@pytest.mark.parametrize("number", signals.WATCHED)
def test_ended_by_signals(number, where, repo):
  process = subprocess.run(
    [sys.executable, "-c", ENDED, where, str(int(number))],
    env={**os.environ, "PYTHONPATH": str(repo)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 75
  assert process.stdout == "begun\n"
  said = f"stopped by {signal.Signals(number).name}. Run the same command"
  assert said in process.stderr or where == "closed"


def test_ended_by_signals_restores_the_handlers():
  before = signal.getsignal(signal.SIGTERM)
  with signals.ended_by_signals(75):
    assert signal.getsignal(signal.SIGTERM) != before
  assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_signal_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with signals.ended_by_signals(75), signals.StopSignals() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert stop.received is None
  finally:
    signal.signal(signal.SIGHUP, before)
