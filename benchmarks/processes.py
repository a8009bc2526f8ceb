"""Programs that measure in processes of their own, one turn after the other."""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import IO, Any

from benchmarks.cell import READY, WARM


class Process:
  """A program that prints its result last, and may wait for turns.

  Attributes:
    result: what the last line says, JSON, or {"error": why there is none};
      None as long as the program waits for a turn.
  """

  def __init__(
    self, process: subprocess.Popen[str], stderr: IO[str], seconds: float
  ):
    self.result: dict[str, Any] | None = None
    self._process, self._stderr = process, stderr
    self._seconds, self._late = seconds, False

  def end(self) -> None:
    """Kills it: its seconds are over."""
    self._late = True
    self._process.kill()

  def wait(self) -> None:
    """Until it is ready for a turn, or has its result."""
    last = ""
    for line in self._process.stdout or ():
      if line.strip() == READY:
        return
      last = line.strip() or last
    code = self._process.wait()
    if self._late:
      error = f"not done in the {self._seconds:.0f} s that were left"
      self.result = {"error": error}
    elif code:
      self._stderr.seek(0)
      said = self._stderr.read().strip().splitlines() or ["it wrote nothing"]
      # The last line is often not the one that tells.
      error = f"exit code {code}: {said[-1]}"
      self.result = {"error": error, "said": said[-20:]}
    else:
      self.result = json.loads(last)

  def take_turn(self, warm: bool = False) -> None:
    """Lets it take a turn, after warming up if so, and waits for its end."""
    # One that has ended takes no line, and `wait` finds its result.
    with contextlib.suppress(BrokenPipeError):
      print(WARM if warm else "", file=self._process.stdin, flush=True)
    self.wait()


@contextlib.contextmanager
def started(
  command: Sequence[str], seconds: float, environment: dict[str, str]
) -> Iterator[Process]:
  """A Python module's process, which ends with the context or the seconds."""
  with (
    tempfile.TemporaryFile("w+") as stderr,
    subprocess.Popen(
      [sys.executable, "-m", *command],
      cwd=pathlib.Path(__file__).resolve().parent.parent,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=stderr,
      text=True,
    ) as process,
  ):
    found = Process(process, stderr, seconds)
    timer = threading.Timer(seconds, found.end)
    timer.start()
    try:
      yield found
    finally:
      timer.cancel()
      process.kill()
      # Closing would write again what an ended process did not take.
      with contextlib.suppress(BrokenPipeError):
        assert process.stdin is not None
        process.stdin.close()
