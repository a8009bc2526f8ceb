"""Processes: how many take part, what they agree on, and how they end.

A run may be spread over many processes, on one machine or on many. Which, is
decided here: by SLURM's, Open MPI's or Kubernetes' environment, which JAX reads
itself, by flags, or by `start_local`, which starts several on this machine.
After `initialize`, everything that one process alone knows (its clock, its
signals, what it sees of the disk) goes through the functions below before a
decision is based on it: processes that decide differently wait for each other
forever. All of them do nothing in a single process.
"""

import contextlib
import json
import logging
import os
import pathlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np

from kd_jax.distributed import collectives

Result = TypeVar("Result")


# Longest text that `together` passes on, in bytes.
_TEXT = 4096


# Seconds until a network file system must have shown a new file.
_VISIBLE = 20.0


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


def all_gather_object(value: Any) -> list[Any]:
  """Every process's value, JSON-able, in their order."""
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  sizes = collectives.gather_processes(np.int32(len(text)))
  content = np.zeros(sizes.max(), np.uint8)
  content[: len(text)] = np.frombuffer(text, np.uint8)
  rows = collectives.gather_processes(content)
  return [
    json.loads(row[:size].tobytes())
    for row, size in zip(rows, sizes, strict=True)
  ]


def broadcast(value: Any) -> Any:
  """The first process's value, JSON-able; what others give is ignored."""
  return all_gather_object(value if is_first() else None)[0]


def gather_texts(text: str) -> list[str]:
  """Every process's text, cut at 4096 bytes."""
  content = np.zeros(_TEXT, np.uint8)
  encoded = text.encode()[:_TEXT]
  content[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  return [
    row.tobytes().rstrip(b"\0").decode(errors="ignore")
    for row in collectives.gather_processes(content)
  ]


def on_all_processes(work: Callable[[], Result]) -> Result:
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

  name, made = broadcast(on_all_processes(make))
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
  while not broadcast(is_first() and try_lock()):
    time.sleep(0.5)
  yield


def end(code: int) -> None:
  """Ends this process at once if others take part, without waiting for them.

  They may be waiting for this one; JAX's orderly shutdown would wait for them.
  """
  if jax.distributed.is_initialized() and jax.process_count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
