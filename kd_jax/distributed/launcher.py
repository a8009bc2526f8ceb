"""What launch.py does before JAX is imported: flags, variables, processes."""

import contextlib
import errno
import glob
import importlib.metadata
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from kd_jax.distributed import signals

# Seconds that the other local processes get to end after one has failed.
GRACE = 20.0


def set_xla_flags() -> None:
  """Has XLA run a CPU's operations one after the other: see docs/speed.md.

  Does nothing if the user has set that flag, or a GPU does the work.
  """
  flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
  flags = os.environ.get("XLA_FLAGS", "")
  on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
  # XLA does not start with a flag that its version lacks.
  jaxlib = importlib.metadata.version("jaxlib")
  known = jaxlib.startswith(("0.10.", "0.11.", "0.12."))
  if known and flag not in flags and (on_cpu or not _find_gpus()):
    os.environ["XLA_FLAGS"] = f"{flags} {flag}=false".strip()


class _Lasting(io.RawIOBase):
  """A file that swallows what its reader no longer takes."""

  def __init__(self, file: io.FileIO):
    self._file = file

  def writable(self) -> bool:
    return True

  def isatty(self) -> bool:
    return self._file.isatty()

  def fileno(self) -> int:
    return self._file.fileno()

  def write(self, data: Any) -> int:
    try:
      return self._file.write(data) or 0
    except OSError as error:
      if error.errno not in (errno.EPIPE, errno.EIO):
        raise
      return len(data)


def keep_output() -> None:
  """Lets a run go on when its terminal or the reader of its pipe is gone.

  What is printed from then on is lost; the workdir's files have it all.
  """
  for name, number in (("stdout", 1), ("stderr", 2)):
    with contextlib.suppress(OSError):
      os.fstat(number)
      file = _Lasting(io.FileIO(number, "wb", closefd=False))
      text = io.TextIOWrapper(
        io.BufferedWriter(file), "utf-8", "replace", line_buffering=True
      )
      setattr(sys, name, text)


def _find_gpus() -> list[str]:
  return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def parse_shard(
  text: str | None, environ: Mapping[str, str]
) -> tuple[int, int]:
  """Returns (index, count) of this process's share of a grid.

  Args:
    text: value of --shard, "I/N"; None takes the task of a SLURM array.
    environ: the environment.

  Raises:
    ValueError: for a shard that does not exist.
  """
  if text is not None:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
      raise ValueError(
        f"--shard: expected I/N with I from 0 to N - 1, got {text!r}"
      )
    return int(match[1]), int(match[2])
  if "SLURM_ARRAY_TASK_COUNT" not in environ:
    return 0, 1
  task, first, step, count = (
    int(environ[f"SLURM_ARRAY_TASK_{name}"])
    for name in ("ID", "MIN", "STEP", "COUNT")
  )
  index, rest = divmod(task - first, step)
  if rest or index >= count:
    raise ValueError(
      "--shard: a SLURM array divides a grid only if its indices are evenly"
      f" spaced, as in --array=0-7. Task {task} of {count} from {first} is not"
      " of such an array: give --shard I/N"
    )
  return index, count


def check_flags(
  *,
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  local_processes: int | None,
) -> None:
  """Checks that the flags about processes go together.

  Raises:
    ValueError: if they do not.
  """
  given = {
    "--coordinator_address": coordinator_address,
    "--num_processes": num_processes,
    "--process_id": process_id,
  }
  named = [name for name, value in given.items() if value is not None]
  if local_processes is not None:
    if named:
      raise ValueError(
        "--local_processes starts all processes itself: leave out"
        f" {', '.join(named)}"
      )
    if local_processes < 1:
      raise ValueError(
        f"--local_processes: expected 1 or more, got {local_processes}"
      )
    return
  if not named:
    return
  if coordinator_address is None or num_processes is None or process_id is None:
    missing = [name for name in given if name not in named]
    raise ValueError(
      f"{', '.join(named)} without {', '.join(missing)}: expected all three of"
      f" {', '.join(given)}, or none"
    )
  if not re.fullmatch(r".+:\d+", coordinator_address):
    raise ValueError(
      "--coordinator_address: expected HOST:PORT of process 0, got"
      f" {coordinator_address!r}"
    )
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise ValueError(
      "--process_id: expected 0 to --num_processes - 1, got"
      f" {process_id} of {num_processes}"
    )


def share_of_devices(count: int, index: int) -> dict[str, str]:
  """Returns the variables that give a local process its share of devices.

  Args:
    count: number of local processes.
    index: this one's.

  Raises:
    ValueError: if the devices cannot be divided evenly.
  """
  if "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = _find_gpus()
    if named is not None:
      gpus = [gpu for gpu in named.split(",") if gpu]
    if len(gpus) % count:
      raise ValueError(
        f"--local_processes: expected a divisor of the {len(gpus)} GPUs, got"
        f" {count}. Choose GPUs with CUDA_VISIBLE_DEVICES, or take the CPU"
        " with JAX_PLATFORMS=cpu"
      )
    if gpus:
      size = len(gpus) // count
      mine = gpus[index * size : (index + 1) * size]
      return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
  devices = int(os.environ.get("JAX_NUM_CPU_DEVICES") or count)
  if devices % count:
    raise ValueError(
      "--local_processes: expected a divisor of JAX_NUM_CPU_DEVICES, which is"
      f" {devices}, got {count}"
    )
  return {"JAX_NUM_CPU_DEVICES": str(devices // count)}


def start_local(count: int, command: Sequence[str]) -> int:
  """Runs a command as `count` processes on this machine, to the end.

  Shows all output of the first process, and stderr of the others with their
  number before each line. Passes SIGTERM, SIGINT and SIGHUP on. When a process
  fails, the others get `GRACE` seconds to end before they are killed.

  Args:
    count: number of processes.
    command: --local_processes is left out, and the flags that
      `processes.initialize` needs are added.

  Returns:
    Exit code of the first process that failed (128 + the number of the signal
    that killed it), or 0.

  Raises:
    ValueError: if the devices cannot be divided evenly.
  """
  environments = [
    {**os.environ, **share_of_devices(count, i)} for i in range(count)
  ]
  address = f"127.0.0.1:{_free_port()}"
  children: list[subprocess.Popen] = []
  pumps: list[threading.Thread] = []

  def pass_on(number, frame):
    del frame
    for child in children:
      if child.poll() is None:
        child.send_signal(number)

  before = {
    number: signal.signal(number, pass_on)
    for number in signals.WATCHED
    if signal.getsignal(number) is not signal.SIG_IGN
  }
  try:
    for index, environment in enumerate(environments):
      child = subprocess.Popen(
        [
          *_without_flag("local_processes", command),
          f"--coordinator_address={address}",
          f"--num_processes={count}",
          f"--process_id={index}",
        ],
        env=environment,
        # Without its own group, Ctrl-C would reach a child twice.
        start_new_session=True,
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=None if index == 0 else subprocess.PIPE,
      )
      children.append(child)
      if child.stderr:
        pumps.append(
          threading.Thread(
            target=_pump, args=(index, child.stderr), daemon=True
          )
        )
        pumps[-1].start()
    return _wait(children)
  finally:
    for child in children:
      if child.poll() is None:
        child.kill()
      child.wait()
    for pump in pumps:
      pump.join()
    for number, handler in before.items():
      signal.signal(number, handler)


def _without_flag(flag: str, argv: Sequence[str]) -> list[str]:
  kept, skip = [], False
  for arg in argv:
    name, equals, _ = arg.lstrip("-").partition("=")
    if skip:
      skip = False
    elif arg.startswith("-") and name == flag:
      skip = not equals
    else:
      kept.append(arg)
  return kept


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def _pump(index: int, stderr: IO[bytes]) -> None:
  for line in stderr:
    sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
    sys.stderr.flush()


def _wait(children: list[subprocess.Popen]) -> int:
  code, deadline = 0, None
  while True:
    left = [i for i, child in enumerate(children) if child.poll() is None]
    failed = [i for i, child in enumerate(children) if child.returncode]
    if failed and not code:
      code = children[failed[0]].returncode
      deadline = time.monotonic() + GRACE
      if code < 0:
        _say(f"process {failed[0]} was ended by {signal.Signals(-code).name}")
        code = 128 - code
    if not left:
      return code
    if deadline is not None and time.monotonic() > deadline:
      _say(f"ending process {', '.join(map(str, left))}, which waited")
      for index in left:
        children[index].kill()
      deadline = None
    time.sleep(0.05)


def _say(text: str) -> None:
  print(f"launch.py: {text}", file=sys.stderr, flush=True)
