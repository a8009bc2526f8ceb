"""Checkpoints: Orbax, asynchronous, verified when they are read.

A step's folder holds `state` (arrays), `position` (where the data pipeline
stood, JSON) and `meta` (best result so far, seconds spent, and fingerprints
of every array and of the JSON). Orbax makes the folder appear whole or not at
all; the fingerprints tell when its bytes have changed since. A checkpoint that
cannot be read, or differs from its fingerprint, is set aside and the one
before it is used.

In many processes all write a checkpoint together, through Orbax, and each
reads it whole by itself, so that a file that one of them cannot read does not
leave the others waiting. What each has found is then put together: they save,
give up or go back to the same checkpoint.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from kd_jax import storage
from kd_jax.distributed import barrier, devices, processes

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that has been read.

  Attributes:
    step: the optimiser updates made before it.
    state: the arrays.
    position: of the data pipeline.
    meta: whatever was saved beside them.
  """

  step: int
  state: Any
  position: dict[str, Any]
  meta: dict[str, Any]


class CorruptCheckpointError(ValueError):
  """The arrays read are not those that were saved."""


def steps(directory: pathlib.Path) -> list[int]:
  """The steps of whole checkpoints below a folder, which may not exist."""
  if not directory.exists():
    return []
  names = [path.name for path in directory.iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


def _checksum(*content):
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class UnsavedError(RuntimeError):
  """A run has come to its end, and its last checkpoint cannot be written."""


class Checkpointer:
  """Saves and restores one kind of checkpoint below one folder.

  Unless it is `read_only`, all processes have to make the same calls.

  Attributes:
    newest: step of the newest checkpoint, of which `wait` may find that it
      could not be written; None if there is none.
  """

  def __init__(
    self, directory: pathlib.Path, *, keep: int = 1, read_only: bool = False
  ):
    """Opens the folder, made if there is none.

    Args:
      directory: absolute path; steps are folders below it.
      keep: how many of the newest are kept.
      read_only: change nothing, for another process may be writing here.
    """
    self._directory = directory
    self._keep = keep
    self._read_only = read_only
    self._barrier = barrier.Barrier(str(directory))
    self._manager = None if read_only else self._open()
    self.newest = max(self._steps(), default=None)

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        create=True,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        async_options=ocp.options.AsyncOptions(
          barrier_sync_fn=self._barrier.wait,
          # So that a full disk is found by the first process, or by threads
          # that `Barrier` brings to an end.
          create_directories_asynchronously=False,
        ),
      ),
    )

  def _steps(self) -> list[int]:
    """Steps of whole checkpoints, as the first process sees them."""
    found = steps(self._directory)
    return found if self._read_only else processes.broadcast(found)

  def save(
    self,
    step: int,
    state: Any,
    *,
    position: dict[str, Any],
    meta: dict[str, Any],
  ) -> bool:
    """Starts saving; the arrays may be overwritten as soon as it returns.

    A step that is already there is left as it is: runs are deterministic, so
    its content is the same.

    Args:
      step: names the checkpoint.
      state: a pytree of arrays.
      position: JSON-able.
      meta: JSON-able.

    Returns:
      Whether it was started. If not, or if `wait` finds that it has failed,
      a warning says why, and the checkpoints that are there stay.
    """
    assert self._manager is not None
    self.wait()
    if step in self._steps():
      return True
    arrays = _as_dicts(state)
    size = sum(x.nbytes for x in jax.tree.leaves(arrays))
    problem = processes.broadcast(self._no_room(size))
    if problem:
      self._failed(step, problem)
      return False
    meta = {
      **meta,
      "checksum": _checksum(position, meta),
      "fingerprint": storage.fingerprint(arrays),
    }
    self._barrier.begin()
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(arrays),
        position=ocp.args.JsonSave(position),
        meta=ocp.args.JsonSave(meta),
      ),
      force=True,
    )
    self.newest = step
    self._saving = step
    return True

  _saving: int | None = None

  def _no_room(self, size: int) -> str:
    """Why `size` bytes cannot be written, or "". The first process asks."""
    if not processes.is_first():
      return ""
    probe = self._directory / ".probe"
    try:
      probe.write_bytes(bytes(4096))
      probe.unlink()
      free = shutil.disk_usage(self._directory).free
    except OSError as error:
      probe.unlink(missing_ok=True)
      return f"{type(error).__name__}: {error}"
    if free < size:
      return f"{size:,} bytes are needed and {free:,} are free"
    return ""

  def _failed(self, step: int, problem: str) -> None:
    assert self._manager is not None
    self._manager.reload()
    self.newest = max(self._steps(), default=None)
    if processes.is_first():
      for path in self._directory.glob(f"{step}.*"):
        shutil.rmtree(path, ignore_errors=True)
      kept = "There is none before it"
      if self.newest is not None:
        kept = f"The one of step {self.newest} is kept"
      _log.warning(
        "the checkpoint of step %d could not be written to %s (%s). %s;"
        " training goes on, and the next is tried when it is due",
        step,
        self._directory,
        problem,
        kept,
      )

  def wait(self) -> bool:
    """Returns when what was started is on disk, or has failed: whether it is.

    A failure, of any process, is told in a warning.
    """
    if self._saving is None:
      return True
    assert self._manager is not None
    step, self._saving, problem = self._saving, None, ""
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # whatever a disk provokes
      problem = f"{type(error).__name__}: {_first_line(error)}"
    problems = [text for text in processes.gather_texts(problem) if text]
    if problems:
      causes = [p for p in problems if barrier.FOLLOWED not in p]
      self._failed(step, (causes or problems)[0])
    return not problems

  def restore_latest(
    self, like: Any, *, up_to: int | None = None, or_none: bool = False
  ) -> Restored | None:
    """Reads the newest good checkpoint.

    Args:
      like: a pytree of arrays (or `jax.ShapeDtypeStruct`s) that says what to
        expect and, by their shardings, where to put it;
        None takes what is there, as nested dicts of numpy arrays. An array may
        have rows of zeros that were added for other devices.
      up_to: those of later steps are removed: these are about to be made again.
      or_none: if none can be read, all are set aside.

    Returns:
      What was read, or None if the folder has no checkpoint.

    Raises:
      ValueError: if there are checkpoints and none can be read, without
        `or_none`.
    """
    bad: list[int] = []
    if up_to is not None:
      self._take_out([step for step in self._steps() if step > up_to])
    for step in reversed(self._steps()):
      restored, problem = None, ""
      try:
        restored = self._restore(step, like)
      except Exception as error:  # whatever a damaged file provokes
        problem = f"{type(error).__name__}: {_first_line(error)}"
      if not self._read_only:
        found = [text for text in processes.gather_texts(problem) if text]
        problem = found[0] if found else ""
      if problem:
        _log.warning(
          "checkpoint of step %d in %s cannot be used (%s); the one before"
          " it is tried",
          step,
          self._directory,
          problem,
        )
        bad.append(step)
      else:
        if bad and not self._read_only:
          self._set_aside(bad)
        return restored
    if bad and or_none:
      self._set_aside(bad)
    elif bad:  # left where they are: an empty folder would mean a fresh start
      raise ValueError(
        f"none of the {len(bad)} checkpoints of {self._directory} can be read."
        " Nothing was changed. Start again in another --workdir, or remove"
        " this one"
      )
    return None

  def _restore(self, step: int, like: Any) -> Restored:
    folder = self._directory / str(step)
    meta, position = (
      json.loads((folder / name / "metadata").read_text(encoding="utf-8"))
      for name in ("meta", "position")
    )
    arrays = storage.restore_tree(folder / "state")
    expected = meta.pop("fingerprint")
    if meta.pop("checksum") != _checksum(position, meta):
      raise CorruptCheckpointError("its JSON differs from what was saved")
    got = storage.fingerprint(arrays)
    if got != expected:
      wrong = sum(a != b for a, b in zip(got, expected, strict=False))
      raise CorruptCheckpointError(
        f"{wrong} of {len(expected)} arrays differ from those saved"
      )
    state = arrays if like is None else _like(arrays, like)
    return Restored(step, state, position, meta)

  def _set_aside(self, steps: list[int]) -> None:
    aside = self._directory.with_name(self._directory.name + "_corrupt")
    self._take_out(steps, aside)
    _log.warning("moved what cannot be used to %s", aside)

  def _take_out(
    self, steps: list[int], aside: pathlib.Path | None = None
  ) -> None:
    """Moves steps to another folder, or removes them."""
    assert self._manager is not None
    self._manager.close()
    if processes.is_first():
      for step in steps:
        if aside is not None:
          aside.mkdir(exist_ok=True)
          shutil.rmtree(aside / str(step), ignore_errors=True)
          shutil.move(self._directory / str(step), aside / str(step))
        else:
          shutil.rmtree(self._directory / str(step))
    self._barrier.begin()
    self._manager = self._open()
    self.newest = max(self._steps(), default=None)

  def close(self) -> None:
    """Waits, and releases the folder."""
    self.wait()
    if self._manager is not None:
      self._manager.close()


def _first_line(error: Exception) -> str:
  line = next(iter(str(error).splitlines()), "")
  # The cause of a nested error comes last.
  return line if len(line) < 300 else f"{line[:100]} ... {line[-180:]}"


def _paths(tree: Any) -> list[list[str]]:
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return [
    [jax.tree_util.keystr((key,), simple=True) for key in path]
    for path in paths
  ]


def _as_dicts(tree: Any) -> dict[str, Any]:
  """The tree as nested dicts: a library's own containers may change."""
  nested: dict[str, Any] = {}
  for path, leaf in zip(_paths(tree), jax.tree.leaves(tree), strict=True):
    place = nested
    for key in path[:-1]:
      place = place.setdefault(key, {})
    place[path[-1]] = leaf
  return nested


def _like(nested: dict[str, Any], tree: Any) -> Any:
  """What `_as_dicts` made of something like `tree`, in its own containers."""
  paths = _paths(tree)
  if len(paths) != len(jax.tree.leaves(nested)):
    raise ValueError(
      f"expected {len(paths)} arrays, got {len(jax.tree.leaves(nested))}"
    )

  def follow(path, like):
    place: Any = nested
    for key in path:
      place = place[key]
    array = _with_rows(place, like.shape) if like.ndim else place
    if (array.shape, array.dtype) != (like.shape, like.dtype):
      raise ValueError(
        f"{'/'.join(path)}: expected {like.shape} {like.dtype}, got"
        f" {array.shape} {array.dtype}"
      )
    sharding = getattr(like, "sharding", None)
    return array if sharding is None else devices.put_whole(array, sharding)

  leaves = jax.tree.leaves(tree)
  leaves = [follow(*each) for each in zip(paths, leaves, strict=True)]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _with_rows(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Adds, or takes away, rows of zeros: see `parallel.Devices.place`."""
  if array.shape[1:] != shape[1:] or array[shape[0] :].any():
    return array
  missing = max(shape[0] - array.shape[0], 0)
  rows = np.zeros((missing, *shape[1:]), array.dtype)
  return np.concatenate([array[: shape[0]], rows])
