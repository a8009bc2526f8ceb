"""Checkpoints: Orbax, asynchronous, verified when they are read.

A step's folder holds `state` (arrays), `position` (of the data pipeline, JSON)
and `meta` (scores, seconds spent, and fingerprints of every array and of the
JSON). Orbax makes the folder appear whole or not at all; the fingerprints tell
when its bytes have changed since. A checkpoint that cannot be read, or differs
from its fingerprints, is set aside and the one before it is used.

All processes write a checkpoint together, through Orbax, but each reads it
whole by itself: a file that one process cannot read leaves no other waiting.
They then agree on the checkpoint to use.
"""

import dataclasses
import errno
import json
import logging
import pathlib
import shutil
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from kd_jax import storage
from kd_jax.distributed import devices, processes
from kd_jax.runs import fingerprint as fingerprint_lib

_log = logging.getLogger(__name__)

# Seconds that a save waits for processes that neither finish nor end.
TIMEOUT = 1200


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint that has been read.

  Attributes:
    step: number of optimiser updates before it.
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


class Checkpointer:
  """Saves one kind of checkpoint; all processes make the same calls."""

  def __init__(self, directory: pathlib.Path, *, keep: int = 1):
    """Open the folder, and remove what an interrupted save left there.

    Args:
      directory: absolute path; steps are folders below it.
      keep: number of newest checkpoints to keep.
    """
    self._directory, self._keep = directory, keep
    self._newest = max(steps(directory), default=None)
    if processes.is_first():
      directory.mkdir(parents=True, exist_ok=True)
      for path in directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
        shutil.rmtree(path)
    # Not CheckpointManager: where a save has failed, its thread waits for the
    # other processes until the timeout before it says so.
    self._checkpointer = ocp.AsyncCheckpointer(
      ocp.CompositeCheckpointHandler(),
      async_options=ocp.options.AsyncOptions(timeout_secs=TIMEOUT),
      # Two checkpointers may be saving at once.
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        barrier_sync_key_prefix=directory.name
      ),
    )

  def save(
    self,
    step: int,
    state: Any,
    *,
    position: dict[str, Any],
    meta: dict[str, Any],
  ) -> None:
    """Start saving; the caller may change all arguments once it returns.

    A step that exists already is left as it is: runs are deterministic, so
    its content is the same.

    Args:
      step: names the checkpoint.
      state: a pytree of arrays.
      position: JSON-able.
      meta: JSON-able.

    Raises:
      Exception: whatever made this or the last save fail. Checkpoints that
        were whole before are still whole.
    """
    self.wait()
    if step in processes.broadcast(steps(self._directory)):
      return
    arrays = _as_dicts(state)
    # Orbax writes JSON in a thread of its own, when the next steps may have
    # changed the caller's dicts.
    position, meta = json.loads(json.dumps([position, meta]))
    meta = {
      **meta,
      "checksum": _checksum(position, meta),
      "fingerprint": fingerprint_lib.fingerprint(arrays),
    }
    self._newest = step
    self._checkpointer.save(
      storage.orbax_path(self._directory / str(step)),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(arrays),
        position=ocp.args.JsonSave(position),
        meta=ocp.args.JsonSave(meta),
      ),
    )

  def wait(self) -> None:
    """Return when the last save is on disk; raises what made it fail."""
    self._checkpointer.wait_until_finished()
    if processes.is_first():
      newest = self._directory / str(self._newest)
      if self._newest is not None and not newest.is_dir():
        raise FileNotFoundError(
          errno.ENOENT, "what was saved there is gone", str(newest)
        )
      for step in steps(self._directory)[: -self._keep]:
        shutil.rmtree(self._directory / str(step))

  def close(self) -> None:
    """Wait, and release the folder."""
    self.wait()
    self._checkpointer.close()


def read_latest(directory: pathlib.Path) -> Restored | None:
  """Read the newest good checkpoint in this process alone; change nothing.

  Returns:
    Nested dicts of numpy arrays, or None if the folder has no checkpoint.

  Raises:
    ValueError: if there are checkpoints and none can be read.
  """
  found, bad = _newest_good(directory, None, agree=False)
  if bad and found is None:
    raise _none_readable(directory, bad)
  return found


def restore_latest(
  directory: pathlib.Path, like: Any, *, required: bool = True
) -> Restored | None:
  """Read the newest good checkpoint in every process; set bad ones aside.

  Args:
    directory: as for `Checkpointer`, which is opened afterwards.
    like: pytree of arrays with the expected structure, shapes and shardings;
      None takes what is there, as nested dicts of numpy arrays. The rows of
      zeros that pad a sharded array may differ in number.
    required: raise if there are checkpoints and none can be read; otherwise
      set all aside.

  Returns:
    What was read, or None if the folder has no checkpoint.

  Raises:
    ValueError: see `required`; nothing is changed then.
  """
  found, bad = _newest_good(directory, like, agree=True)
  if bad and found is None and required:
    raise _none_readable(directory, bad)
  if bad:
    aside = directory.with_name(directory.name + "_corrupt")
    if processes.is_first():
      aside.mkdir(exist_ok=True)
      for step in bad:
        shutil.rmtree(aside / str(step), ignore_errors=True)
        shutil.move(directory / str(step), aside / str(step))
    processes.broadcast(None)
    _log.warning("moved what cannot be used to %s", aside)
  return found


def _newest_good(
  directory: pathlib.Path, like: Any, *, agree: bool
) -> tuple[Restored | None, list[int]]:
  """The newest good checkpoint, and the steps of bad ones after it."""
  bad: list[int] = []
  found = steps(directory)
  for step in reversed(processes.broadcast(found) if agree else found):
    restored, problem = None, ""
    try:
      restored = _read(directory / str(step), like)
    except Exception as error:  # a damaged file may provoke anything
      problem = f"{type(error).__name__}: {_first_line(error)}"
    if agree:
      problem = next(filter(None, processes.all_gather_object(problem)), "")
    if not problem:
      return restored, bad
    _log.warning(
      "checkpoint of step %d in %s cannot be used (%s); trying the one before",
      step,
      directory,
      problem,
    )
    bad.append(step)
  return None, bad


def _none_readable(directory: pathlib.Path, bad: list[int]) -> ValueError:
  # They stay: an empty folder would mean a fresh start.
  return ValueError(
    f"none of the {len(bad)} checkpoints of {directory} can be read. Nothing"
    " was changed. Start again in another --workdir, or remove this one"
  )


def _read(folder: pathlib.Path, like: Any) -> Restored:
  meta, position = (
    json.loads((folder / name / "metadata").read_text(encoding="utf-8"))
    for name in ("meta", "position")
  )
  arrays = storage.restore_tree(folder / "state")
  expected = meta.pop("fingerprint")
  if meta.pop("checksum") != _checksum(position, meta):
    raise CorruptCheckpointError("its JSON differs from what was saved")
  got = fingerprint_lib.fingerprint(arrays)
  if got != expected:
    wrong = sum(a != b for a, b in zip(got, expected, strict=False))
    raise CorruptCheckpointError(
      f"{wrong} of {len(expected)} arrays differ from those saved"
    )
  state = arrays if like is None else _like(arrays, like)
  return Restored(int(folder.name), state, position, meta)


def _checksum(*content):
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _first_line(error: Exception) -> str:
  line = next(iter(str(error).splitlines()), "")
  # The cause of a nested error comes last.
  return line if len(line) < 300 else f"{line[:100]} ... {line[-180:]}"


def _paths(tree: Any) -> list[tuple[str, ...]]:
  return [
    tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _as_dicts(tree: Any) -> dict[str, Any]:
  """The tree as nested dicts: a library's own containers may change."""
  leaves = jax.tree.leaves(tree)
  return traverse_util.unflatten_dict(dict(zip(_paths(tree), leaves)))


def _like(nested: dict[str, Any], tree: Any) -> Any:
  """Turn nested dicts of arrays into a tree like the given one, placed."""
  arrays = traverse_util.flatten_dict(nested)
  paths = _paths(tree)
  if set(arrays) != set(paths):
    different = sorted("/".join(path) for path in set(arrays) ^ set(paths))
    raise ValueError(
      f"expected {len(paths)} arrays, got {len(arrays)}; only one side has"
      f" {', '.join(different[:3])}"
    )

  def place(path: tuple[str, ...], like: Any) -> Any:
    array = arrays[path]
    if like.ndim:
      array = _with_rows(array, like.shape)
    if (array.shape, array.dtype) != (like.shape, like.dtype):
      raise ValueError(
        f"{'/'.join(path)}: expected {like.shape} {like.dtype}, got"
        f" {array.shape} {array.dtype}"
      )
    sharding = getattr(like, "sharding", None)
    return array if sharding is None else devices.put_whole(array, sharding)

  placed = map(place, paths, jax.tree.leaves(tree))
  return jax.tree.unflatten(jax.tree.structure(tree), list(placed))


def _with_rows(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Add or remove the rows of zeros that `Devices.place` pads with."""
  if array.shape[1:] != shape[1:] or array[shape[0] :].any():
    return array
  missing = max(shape[0] - array.shape[0], 0)
  rows = np.zeros((missing, *shape[1:]), array.dtype)
  return np.concatenate([array[: shape[0]], rows])
