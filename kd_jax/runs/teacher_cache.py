"""A teacher's logits on disk, so that later runs need not compute them.

    DIR/seed_S/card.json                  what they were computed from
    DIR/seed_S/epoch_00001/part_0_of_1.npz   arrays [steps, images, ...]

The augmentation of a step depends on the seed and the number of the step alone.
So a run with the same teacher, data, seed and batch size sees the same images,
and takes their logits from here. An epoch that is missing is computed when a
run reaches it, and written whole. There is a part for each process.
"""

import logging
import pathlib
import re
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_jax import data, distillers, storage
from kd_jax.data.batch import local_batch_size
from kd_jax.distributed import processes
from kd_jax.runs import components, logs
from kd_jax.runs import workdir as workdir_lib
from kd_jax.training import cached_logits
from kd_jax.training import step as step_lib

_log = logging.getLogger(__name__)

DTYPES = ("float16", "float32")


def check(config: ConfigDict, distiller: distillers.Distiller) -> None:
  """Check that a run can use a cache, if it asks for one.

  Args:
    config: with all defaults resolved.
    distiller: of the run.

  Raises:
    ValueError: if not, and why.
  """
  teacher = config.teacher
  if not teacher.cache:
    for field in ("cache_top_k", "cache_dtype"):
      if teacher[field]:
        raise ValueError(
          f"config.teacher.{field}: expected config.teacher.cache with it, a"
          f" folder, got none. Name one, or leave {field} out"
        )
    return
  where = "config.teacher.cache"
  if not distiller.needs_logits_only:
    able = [
      name
      for name in distillers.names()
      if distillers.create(name).needs_logits_only
    ]
    raise ValueError(
      f"{where}: expected a method that reads the teacher's logits alone"
      f" ({', '.join(able)}), got {config.distiller.name!r}. Leave the cache"
      " out, or name one of them"
    )
  if config.teachers or not teacher.name:
    raise ValueError(
      f"{where}: expected one teacher, got"
      f" {len(config.teachers) or 'none'}. Leave the cache out"
    )
  if config.data.mixup or config.data.cutmix:
    raise ValueError(
      f"{where}: expected images that are not mixed, got config.data.mixup"
      f" {config.data.mixup:g} and cutmix {config.data.cutmix:g}. Set both to"
      " 0, or leave the cache out"
    )
  if config.data.pipeline == "dali":
    raise ValueError(
      f"{where}: expected a pipeline whose crops can be repeated ('device',"
      " 'grain'), got 'dali'. Choose one of them, or leave the cache out"
    )
  if teacher.cache_dtype not in (None, *DTYPES):
    raise ValueError(
      f"config.teacher.cache_dtype: expected one of {', '.join(DTYPES)}, got"
      f" {teacher.cache_dtype!r}"
    )


class TeacherCache:
  """The cache of a run; every process has one."""

  def __init__(
    self,
    config: ConfigDict,
    parts: components.Components,
    fingerprint: int,
  ):
    """Open the cache, or begin it.

    Args:
      config: with all defaults resolved, and a `teacher.cache`.
      parts: of the run.
      fingerprint: of the teacher's weights.

    Raises:
      ValueError: if the cache is of something else; with the field.
    """
    self._parts, self._config = parts, config
    seed = int(parts.seeds[1])
    folder = storage.local_path(config.teacher.cache, "config.teacher.cache")
    self._folder = folder / f"seed_{seed}"
    self._settings = {
      "top_k": config.teacher.cache_top_k,
      "dtype": jnp.dtype(config.teacher.cache_dtype),
    }
    self._compress = jax.jit(
      lambda x: cached_logits.compress(x, **self._settings)
    )
    card = self._card(config, fingerprint)
    processes.on_all_processes(lambda: self._open(card))
    # Of the last epoch that was read.
    self._epoch, self._rows = -1, dict[str, np.ndarray]()

  def _card(self, config: ConfigDict, fingerprint: int) -> dict[str, Any]:
    parts = self._parts
    source = parts.train_source
    return {
      "teacher": config.teacher.name,
      "weights": fingerprint,
      "data": data.digest(source),
      "image_shape": list(source.image_shape),
      "mean": [float(x) for x in source.mean],
      "std": [float(x) for x in source.std],
      "batch_size": config.batch_size,
      "dtype": config.dtype,
      **{
        f"data.{name}": config.data[name]
        for name in ("pipeline", "crop_padding", "flip")
      },
      "data.crop_area": list(config.data.crop_area),
      "data.crop_aspect": list(config.data.crop_aspect),
      "teacher.cache_dtype": config.teacher.cache_dtype,
      "teacher.cache_top_k": config.teacher.cache_top_k,
    }

  def _open(self, card: dict[str, Any]) -> None:
    path = self._folder / "card.json"
    before = storage.read_json(
      path, dict[str, Any], remedy="Name another config.teacher.cache"
    )
    if before is None:
      if processes.is_first():
        self._folder.mkdir(parents=True, exist_ok=True)
        storage.write_json(path, card)
      return
    for field, mine in card.items():
      if before.get(field) != mine:
        raise ValueError(
          f"config.teacher.cache: {self._folder} was computed with {field}"
          f" {before.get(field)!r}, and this run has {mine!r}. Name another"
          f" folder, or set {field} to the cache's value"
        )

  def chunk(
    self, step: int, k: int, constants: step_lib.Constants, resident: Any
  ) -> dict[str, np.ndarray]:
    """What `cached_logits.compress` kept of this process's next images.

    Args:
      step: number of the first step.
      k: steps, all of one epoch.
      constants: of the run, placed.
      resident: the pipeline's data, placed.

    Returns:
      Leaves [k, B, ...].

    Raises:
      ValueError: if a file of the cache cannot be used.
      OSError: if an epoch cannot be read or written.
    """
    epoch, start = divmod(step, self._parts.pipeline.steps_per_epoch)
    if epoch != self._epoch:
      self._rows = self._read(epoch, constants, resident)
      self._epoch = epoch
    return {name: x[start : start + k] for name, x in self._rows.items()}

  def _read(
    self, epoch: int, constants: step_lib.Constants, resident: Any
  ) -> dict[str, np.ndarray]:
    """This process's rows of an epoch, computed if they are not there."""
    folder = self._folder / f"epoch_{epoch + 1:05d}"

    def complete() -> bool:
      return processes.broadcast(bool(_complete_parts(folder)))

    if not complete():
      with workdir_lib.locked(folder, wait=True):
        if not complete():
          arrays = self._compute(epoch, constants, resident)
          processes.on_all_processes(lambda: _write(folder, arrays))
    rows: dict[str, np.ndarray] = processes.on_all_processes(
      lambda: self._mine(folder)
    )
    return rows

  def _mine(self, folder: pathlib.Path) -> dict[str, np.ndarray]:
    paths = _complete_parts(folder)
    mine, count = jax.process_index(), jax.process_count()
    if len(paths) == count:
      return self._load(paths[mine])
    parts = [self._load(path) for path in paths]
    size = local_batch_size(self._config.batch_size, mine, count)
    place = slice(mine * size, (mine + 1) * size)
    return {
      name: np.concatenate([part[name] for part in parts], 1)[:, place]
      for name in parts[0]
    }

  def _load(self, path: pathlib.Path) -> dict[str, np.ndarray]:
    steps = self._parts.pipeline.steps_per_epoch
    try:
      with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(
        f"config.teacher.cache: {path} is damaged or cut short ({error})."
        " Remove it, and the run computes it anew"
      ) from error
    if {len(x) for x in arrays.values()} != {steps}:
      raise ValueError(
        f"config.teacher.cache: {path}: expected {steps} steps, got arrays of"
        f" {sorted(len(x) for x in arrays.values())}. Remove it, and the run"
        " computes it anew"
      )
    return arrays

  def _compute(
    self, epoch: int, constants: step_lib.Constants, resident: Any
  ) -> dict[str, np.ndarray]:
    """Run the teacher on this process's images of an epoch."""
    parts = self._parts
    steps = parts.pipeline.steps_per_epoch
    shape = (self._config.batch_size, *parts.train_source.image_shape)
    at_once = step_lib.precomputed_steps(steps, shape)
    logs.say(f"caching the teacher's logits of epoch {epoch + 1}")
    pipeline, kept = parts.pipeline, []
    state = pipeline.get_state()
    try:
      pipeline.set_state({**state, "step": epoch * steps})
      for first in range(epoch * steps, (epoch + 1) * steps, at_once):
        xs = parts.devices.shard(pipeline.next_chunk(at_once))
        logits = parts.programs.teacher_chunk(
          jnp.int32(first), constants, resident, xs
        )
        kept.append(jax.tree.map(_local, self._compress(logits)))
    finally:
      pipeline.set_state(state)
    return {
      name: np.concatenate([each[name] for each in kept]) for name in kept[0]
    }


def _write(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Write this process's part of an epoch."""
  for name, array in arrays.items():
    if not np.isfinite(array).all():
      raise ValueError(
        f"config.teacher.cache: expected finite {name} of the teacher, got some"
        f" that are not, as {array.dtype}. Set config.teacher.cache_dtype to"
        " 'float32', or look at the teacher"
      )
  index, count = jax.process_index(), jax.process_count()
  with (
    storage.drafted(folder / f"part_{index}_of_{count}.npz") as path,
    path.open("wb") as file,
  ):
    np.savez(file, allow_pickle=False, **arrays)


def _complete_parts(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of an epoch in order, [] if one is missing."""
  found: dict[int, dict[int, pathlib.Path]] = {}
  for path in folder.glob("part_*_of_*.npz"):
    if match := re.fullmatch(r"part_(\d+)_of_(\d+)\.npz", path.name):
      found.setdefault(int(match[2]), {})[int(match[1])] = path
  # Parts of another number of processes may lie beside them, cut short.
  for count, parts in sorted(found.items()):
    if sorted(parts) == list(range(count)):
      return [parts[i] for i in range(count)]
  return []


def _local(x: jax.Array) -> np.ndarray:
  """This process's part of an array that is split along its second axis."""
  shards = sorted(x.addressable_shards, key=lambda s: s.index[1].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards], axis=1)
