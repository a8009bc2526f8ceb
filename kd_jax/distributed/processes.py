"""Processes: joining them, and what they have to agree on.

A run may use many processes on one or many machines. JAX finds them through
the environment of SLURM, Open MPI or Kubernetes, or `initialize` gets them as
arguments. Processes that decide differently wait for each other forever. So
whatever only one process knows (its clock, its signals, its view of the disk)
goes through the functions below before a decision depends on it. All of them
also work in a single process.
"""

import contextlib
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np

from kd_jax.distributed import collectives

Result = TypeVar("Result")

_BLOCK = 4096  # bytes

# Seconds until a network file system must show a new file.
VISIBLE = 20.0
# Seconds until all processes must have found each other.
FOUND = 300


class RefusedError(ValueError):
  """Invalid setup, raised on every process."""


def is_first() -> bool:
  """Whether this is process 0, which writes files and prints."""
  return jax.process_index() == 0


def detect(environ: Mapping[str, str]) -> str | None:
  """Finds the launcher that started this process as one of several tasks.

  A SLURM allocation alone is not enough: only `srun` starts the tasks that a
  shell inside `salloc` sees announced.

  Args:
    environ: the environment.

  Returns:
    JAX's name of the launcher, "slurm", "ompi" or "k8s", or None.
  """
  # A shell of `srun --pty` sees all tasks announced, and is the only one.
  interactive = "SLURM_PTY_PORT" in environ
  if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and not interactive:
    return "slurm"
  if int(environ.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
    return "ompi"
  # Only pods of an indexed job have an index; a notebook's pod has none.
  if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
    return "k8s"
  return None


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
    num_processes: number of processes.
    process_id: index of this process.
    heartbeat_seconds: a process that is silent for so long counts as dead,
      which ends all others.

  Raises:
    ValueError: if the processes do not find each other, or have different
      numbers of devices.
  """
  method = None if coordinator_address else detect(os.environ)
  if coordinator_address is None and method is None:
    return
  if heartbeat_seconds < 5:
    raise ValueError(
      "config.parallel.heartbeat_seconds: expected 5 or more, got"
      f" {heartbeat_seconds}"
    )
  logging.getLogger("jax").setLevel(logging.WARNING)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # JAX would handle SIGTERM itself; the training loop does.
  jax.config.update("jax_enable_preemption_service", False)
  where = coordinator_address or f"what {method} says"
  hint = (
    "Name process 0 with --coordinator_address HOST:PORT --num_processes N"
    " --process_id I; to run one process, unset the launcher's variables"
  )
  try:
    with _told_late(
      f"the processes have not found each other by {where}. {hint}"
    ):
      jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        cluster_detection_method=method or "deactivate",
        heartbeat_timeout_seconds=heartbeat_seconds,
        initialization_timeout=FOUND + 30,
      )
  except Exception as error:  # networks raise all kinds
    raise ValueError(
      f"the processes have not found each other by {where}"
      f" ({type(error).__name__}: {error}). {hint}"
    ) from error
  counts = np.bincount([device.process_index for device in jax.devices()])
  if len(set(counts)) > 1:
    raise ValueError(
      "expected equally many devices in every process, got"
      f" {', '.join(map(str, counts))}. Choose them with CUDA_VISIBLE_DEVICES"
      " or the scheduler's flags"
    )


@contextlib.contextmanager
def _told_late(text: str) -> Iterator[None]:
  """Connects to the other processes without proxies, with words if it fails.

  JAX would end the process with a stack trace when its own time is over.

  Args:
    text: printed after `FOUND` seconds, when the process ends with code 2.
  """

  def end():
    print(f"launch.py: {text}", file=sys.stderr, flush=True)
    os._exit(2)

  def remind():
    print("waiting for the other processes ...", file=sys.stderr, flush=True)

  timers = [threading.Timer(FOUND, end), threading.Timer(10, remind)]
  names = [f"{kind}_proxy" for kind in ("http", "https", "grpc", "all")]
  names += [name.upper() for name in names]
  proxies = {n: os.environ.pop(n) for n in names if n in os.environ}
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
      timer.cancel()
    os.environ.update(proxies)


def all_gather_object(value: Any) -> list[Any]:
  """Gathers a JSON-able value of every process, in their order."""
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  sizes = collectives.gather_processes(np.int32(len(text)))
  # Few sizes, so that few programs are compiled.
  content = np.zeros(-(-sizes.max() // _BLOCK) * _BLOCK, np.uint8)
  content[: len(text)] = np.frombuffer(text, np.uint8)
  rows = collectives.gather_processes(content)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def broadcast(value: Any) -> Any:
  """Returns process 0's JSON-able value; the others' values are ignored."""
  return all_gather_object(value if is_first() else None)[0]


def on_all_processes(work: Callable[[], Result]) -> Result:
  """Does the same on every process; if one fails, all do.

  Args:
    work: uses no collectives, so that it may fail anywhere.

  Returns:
    This process's result.

  Raises:
    RefusedError: on all processes, if some raised a ValueError, ImportError or
      OSError; a single process raises its own error.
  """
  if jax.process_count() == 1:
    return work()
  problem, caught, result = "", None, None
  try:
    result = work()
  except (ValueError, ImportError, OSError) as error:
    problem, caught = f"{type(error).__name__}: {error}", error
  problems = all_gather_object(problem)
  first = next((i for i, text in enumerate(problems) if text), None)
  if first is not None:
    same = len(set(problems)) == 1
    which = "" if same else f"process {first} of {len(problems)}: "
    raise RefusedError(which + problems[first]) from caught
  return cast(Result, result)


def require_same(what: str, mine: str, remedy: str) -> None:
  """Checks that something is the same on all processes.

  Args:
    what: the setting that determines it, for the error.
    mine: this process's value, in a few words.
    remedy: what to do if they differ.

  Raises:
    RefusedError: on all processes, if some differ from process 0.
  """
  found = all_gather_object([mine, socket.gethostname()])
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
  """Checks that every process sees what process 0 writes to a folder.

  Args:
    folder: absolute path; if it does not exist, it is removed afterwards.

  Raises:
    RefusedError: on all processes, if some do not see it.
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

  name, made = broadcast(on_all_processes(make))
  # Another folder of the same name has no file of this name.
  token, deadline = folder / name, time.monotonic() + VISIBLE
  while not token.exists() and time.monotonic() < deadline:
    if token.parent.exists():
      os.listdir(token.parent)  # refreshes a network file system's cache
    time.sleep(0.1)
  hosts = all_gather_object("" if token.exists() else socket.gethostname())
  who = ", ".join(f"{i} ({host})" for i, host in enumerate(hosts) if host)
  if is_first():
    token.unlink()
    for path in made if who else ():
      pathlib.Path(path).rmdir()
  if who:
    raise RefusedError(
      f"--workdir {folder}: expected a folder that all {jax.process_count()}"
      f" processes share, got one where process {who} does not see what process"
      " 0 writes. Name one on a file system that all machines mount"
    )


@contextlib.contextmanager
def holding(try_lock: Callable[[], bool]) -> Iterator[None]:
  """Waits until process 0 holds a lock; the others wait with it.

  Args:
    try_lock: takes the lock if it is free, and returns whether it did; what it
      raises is raised on all processes.
  """
  while not broadcast(on_all_processes(lambda: is_first() and try_lock())):
    time.sleep(0.5)
  yield


def is_lost(error: BaseException | None) -> bool:
  """Whether an error shows that another process, or the network, has ended.

  XLA and Gloo raise errors of several classes, and Orbax wraps them.
  """
  if error is None or jax.process_count() == 1:
    return False
  text = str(error)
  lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in text
  # Out of memory is this process's own fault.
  own = text.startswith("RESOURCE_EXHAUSTED")
  return (lost and not own) or is_lost(error.__cause__)


def end(code: int) -> None:
  """Ends this process at once if it is one of several.

  JAX's orderly shutdown waits for the others, which may wait for this one.
  """
  if jax.distributed.is_initialized() and jax.process_count() > 1:
    # A full disk may hold the log too.
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(code)
