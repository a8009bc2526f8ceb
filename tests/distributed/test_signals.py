"""Signals that ask a run to stop."""

import os
import signal
import threading
import weakref

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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_weak_references_callback_is_noted():
  class Object:
    pass

  thing = Object()
  callback = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
  with signals.ended_by_signals(75):
    del thing  # Python drops what the handler raises in the callback
    assert callback() is None
    with signals.StopSignals() as stop:
      assert stop.received == "SIGTERM"
  with signals.StopSignals() as stop:
    assert stop.received is None


def test_an_ignored_signal_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with signals.ended_by_signals(75), signals.StopSignals() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert stop.received is None
  finally:
    signal.signal(signal.SIGHUP, before)
