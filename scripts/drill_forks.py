"""Stops a run at random moments, again and again, until it ends; many times.

    python scripts/drill_forks.py FOLDER MOMENTS SEED FLAGS OF LAUNCH.PY

Each start is a fork of a process that has imported everything, and so costs
little more than its training. For `drills.py`. Prints JSON lines: of each run
that has ended its folder, the exit codes of its starts, and their output.
"""

import importlib
import json
import os
import pathlib
import random
import signal
import sys
import time

REPO = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from absl import app

import launch
from kd_jax.distributed import launcher
from kd_jax.runs import exits

# Seconds that a start may take, on a loaded machine too.
_LIMIT = 600.0


def start(
  workdir: pathlib.Path, flags: list[str], moment: float | None
) -> tuple[int, bool, float]:
  """Runs launch.py in a fork, which gets SIGTERM after `moment` seconds.

  Returns:
    Its exit code, whether it got the signal, and the seconds that it took.
  """
  begun, signalled = time.monotonic(), False
  child = os.fork()
  if not child:
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    launcher.keep_output()
    sys.argv = ["launch.py", *flags, f"--workdir={workdir}"]
    app.run(launch.main, sys.argv, flags_parser=launch.parse)
  while True:
    ended, status = os.waitpid(child, os.WNOHANG)
    seconds = time.monotonic() - begun
    if ended:
      return os.waitstatus_to_exitcode(status), signalled, seconds
    if moment is not None and not signalled and seconds > moment:
      os.kill(child, signal.SIGTERM)
      signalled = True
    if seconds > _LIMIT:
      os.kill(child, signal.SIGKILL)
    time.sleep(0.002)


def main(folder: str, moments: str, seed: str, *flags: str) -> None:
  """Ends runs that are stopped so often in all."""
  launcher.set_xla_flags()
  for name in ("kd_jax.reporting", "kd_jax.data.grain", "kd_jax.runs.train"):
    importlib.import_module(name)  # once, for all forks
  # Until launch.py watches signals, there is nothing to save.
  signal.signal(signal.SIGTERM, lambda *_: os._exit(exits.STOPPED))
  rng, done, number, seconds = random.Random(seed), 0, 0, 0.0
  while done < int(moments):
    # Every fifth run trains its teacher, the others share it.
    workdir = pathlib.Path(folder) / str(number // 5) / str(number)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    codes: list[int] = []
    while not codes or codes[-1] in (exits.STOPPED, -signal.SIGTERM):
      # The first run compiles, the second one tells how long a run takes; on
      # a machine that has become slower, later signals let it come to its end.
      longest = seconds * (1 + len(codes) / 10)
      moment = rng.uniform(0, longest) if number > 1 else None
      code, signalled, took = start(workdir, list(flags), moment)
      codes.append(code)
      done += signalled
      if number == 1:
        seconds = took
    log = pathlib.Path(f"{workdir}.log").read_text(errors="replace")
    line = {"workdir": str(workdir), "codes": codes, "log": log}
    print(json.dumps({**line, "moments": done}), flush=True)
    number += 1


if __name__ == "__main__":
  main(*sys.argv[1:])
