"""Processes: how many take part, what they agree on, and how they end.

A run may be spread over many processes, on one machine or on many. Which, is
decided here: by SLURM's, Open MPI's or Kubernetes' environment, which JAX reads
itself, by flags, or by `start_local`, which starts several on this machine.
After `initialize`, everything that one process alone knows (its clock, its
signals, what it sees of the disk) goes through the functions below before a
decision is based on it: processes that decide differently wait for each other
forever. All of them do nothing in a single process.
"""

import collections
import contextlib
import glob
import json
import logging
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax._src import distributed

from kd_jax import parallel

Result = TypeVar("Result")

# Longest text that `together` passes on, in bytes.
_TEXT = 4096
# Seconds until a network file system must have shown a new file.
_VISIBLE = 20.0
# Seconds that local processes have to end by themselves when one has failed.
GRACE = 20.0


class RefusedError(ValueError):
  """What cannot run, found by some process and raised in all."""


def is_first() -> bool:
  """Whether this process writes what one process writes."""
  return jax.process_index() == 0


def detect(environ: Mapping[str, str]) -> str | None:
  """The launcher that started this process as one of several tasks.

  An allocation alone is none: a shell inside `salloc` knows the job and the
  number of its tasks, but only `srun` starts them.

  Args:
    environ: the environment.

  Returns:
    JAX's name of it, "slurm", "ompi" or "k8s", or None.
  """
  if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
    return "slurm"
  if int(environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
    return "ompi"
  # An indexed job's pod; another pod, say of a notebook, has no index.
  if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
    return "k8s"
  return None


def check_flags(
  *,
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  local_processes: int | None,
) -> None:
  """Refuses flags that do not go together.

  Raises:
    ValueError: that says which.
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
  if len(named) < len(given):
    missing = [name for name in given if name not in named]
    raise ValueError(
      f"{', '.join(named)} without {', '.join(missing)}: expected all three of"
      f" {', '.join(given)}, or none"
    )
  assert coordinator_address is not None and num_processes is not None
  assert process_id is not None
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


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_seconds: int,
) -> None:
  """Joins the other processes, if there are any; before JAX is first used.

  Args:
    coordinator_address: HOST:PORT of process 0; None asks the environment.
    num_processes: how many.
    process_id: of this one.
    heartbeat_seconds: after which a process that is silent counts as dead,
      and ends all others.

  Raises:
    ValueError: if they cannot be found, or do not have equally many devices.
  """
  method = None if coordinator_address else detect(os.environ)
  if coordinator_address is None and method is None:
    return
  if heartbeat_seconds < 5:
    raise ValueError(
      "config.parallel.heartbeat_seconds: expected 5 or more, got"
      f" {heartbeat_seconds}"
    )
  logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # It would take SIGTERM for itself; `train` agrees about signals.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
      coordinator_address,
      num_processes,
      process_id,
      cluster_detection_method=method or "deactivate",
      heartbeat_timeout_seconds=heartbeat_seconds,
    )
  except Exception as error:  # whatever a network provokes
    where = coordinator_address or f"what {method} says"
    raise ValueError(
      f"the processes have not found each other by {where}"
      f" ({type(error).__name__}: {error}). Name process 0 with"
      " --coordinator_address HOST:PORT --num_processes N --process_id I"
    ) from error
  counts = np.bincount([device.process_index for device in jax.devices()])
  if len(set(counts)) > 1:
    raise ValueError(
      "expected equally many devices in every process, got"
      f" {', '.join(map(str, counts))}. Choose them with CUDA_VISIBLE_DEVICES"
      " or the scheduler's flags"
    )


def from_all(value: Any) -> list[Any]:
  """Every process's value, JSON-able, in their order."""
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  sizes = parallel.gather_processes(np.int32(len(text)))
  content = np.zeros(sizes.max(), np.uint8)
  content[: len(text)] = np.frombuffer(text, np.uint8)
  rows = parallel.gather_processes(content)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def from_first(value: Any) -> Any:
  """The first process's value, JSON-able; what others give is ignored."""
  return from_all(value if is_first() else None)[0]


def gather_texts(text: str) -> list[str]:
  """Every process's text, cut at 4096 bytes."""
  content = np.zeros(_TEXT, np.uint8)
  encoded = text.encode()[:_TEXT]
  content[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  return [
    row.tobytes().rstrip(b"\0").decode(errors="ignore")
    for row in parallel.gather_processes(content)
  ]


def together(work: Callable[[], Result]) -> Result:
  """Does the same in every process; what fails in one, fails in all.

  Args:
    work: without collectives, so that it may fail anywhere.

  Returns:
    This process's result.

  Raises:
    RefusedError: in all processes, if there was a ValueError, ImportError or
      OSError in some; a single process raises its error itself.
  """
  if jax.process_count() == 1:
    return work()
  problem, caught, result = "", None, None
  try:
    result = work()
  except (ValueError, ImportError, OSError) as error:
    problem, caught = f"{type(error).__name__}: {error}", error
  problems = gather_texts(problem)
  found = {i: text for i, text in enumerate(problems) if text}
  if found:
    first = min(found)
    same = set(found.values()) == {found[first]} and len(found) == len(problems)
    which = "" if same else f"process {first} of {len(problems)}: "
    raise RefusedError(which + found[first]) from caught
  return cast(Result, result)


def require_same(what: str, mine: str, remedy: str) -> None:
  """Checks that something is the same in all processes.

  Args:
    what: the setting that says it, for the error.
    mine: what it is here, in a few words.
    remedy: how to put it right if they differ.

  Raises:
    RefusedError: in all processes, if some have something else than the first.
  """
  found = from_all([mine, socket.gethostname()])
  first, host = found[0]
  other = [i for i, (theirs, _) in enumerate(found) if theirs != first]
  if other:
    who = "; ".join(
      f"process {i} ({found[i][1]}) has {found[i][0]}" for i in other
    )
    raise RefusedError(
      f"{what}: expected the same in all {len(found)} processes. Process 0"
      f" ({host}) has {first}; {who}. {remedy}"
    )


def require_shared(folder: pathlib.Path) -> None:
  """Checks that what the first process writes in a folder, all others see.

  Args:
    folder: absolute path; it may not exist yet, and is then not left behind.

  Raises:
    RefusedError: in all processes, if some do not see it.
  """
  if jax.process_count() == 1:
    return

  def make():
    if not is_first():
      return None
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".shared-{os.getpid()}-{time.time_ns()}"
    token.touch()
    return [token.name, [str(p) for p in made]]

  name, made = from_first(together(make))
  # In this process's own folder, which may have the same name elsewhere.
  token, deadline = folder / name, time.monotonic() + _VISIBLE
  while not token.exists() and time.monotonic() < deadline:
    if token.parent.exists():
      os.listdir(token.parent)  # refreshes what a network file system cached
    time.sleep(0.1)
  here = "" if token.exists() else socket.gethostname()
  blind = {i: host for i, host in enumerate(gather_texts(here)) if host}
  if is_first():
    token.unlink()
    if blind:
      for path in made:
        pathlib.Path(path).rmdir()
  if blind:
    who = ", ".join(f"{i} ({host})" for i, host in blind.items())
    raise RefusedError(
      f"--workdir {folder}: expected a folder that all {jax.process_count()}"
      f" processes share, got one where process {who} does not see what process"
      " 0 writes. Name one on a file system that all machines mount"
    )


@contextlib.contextmanager
def holding(try_lock: Callable[[], bool]) -> Iterator[None]:
  """Waits until the first process holds a lock; the others wait with it.

  Args:
    try_lock: takes the lock if it is free, and says whether it has.
  """
  while not from_first(is_first() and try_lock()):
    time.sleep(0.5)
  yield


class Barrier:
  """Where Orbax's threads wait for those of the other processes.

  JAX's own barrier waits for a process that has failed until a deadline of
  minutes. Here a process whose thread has left a save in the middle is seen to
  have done so, and the others' threads fail as well.
  """

  def __init__(self, name: str):
    """Makes the barriers of one folder; all processes do.

    Args:
      name: of the folder.
    """
    self._name, self._round = name, 0
    self._uses: collections.Counter[str] = collections.Counter()

  def begin(self) -> None:
    """Begins with another save; no thread of any process may be waiting."""
    if self._round and jax.process_count() > 1 and is_first():
      client: Any = distributed.global_state.client
      client.key_value_delete(f"{self._root()}/")
    self._round += 1
    self._uses.clear()

  def wait(self, *, key: str, timeout_ms: int) -> None:
    """Waits for all processes; what `orbax.checkpoint.AsyncOptions` takes.

    Raises:
      RuntimeError: if another process has come to the end without this key.
      TimeoutError: after `timeout_ms`.
    """
    if jax.process_count() == 1:
      return
    # The key-value store that Orbax uses too; it has no public name.
    client: Any = distributed.global_state.client
    self._uses[key] += 1
    root = self._root()
    place = f"{root}/{key}/{self._uses[key]}"
    own = str(jax.process_index())
    if key.endswith("set_value_start") and self._uses[key] == 2:
      client.key_value_set(f"{root}/over/{own}", "", allow_overwrite=True)
    client.key_value_set(f"{place}/{own}", "", allow_overwrite=True)
    everyone = {str(i) for i in range(jax.process_count())}
    deadline = time.monotonic() + timeout_ms / 1000
    while missing := everyone - _children(client, place):
      gone = missing & _children(client, f"{root}/over")
      # Both may have come since: an arrival is told before the end.
      gone -= _children(client, place)
      if gone and not place.startswith(f"{root}/Thread"):
        raise RuntimeError(f"{FOLLOWED} {', '.join(sorted(gone))} has failed")
      if time.monotonic() > deadline:
        raise TimeoutError(
          f"process {', '.join(sorted(missing))} has not come to {key} within"
          f" {timeout_ms / 1000:g} s"
        )
      time.sleep(0.02)

  def _root(self) -> str:
    return f"kd_jax{self._name}/{self._round}"


# How the failure of a process begins that only followed another's.
FOLLOWED = "the save of process"


def _children(client, folder: str) -> set[str]:
  return {
    key.rpartition("/")[2] for key, _ in client.key_value_dir_get(folder + "/")
  }


def end(code: int) -> None:
  """Ends this process at once if others take part, without waiting for them.

  They may be waiting for this one; JAX's orderly shutdown would wait for them.
  """
  if jax.distributed.is_initialized() and jax.process_count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
    _complain(f"stopped by {received}: the same command goes on")
    end(code)
    raise
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _share_of_devices(count: int, index: int) -> dict[str, str]:
  """The environment that gives a local process its share of the devices.

  Raises:
    ValueError: if there are fewer GPUs than processes, or they do not divide.
  """
  if "cpu" not in os.environ.get("JAX_PLATFORMS", ""):
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
      files = glob.glob("/dev/nvidia[0-9]*")
      gpus = [str(i) for i in range(len(files))]
    else:
      gpus = [gpu for gpu in named.split(",") if gpu]
    if gpus:
      if len(gpus) % count:
        raise ValueError(
          f"--local_processes: expected a divisor of the {len(gpus)} GPUs, got"
          f" {count}. Choose GPUs with CUDA_VISIBLE_DEVICES, or take the CPU"
          " with JAX_PLATFORMS=cpu"
        )
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


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start_local(count: int, command: Sequence[str]) -> int:
  """Runs a command as `count` processes of this machine, to the end.

  Of the first, everything is shown; of the others, what they write to stderr,
  after their number. SIGTERM and SIGINT are passed on. When one fails, the
  others have `GRACE` seconds to notice, and are then killed.

  Args:
    count: how many.
    command: to which the flags that `initialize` takes are added.

  Returns:
    The exit code of the first that failed (128 + the signal that killed it),
    or 0.

  Raises:
    ValueError: if the devices cannot be shared out.
  """
  environments = [
    {**os.environ, **_share_of_devices(count, i)} for i in range(count)
  ]
  address = f"127.0.0.1:{_free_port()}"
  children: list[subprocess.Popen] = []
  pumps = []
  passed_on: list[int] = []

  def pass_on(number, frame):
    del frame
    passed_on.append(number)
    for child in children:
      if child.poll() is None:
        child.send_signal(number)

  before = {
    number: signal.signal(number, pass_on)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  try:
    for index, environment in enumerate(environments):
      child = subprocess.Popen(
        [
          *command,
          f"--coordinator_address={address}",
          f"--num_processes={count}",
          f"--process_id={index}",
        ],
        env=environment,
        # Ctrl-C goes to a terminal's whole group: it is passed on once.
        start_new_session=True,
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=None if index == 0 else subprocess.PIPE,
      )
      children.append(child)
      if index:
        pumps.append(
          threading.Thread(target=_pump, args=(index, child), daemon=True)
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


def _pump(index, child):
  for line in child.stderr:
    sys.stderr.write(f"[{index}] {line.decode(errors='replace')}")
    sys.stderr.flush()


def _wait(children) -> int:
  code, deadline = 0, None
  while True:
    left = [i for i, child in enumerate(children) if child.poll() is None]
    failed = [i for i, child in enumerate(children) if child.returncode]
    if failed and not code:
      code = children[failed[0]].returncode
      deadline = time.monotonic() + GRACE
      if code < 0:
        name = signal.Signals(-code).name
        code = 128 - code
        _complain(f"process {failed[0]} was ended by {name}")
    if not left:
      return code
    if deadline is not None and time.monotonic() > deadline:
      _complain(f"ending process {', '.join(map(str, left))}, which waited")
      for index in left:
        children[index].kill()
      deadline = None
    time.sleep(0.05)


def _complain(text: str) -> None:
  print(f"launch.py: {text}", file=sys.stderr, flush=True)
