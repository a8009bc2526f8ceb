"""A run, from its config to its result.

    resolve the config -> build the parts -> obtain the teachers -> run the
    earlier stages -> initialise or restore the state -> loop -> export

A run resumes from the newest checkpoint of its workdir. The teachers are in no
checkpoint.
"""

import copy
import functools
import json
import logging
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_jax import data, storage
from kd_jax.distillers import base
from kd_jax.distributed import processes
from kd_jax.runs import (
  checkpoint,
  components,
  identity,
  limits,
  logs,
  teacher_cache,
)
from kd_jax.runs import config as config_lib
from kd_jax.runs import initial as initial_lib
from kd_jax.runs import journal as journal_lib
from kd_jax.runs import loop as loop_lib
from kd_jax.runs import teachers as teachers_lib
from kd_jax.runs import workdir as workdir_lib

_log = logging.getLogger(__name__)


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
  """Train a config, resuming if a checkpoint exists.

  Args:
    config: made by a file of `configs/`.
    workdir: folder of the run; see `kd_jax.runs.workdir` for what it holds.

  Returns:
    The content of `result.json`.

  Raises:
    ValueError: for a config that cannot run or a workdir in use, before
      anything is written.
    NonFiniteLossError: when the loss leaves the finite numbers.
    PreemptedError: after a signal, when a checkpoint has been written.
    UnsavedError: when something could not be saved.
  """
  # Flax and optax promote ranks, which the user's environment may forbid.
  with jax.numpy_rank_promotion("allow"):
    return _train_or_skip(config, workdir)


def _train_or_skip(config: ConfigDict, workdir: str) -> dict[str, Any]:
  """Train a run, unless it is finished."""
  path = storage.local_path(workdir, "--workdir")
  prepared = processes.on_all_processes(lambda: prepare(config, path))
  processes.require_shared(path)
  config, parts = prepared.config, prepared.parts
  result: dict[str, Any] | None = processes.broadcast(prepared.result)
  if result is None:
    assert parts is not None
    try:
      _require_same(config, parts)
      with workdir_lib.locked(path):
        # Another run may have been here since.
        result = processes.broadcast(workdir_lib.finished(path, config))
        if result is None:
          return _train(prepared, parts, path)
    finally:
      parts.pipeline.close()
  _log.info("%s is finished: nothing to do", path)
  return result


def _train(
  prepared: "Prepared", parts: components.Components, path: pathlib.Path
) -> dict[str, Any]:
  """Train in a workdir that no other run uses."""
  config, initial = prepared.config, prepared.initial
  workdir_lib.create(path, config)
  sources = {"train": parts.train_source, "test": parts.test_source}
  processes.on_all_processes(
    lambda: workdir_lib.require_same_data(path, sources)
  )
  config_lib.compilation_cache(config.parallel.compilation_cache, path)
  teachers = teachers_lib.obtain(
    parts.teachers,
    config,
    workdir=path,
    source=parts.train_source,
    place=parts.devices.replicate,
    score=parts.evaluator.score,
    train=train_and_evaluate,
  )
  cache = None
  if config.teacher.cache:
    cache = teacher_cache.TeacherCache(
      config, parts, teachers.about["fingerprint"]
    )
  if prepared.before is not None:
    folder, stage = path / prepared.before.name, prepared.before.config
    logs.say(f"stage {folder.name}: {stage.epochs} epochs in {folder}")
    stage = initial_lib.stage_config(stage, config, teachers.members)
    train_and_evaluate(stage, str(folder))
    initial = processes.on_all_processes(
      functools.partial(initial_lib.read, folder, config, parts)
    )
  if initial is not None:
    initial_lib.keep(initial, path)
  variables = tuple(t.variables for t in teachers.members)
  if parts.programs.distiller.needs_class_means:
    variables = _with_class_means(config, parts, teachers.members, path)
  state = parts.programs.initialize(
    parts.seeds[0],
    variables,
    (initial.student, initial.distiller) if initial else ({}, {}),
  )
  state = parts.devices.place(state, parts.programs.specs)
  logs.overview(state, config.student.name)
  untrained = logs.untrained(parts.programs.reached["student"])
  if untrained and not parts.programs.distiller.predicts_with_teacher_head:
    logs.say(untrained)
  journal = journal_lib.Journal(path, config, parts, teachers.members, state)
  return loop_lib.Loop(config, parts, teachers, journal, cache).run()


def _with_class_means(
  config: ConfigDict,
  parts: components.Components,
  teachers: Sequence[teachers_lib.Teacher],
  path: pathlib.Path,
) -> tuple[Any, ...]:
  """The teachers' variables with their means over the training set."""
  # A checkpoint, which is restored later, has them already.
  resumes = processes.broadcast(bool(checkpoint.steps(path / "checkpoints")))
  found = []
  for teacher, shapes in zip(teachers, parts.programs.teachers, strict=True):
    means = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), shapes[base.CLASS_MEANS]
    )
    if not resumes:
      logs.say(f"teacher {teacher.name}: averaging the features of each class")
      evaluator = components.make_evaluator(
        config, parts.train_source, parts.train_source, parts.devices
      )
      pooled = evaluator.class_means(teacher.network, teacher.variables)
      means = {"pooled": pooled}
    means = parts.devices.replicate(means)
    found.append({**teacher.variables, base.CLASS_MEANS: means})
  return tuple(found)


class Prepared(NamedTuple):
  """A run as far as its config can be checked.

  Attributes:
    config: with all defaults resolved.
    result: of a run that is finished, else None.
    parts: None for a run that is finished.
    before: the stage that it starts from, None if it has no stages.
    initial: the weights that it starts from, if they are there.
  """

  config: ConfigDict
  result: dict[str, Any] | None
  parts: components.Components | None = None
  before: initial_lib.Stage | None = None
  initial: initial_lib.Initial | None = None


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Prepared:
  """Build the parts of a run, which finds the mistakes in its config.

  Args:
    config: made by a file of `configs/`.
    workdir: absolute path; nothing is written.

  Raises:
    ValueError: for a config that cannot run, or is not the workdir's.
  """
  config, before = initial_lib.split(config)
  config = teachers_lib.resolve_teachers(copy.deepcopy(config))
  config = config_lib.resolve_defaults(config)
  limits.check(config)
  train_source, test_source = config_lib.load_data(config)
  result = workdir_lib.finished(workdir, config)
  if result is not None:
    return Prepared(config, result)
  teachers = teachers_lib.find(config, train_source)
  parts = components.build(config, train_source, test_source, teachers)
  teacher_cache.check(config, parts.programs.distiller)
  initial = None
  if before is not None:
    initial = _prepare_stage(before, workdir / before.name, config, parts)
  elif config.init_from:
    initial = initial_lib.read(config.init_from, config, parts)
  return Prepared(config, None, parts, before, initial)


def _prepare_stage(
  stage: initial_lib.Stage,
  workdir: pathlib.Path,
  config: ConfigDict,
  parts: components.Components,
) -> initial_lib.Initial | None:
  """Check that a run can start from a stage; its weights if it is finished."""
  try:
    found = prepare(stage.config, workdir)
    if found.parts is None:
      return initial_lib.read(workdir, config, parts)
    found.parts.pipeline.close()
    initial_lib.require_stage_fits(found.config, found.parts, config, parts)
  except ValueError as error:
    raise ValueError(f"config.stages.{stage.name}: {error}") from error
  return None


def _require_same(config: ConfigDict, parts: components.Components) -> None:
  """Check that all processes have the same config and data.

  Raises:
    RefusedError: in all processes, if they differ.
  """
  if jax.process_count() == 1:
    return
  fields = json.dumps(identity.config_fingerprint(config), sort_keys=True)
  processes.require_same(
    "config",
    f"fields with the checksum {zlib.crc32(fields.encode()):08x}",
    "Start all processes with the same flags and the same config file",
  )
  sources = {"train": parts.train_source, "test": parts.test_source}
  processes.require_same(
    "config.data",
    ", ".join(f"{name} {data.digest(s)}" for name, s in sources.items()),
    "Copy the same files to the folder config.data.dir of every machine, or"
    " name one that all of them mount",
  )
