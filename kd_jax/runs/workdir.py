"""The workdir: what it holds, and which run it belongs to.

`config.json` (with all defaults), `environment.json` (versions, devices,
commit, command), `data.json` (which images), `checkpoints/` (to resume from),
`best/` (highest top-1), `export/`, `metrics.jsonl`, `tensorboard/`,
`teacher.json` (the teachers' own accuracy), `initial.json` (fingerprint of the
initial weights, if they were given), `skipped_images.json` (images that could
not be decoded), a folder for each earlier stage, itself a workdir, and, at the
end, `result.json`. Accuracies are percentages, cross-entropies nats, times
seconds.
"""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import filelock
import jax
from ml_collections import ConfigDict

from kd_jax import data, storage
from kd_jax.distributed import processes
from kd_jax.runs import checkpoint, records
from kd_jax.runs import identity as identity_lib


def finished(
  workdir: pathlib.Path, config: ConfigDict
) -> dict[str, Any] | None:
  """Return the result of a finished run; write nothing.

  Args:
    workdir: absolute path, which may not exist yet.
    config: with all defaults resolved.

  Returns:
    The result if this run is finished there, else None.

  Raises:
    ValueError: if it holds a run of another config.
  """
  found = records.read_config(workdir)
  if found is None:
    return None
  theirs, ours = (
    identity_lib.config_fingerprint(found),
    identity_lib.config_fingerprint(config),
  )
  different = sorted(
    name
    for name in theirs.keys() | ours.keys()
    if theirs.get(name) != ours.get(name)
  )
  if different:
    lines = [
      f"  {name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
      for name in different
    ]
    raise ValueError(
      f"{workdir} holds a run of another config:\n"
      + "\n".join(lines)
      + "\nNothing was changed. A run keeps its config, and is not made longer:"
      " give another --workdir, or remove that one"
    )
  return result(workdir)


def create(workdir: pathlib.Path, config: ConfigDict) -> None:
  """Make the workdir with `config.json`, unless it exists.

  Only the first process does.
  """
  if not processes.is_first():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  if not (workdir / "config.json").exists():
    storage.write_json(workdir / "environment.json", environment())
    storage.write_json(workdir / "config.json", identity_lib.as_json(config))


class _Data(TypedDict):
  train: data.Summary
  test: data.Summary


def require_same_data(
  workdir: pathlib.Path,
  sources: Mapping[str, data.Source | data.EncodedSource],
) -> None:
  """Write `data.json`, or compare the data with it if there are checkpoints.

  Only the first process does; `processes.require_same` compares the others.

  Args:
    workdir: absolute path, which exists.
    sources: the sets by split.

  Raises:
    ValueError: if the run began with other data.
  """
  if not processes.is_first():
    return
  path = workdir / "data.json"
  before = storage.read_json(path, _Data)
  if before is None or not checkpoint.steps(workdir / "checkpoints"):
    found = {split: data.summarize(each) for split, each in sources.items()}
    storage.write_json(path, found)
  elif different := data.differences(before, sources):
    raise ValueError(
      f"{workdir} holds a run of other data: {'; '.join(different)}. Nothing"
      " was changed. Bring the data back, or give another --workdir, or remove"
      f" {path} to go on with the data as they are"
    )


@contextlib.contextmanager
def locked(folder: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
  """Hold FOLDER/.lock, so that one run at a time writes to a folder.

  Only the first process takes the lock, for all processes of its run, which
  may take it again while they hold it. The kernel releases it when the process
  ends, however it ends. A network file system must support `flock` (NFS 4,
  Lustre mounted with `flock`). On others filelock warns and leaves the file as
  the lock; after a crash on another machine, remove it.

  Args:
    folder: made if it does not exist.
    wait: for the run that holds the lock, instead of raising.

  Raises:
    RefusedError: in all processes, if another run holds the lock.
  """
  path = folder / ".lock"
  lock = filelock.FileLock(path, is_singleton=True)

  def try_lock() -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    try:
      lock.acquire(blocking=False)
    except filelock.Timeout:
      if wait:
        return False
      holder = path.read_text(encoding="utf-8", errors="replace")[:200]
      raise ValueError(
        f"{folder} is in use by another run"
        f" ({holder.strip() or 'of an unknown process'}). Wait for it, stop it,"
        " or give another --workdir"
      ) from None
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    return True

  with processes.holding(try_lock):
    try:
      yield
    finally:
      lock.release()


def result(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The content of `result.json`, None for an unfinished run."""
  return records.read_result(workdir)


def hardware() -> str:
  """Describe the devices of this run."""
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == "cpu":
    kind = f"CPU {platform.machine()}, {_cores()} cores"
  return f"{len(devices)} x {kind}"


def _cores() -> int:
  return len(os.sched_getaffinity(0))


def environment() -> dict[str, Any]:
  """Versions, devices, commit and command line."""
  versions = {}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = "not installed"
  return {
    "command": sys.argv,
    "python": platform.python_version(),
    "versions": versions,
    "hardware": hardware(),
    "processes": jax.process_count(),
    "git_commit": git_commit(),
  }


def git_commit() -> str:
  """The commit of the code that runs, marked if files differ from it."""
  folder = pathlib.Path(__file__).resolve().parent
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=40"],
      cwd=folder,
      capture_output=True,
      text=True,
      check=True,
      timeout=10,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"
