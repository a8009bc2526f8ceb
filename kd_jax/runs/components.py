"""The parts of a run, each built from plain arguments.

`build` is the only place that turns the fields of a config into parts.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict
from ml_collections import ConfigDict

from kd_jax import data
from kd_jax.distributed import devices as devices_lib
from kd_jax.runs import config as config_lib
from kd_jax.runs import evaluator as evaluator_lib
from kd_jax.runs import programs as programs_lib
from kd_jax.runs.teachers import Teacher
from kd_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Components:
  """What a run needs before it has any weights; never changed.

  Attributes:
    train_source: the training set.
    test_source: the test set.
    teachers: networks; those without variables are still to be trained.
    devices: over which a batch is split.
    pipeline: training batches in their order.
    steps_per_dispatch: optimiser updates in one call of `train_chunk`.
    total_steps: optimiser updates of the whole run.
    seeds: uint32 [2]: of the run, and of the data's order and augmentation.
    programs: the compiled functions.
    evaluator: scores networks on the test set.
  """

  train_source: data.Source | data.EncodedSource
  test_source: data.Source | data.EncodedSource
  teachers: tuple[Teacher, ...]
  devices: devices_lib.Devices
  pipeline: data.Pipeline
  steps_per_dispatch: int
  total_steps: int
  seeds: np.ndarray
  programs: programs_lib.Programs
  evaluator: evaluator_lib.Evaluator


def build(
  config: ConfigDict,
  train_source: data.Source | data.EncodedSource,
  test_source: data.Source | data.EncodedSource,
  teachers: Sequence[Teacher],
) -> Components:
  """Build the parts of a run, in the order in which it needs them.

  Shapes are tried on the way: a batch that a method cannot take, layers that
  do not exist or a weight for an unknown term is an error here.

  Args:
    config: with all defaults resolved.
    train_source: training set.
    test_source: test set.
    teachers: see `teachers.find`.

  Raises:
    ValueError: for a config that cannot run.
  """
  devices = devices_lib.make_devices(
    num_devices=config.parallel.num_devices, mapping=config.parallel.mapping
  )
  num_devices = devices.mesh.devices.size
  config_lib.check(config, train_source, num_devices=num_devices)
  data_seed = config.seed if config.data.seed is None else config.data.seed
  pipeline = data.create(
    config.data.pipeline,
    train_source,
    batch_size=config.batch_size,
    seed=data_seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    settings={
      "crop_area": tuple(config.data.crop_area),
      "crop_aspect": tuple(config.data.crop_aspect),
      "device": config.data.decoder,
      **config_lib.decoders(config.data.num_workers, train_source),
      "sharding": devices.batch_sharding,
    },
  )
  recipe = make_recipe(config, train_source, teachers, devices, pipeline)
  return Components(
    train_source=train_source,
    test_source=test_source,
    teachers=tuple(teachers),
    devices=devices,
    pipeline=pipeline,
    steps_per_dispatch=config_lib.steps_per_dispatch(
      config.steps_per_dispatch,
      steps_per_epoch=pipeline.steps_per_epoch,
      resident=bool(pipeline.resident),
    ),
    total_steps=config.epochs * pipeline.steps_per_epoch,
    seeds=step_lib.make_seeds(config.seed, data_seed),
    programs=programs_lib.make_programs(recipe),
    evaluator=make_evaluator(config, test_source, train_source, devices),
  )


def make_evaluator(
  config: ConfigDict,
  source: data.Source | data.EncodedSource,
  train_source: data.Source | data.EncodedSource,
  devices: devices_lib.Devices,
) -> evaluator_lib.Evaluator:
  """Make the evaluator of a set, normalised as the training images are."""
  return evaluator_lib.Evaluator(
    source,
    devices,
    batch_size=config.eval.batch_size,
    pipeline=config.data.pipeline,
    decoder=config.data.decoder,
    mean=train_source.mean,
    std=train_source.std,
    dtype=config.dtype,
  )


def make_recipe(
  config: ConfigDict,
  source: data.Source | data.EncodedSource,
  teachers: Sequence[Teacher],
  devices: devices_lib.Devices,
  pipeline: data.Pipeline,
) -> programs_lib.Recipe:
  """What the compiled programs depend on, but no seed.

  Args:
    config: with all defaults resolved.
    source: the training set.
    teachers: see `teachers.find`.
    devices: over which a batch is split.
    pipeline: of the training set.
  """
  steps_per_epoch, optim = pipeline.steps_per_epoch, config.optim
  return programs_lib.Recipe(
    student=config.student.name,
    teachers=tuple(teacher.network for teacher in teachers),
    teacher_weights=tuple(teacher.weight for teacher in teachers),
    distiller=_items(config.distiller.to_dict()),
    loss_weights=_items(config.loss_weights.to_dict()),
    ramp_steps=tuple(
      (name, max(round(epochs * steps_per_epoch), 1))
      for name, epochs in config.loss_ramp_epochs.items()
    ),
    label_smoothing=config.label_smoothing,
    mixup=config.data.mixup,
    cutmix=config.data.cutmix,
    crop_padding=config.data.crop_padding,
    flip=config.data.flip,
    mean=tuple(source.mean),
    std=tuple(source.std),
    image_shape=tuple(source.image_shape),
    num_classes=source.num_classes,
    train_labels=np.asarray(source.labels, np.int32).tobytes(),
    load=pipeline.load,
    cached_teacher=bool(config.teacher.cache),
    dtype=config.dtype,
    sync=config.sync_batch_stats,
    batch_size=config.batch_size,
    accumulate_steps=config.accumulate_steps,
    epochs=config.epochs,
    steps_per_epoch=steps_per_epoch,
    optim=_items(optim.to_dict()),
    devices=devices,
  )


def _items(fields: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
  """A dict as a hashable value, in its order."""
  return tuple((name, _hashable(value)) for name, value in fields.items())


def _hashable(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(value)
  return FrozenDict(_items(value)) if isinstance(value, Mapping) else value
