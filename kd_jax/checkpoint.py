"""Checkpoints: Orbax, asynchronous, verified when they are read.

A step's folder holds `state` (arrays), `position` (where the data pipeline
stood, JSON) and `meta` (best result so far, seconds spent, and fingerprints
of every array and of the JSON). Orbax makes the folder appear whole or not at
all; the fingerprints tell when its bytes have changed since. A checkpoint that
cannot be read, or differs from its fingerprint, is set aside and the one
before it is used.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

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


def fingerprint(tree: Any) -> list[int]:
  """The CRC-32 of each array's bytes.

  It is computed on the host, because compiling it for every tree of arrays
  would take longer than all the checkpoints of a short run.

  Args:
    tree: arrays.

  Returns:
    One number per leaf, in the order of `jax.tree.leaves`. It does not depend
    on the devices or on how they share the array.
  """
  leaves = jax.device_get([_as_bits(x) for x in jax.tree.leaves(tree)])
  return [
    zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    for x in leaves
  ]


def _as_bits(x):
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(x)
  return x


def _checksum(*content):
  return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class Checkpointer:
  """Saves and restores one kind of checkpoint below one folder."""

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
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        create=not self._read_only,
        read_only=self._read_only,
        cleanup_tmp_directories=not self._read_only,
        enable_async_checkpointing=True,
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
    """Starts saving; the arrays may be overwritten as soon as it returns.

    A step that is already there is left as it is: runs are deterministic, so
    its content is the same.

    Args:
      step: names the checkpoint.
      state: a pytree of arrays.
      position: JSON-able.
      meta: JSON-able.
    """
    if step in self._manager.all_steps():
      return
    arrays = _as_dicts(state)
    meta = {
      **meta,
      "checksum": _checksum(position, meta),
      "fingerprint": fingerprint(arrays),
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(arrays),
        position=ocp.args.JsonSave(position),
        meta=ocp.args.JsonSave(meta),
      ),
      force=True,
    )

  def restore_latest(self, like: Any) -> Restored | None:
    """Reads the newest good checkpoint.

    Args:
      like: a pytree of arrays or `jax.ShapeDtypeStruct`s (with shardings)
        that says what to expect and where to put it; None takes what is
        there, as nested dicts.

    Returns:
      What was read, or None if the folder has no checkpoint.

    Raises:
      ValueError: if there are checkpoints and none can be read.
    """
    bad: list[int] = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        restored = self._restore(step, like)
      except Exception as error:  # whatever a damaged file provokes
        _log.warning(
          "checkpoint of step %d in %s cannot be used (%s: %s); the one before"
          " it is tried",
          step,
          self._directory,
          type(error).__name__,
          next(iter(str(error).splitlines()), ""),
        )
        bad.append(step)
      else:
        if bad and not self._read_only:
          self._set_aside(bad)
        return restored
    if bad:  # left where they are: an empty folder would mean a fresh start
      raise ValueError(
        f"none of the {len(bad)} checkpoints of {self._directory} can be read."
        " Nothing was changed. Start again in another --workdir, or remove"
        " this one"
      )
    return None

  def _restore(self, step: int, like: Any) -> Restored:
    items = {
      "position": ocp.args.JsonRestore(),
      "meta": ocp.args.JsonRestore(),
    }
    if like is not None:
      abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
      items["state"] = ocp.args.StandardRestore(_as_dicts(abstract))
    read = self._manager.restore(step, args=ocp.args.Composite(**items))
    if like is None:  # on the host: the devices it came from may be gone
      arrays = restore_tree(self._directory / str(step) / "state")
    else:
      arrays = read["state"]
    meta, position = dict(read["meta"]), dict(read["position"])
    expected = meta.pop("fingerprint")
    if meta.pop("checksum") != _checksum(position, meta):
      raise CorruptCheckpointError("its JSON differs from what was saved")
    got = fingerprint(arrays)
    if got != expected:
      wrong = sum(a != b for a, b in zip(got, expected, strict=False))
      raise CorruptCheckpointError(
        f"{wrong} of {len(expected)} arrays differ from those saved"
      )
    state = arrays if like is None else _like(arrays, like)
    return Restored(step, state, position, meta)

  def _set_aside(self, steps: list[int]) -> None:
    aside = self._directory.with_name(self._directory.name + "_corrupt")
    aside.mkdir(exist_ok=True)
    self._manager.close()
    for step in steps:
      target = aside / str(step)
      if target.exists():
        shutil.rmtree(target)
      shutil.move(self._directory / str(step), target)
    self._manager = self._open()
    _log.warning("moved what cannot be used to %s", aside)

  def wait(self) -> None:
    """Returns when what was started is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and releases the folder."""
    self._manager.wait_until_finished()
    self._manager.close()


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

  def follow(path):
    place = nested
    for key in path:
      place = place[key]
    return place

  leaves = [follow(path) for path in _paths(tree)]
  return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def save_tree(directory: pathlib.Path, tree: Any) -> None:
  """Writes a nested dict of arrays as a plain Orbax checkpoint."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory.resolve(), tree)


def restore_tree(directory: pathlib.Path) -> Any:
  """Reads what `save_tree` wrote, as numpy arrays.

  Raises:
    ValueError: if it cannot be read.
  """
  directory = directory.resolve()
  try:
    with ocp.PyTreeCheckpointer() as checkpointer:
      metadata = checkpointer.metadata(directory).item_metadata
      arguments = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
      )
      return checkpointer.restore(directory, restore_args=arguments)
  except Exception as error:
    raise ValueError(
      f"{directory}: expected an Orbax checkpoint, got one that cannot be"
      f" read ({type(error).__name__}: {error}). It may have been cut short"
      " while it was written or copied: export or copy it again"
    ) from error


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new, never half."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
  temporary.replace(path)
