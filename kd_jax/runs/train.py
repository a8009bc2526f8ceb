"""The composition root and the loop: build, restore, step, log, evaluate, save.

This is the only file that reads a config; below it everything takes plain
keyword arguments. Restore order: the workdir's own checkpoint (the same run,
interrupted), else a fresh start. The teacher is never in a checkpoint.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from kd_jax import data, distillers, models, storage
from kd_jax.data import augment
from kd_jax.distributed import collectives, devices, processes, signals
from kd_jax.interop import card, model
from kd_jax.models import base, fold
from kd_jax.runs import (
  checkpoint,
  errors,
  identity,
  logs,
  records,
  teachers,
  writers,
)
from kd_jax.runs import config as config_lib
from kd_jax.runs import finished as finished_lib
from kd_jax.runs import workdir as workdir_lib
from kd_jax.training import eval_step, loss, metrics, optim
from kd_jax.training import state as state_lib
from kd_jax.training import step as step_lib

_log = logging.getLogger(__name__)


def train_and_evaluate(config: ConfigDict, workdir: str) -> dict[str, Any]:
  """Trains what a config says, or goes on with it.

  Args:
    config: made by a file of `configs/`.
    workdir: folder of the run; see `kd_jax.record` for what it holds.

  Returns:
    The content of `result.json`.

  Raises:
    ValueError: for a config that cannot run, before anything is written.
    NonFiniteLossError: when the loss leaves the finite numbers.
    PreemptedError: after SIGTERM or SIGINT, when a checkpoint has been written.
    UnsavedError: when something could not be saved.
  """
  path = pathlib.Path(workdir).absolute()
  run = processes.on_all_processes(lambda: prepare(config, path))
  processes.require_shared(path)
  finished = processes.broadcast(run if isinstance(run, dict) else None)
  if finished is not None:
    _log.info("%s is finished: nothing to do", path)
    return finished
  assert isinstance(run, Run)
  run.require_same()
  workdir_lib.claim(path, run.config)
  config_lib.compilation_cache(run.config.parallel.compilation_cache, path)
  return run.train()


def prepare(
  config: ConfigDict, workdir: pathlib.Path
) -> "Run | dict[str, Any]":
  """Builds a run as far as that finds the mistakes in its config.

  Args:
    config: made by a file of `configs/`.
    workdir: absolute path; nothing is written.

  Returns:
    The run, or its result if it is finished.

  Raises:
    ValueError: for a config that cannot run, or is not the workdir's.
  """
  train_source, test_source = _sources(config)
  config = teachers.resolve_teachers(
    config_lib.resolve_defaults(config, train_source)
  )
  finished = workdir_lib.finished(workdir, config)
  if finished is not None:
    return finished
  return Run(config, workdir, train_source, test_source)


def _sources(config):
  settings = {name: config.data[name] for name in card.DATA_OPTIONS}
  return tuple(
    data.load(
      config.data.name,
      split=split,
      dir=config.data.dir,
      on_bad_image=config.data.on_bad_image,
      **settings,
    )
    for split in ("train", "test")
  )


class Run:
  """One training run: its parts, built once, and its loop."""

  def __init__(
    self,
    config: ConfigDict,
    workdir: pathlib.Path,
    train_source: data.Source | data.EncodedSource,
    test_source: data.Source | data.EncodedSource,
  ):
    """Builds everything but the teacher's weights, which may take hours.

    Args:
      config: settled.
      workdir: absolute path.
      train_source: training set.
      test_source: test set.
    """
    self.config, self.workdir = config, workdir
    self.data_seed = config.data.seed
    if self.data_seed is None:
      self.data_seed = config.seed
    self.train_source, self.test_source = train_source, test_source
    self.devices = devices.make_devices(
      num_devices=config.parallel.num_devices, mapping=config.parallel.mapping
    )
    self.num_devices = self.devices.mesh.devices.size
    config_lib.check(config, train_source, num_devices=self.num_devices)
    self.student = models.create(
      config.student.name,
      train_source.num_classes,
      dtype=jnp.dtype(config.dtype),
      bn_axis_name=collectives.AXIS if config.sync_batch_stats else None,
    )
    self.teacher_specs = teachers.specs(config)
    self.teachers = [self._find_teacher(s) for s in self.teacher_specs]
    self.distiller = self._distiller(collectives.AXIS)
    self.pipeline = data.create(
      config.data.pipeline,
      train_source,
      batch_size=config.batch_size,
      seed=self.data_seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      settings={
        "crop_area": tuple(config.data.crop_area),
        "crop_aspect": tuple(config.data.crop_aspect),
        "device": config.data.decoder,
        **config_lib.decoders(config.data.num_workers, train_source),
        "sharding": self.devices.batch_sharding,
      },
    )
    self.skipped = {"train": self.pipeline.skipped}
    self.steps_per_epoch = self.pipeline.steps_per_epoch
    self.steps_per_dispatch = config_lib.steps_per_dispatch(
      config.steps_per_dispatch,
      steps_per_epoch=self.steps_per_epoch,
      resident=bool(self.pipeline.resident),
    )
    self.total_steps = config.epochs * self.steps_per_epoch
    self.normalize = functools.partial(
      augment.normalize,
      mean=train_source.mean,
      std=train_source.std,
      dtype=jnp.dtype(config.dtype),
    )
    self.optimizer = self._optimizer()

  def require_same(self) -> None:
    """Checks that the other processes have the same config and data.

    Raises:
      RefusedError: in all processes, if some have others.
    """
    if jax.process_count() == 1:
      return
    fields = json.dumps(
      identity.config_fingerprint(self.config), sort_keys=True
    )
    processes.require_same(
      "config",
      f"fields with the checksum {zlib.crc32(fields.encode()):08x}",
      "Start all processes with the same flags and the same config file",
    )
    sources = {"train": self.train_source, "test": self.test_source}
    processes.require_same(
      "config.data",
      ", ".join(f"{name} {data.digest(s)}" for name, s in sources.items()),
      "Copy the same files to the folder config.data.dir of every machine, or"
      " name one that all of them mount",
    )

  def _find_teacher(self, spec):
    """A teacher, without weights if it is to be trained first."""
    if spec.checkpoint:
      return teachers.load(spec, self.train_source, dtype=self.config.dtype)
    return teachers.create(
      spec,
      num_classes=self.train_source.num_classes,
      dtype=jnp.dtype(self.config.dtype),
    )

  @property
  def teacher_networks(self) -> tuple[Any, ...]:
    """The teachers' networks."""
    return tuple(teacher.network for teacher in self.teachers)

  @property
  def teacher_variables(self) -> tuple[Any, ...]:
    """The teachers' variables."""
    return tuple(teacher.variables for teacher in self.teachers)

  def _frozen_teachers(self) -> Any:
    """The teachers' variables, as a train step needs them; on the devices."""
    frozen = tuple(
      fold.freeze(
        teacher.network, teacher.variables, self.train_source.image_shape
      )
      for teacher in self.teachers
    )
    return self.devices.replicate(frozen)

  def _distiller(self, axis_name):
    return distillers.create_for_teachers(
      weights=[teacher.weight for teacher in self.teachers],
      axis_name=axis_name,
      sync=self.config.sync_batch_stats,
      dtype=jnp.dtype(self.config.dtype),
      label_smoothing=self.config.label_smoothing,
      **self.config.distiller.to_dict(),
    )

  def _transform(self, key, batch):
    images = augment.augment(
      key,
      batch["image"],
      batch["index"],
      pad=self.config.data.crop_padding,
      flip=self.config.data.flip,
    )
    return self.normalize(images)

  def _mixing(self):
    alphas = {name: self.config.data[name] for name in ("mixup", "cutmix")}
    return alphas if any(alphas.values()) else None

  def _loss_arguments(self):
    ramps = self.config.loss_ramp_epochs.to_dict()
    return {
      "student": self.student,
      "teachers": self.teacher_networks,
      "distiller": self.distiller,
      "loss_weights": self.config.loss_weights.to_dict(),
      "ramp_steps": {
        name: max(round(epochs * self.steps_per_epoch), 1)
        for name, epochs in ramps.items()
      },
      "steps_per_epoch": self.steps_per_epoch,
      "transform": self._transform,
      "mixing": self._mixing(),
    }

  def _optimizer(self):
    """Builds the optimiser, and with it tries the whole program on shapes.

    Every mistake that shapes can show (a batch that a method cannot take,
    layers that do not exist, a weight for an unknown term) is an error here.
    """
    abstract_teachers = tuple(
      model.variable_shapes(t.network, self.train_source.image_shape)
      for t in self.teachers
    )
    student, distilled = jax.eval_shape(
      self._initialize, jax.random.key(0), abstract_teachers
    )
    student_params, student_rest = state_lib.split_params(student)
    distiller_params, distiller_rest = state_lib.split_params(distilled)
    # Collectives need a mapped axis: shapes are tried on one replica alone.
    arguments = self._loss_arguments()
    arguments["student"] = self.student.clone(bn_axis_name=None)
    arguments["distiller"] = self._distiller(None)
    local = self.config.batch_size // self.config.accumulate_steps
    if not self.config.sync_batch_stats:
      local //= self.num_devices
    decay_mask = optim.reached_parameters(
      loss.make_loss_fn(axis_name=None, **arguments),
      {"student": student_params, "distiller": distiller_params},
      {"student": student_rest, "distiller": distiller_rest},
      abstract_teachers,
      _abstract_batch(local, self.train_source.image_shape),
      jax.ShapeDtypeStruct((), jnp.int32),
      jax.ShapeDtypeStruct((2,), jnp.uint32),
    )
    settings = self.config.optim
    schedule = optim.learning_rate_schedule(
      optim.scaled_learning_rate(
        settings.learning_rate,
        batch_size=self.config.batch_size,
        reference_batch_size=settings.reference_batch_size,
      ),
      schedule=settings.schedule,
      epochs=self.config.epochs,
      steps_per_epoch=self.steps_per_epoch,
      milestones=settings.milestones,
      decay_rate=settings.decay_rate,
      warmup_epochs=settings.warmup_epochs,
    )
    self.schedule = schedule
    return optim.sgd(
      schedule,
      momentum=settings.momentum,
      nesterov=settings.nesterov,
      weight_decay=settings.weight_decay,
      decay_mask=decay_mask,
      gradient_clip=settings.gradient_clip,
    )

  def _initialize(self, key, teacher_variables):
    """Variables of the student and of the distiller, from one key."""
    student_key, distiller_key, memory_key = jax.random.split(key, 3)
    size = self.config.batch_size // self.config.accumulate_steps
    if not self.config.sync_batch_stats:
      size //= self.num_devices
    shape = (size, *self.train_source.image_shape)
    batch = {
      "image": jnp.zeros(shape, jnp.uint8),
      "label": jnp.zeros(size, jnp.int32),
      "index": jnp.arange(size, dtype=jnp.int32),
      "mask": jnp.ones(size, bool),
      # Only here: what sizes a memory bank and says which examples share a
      # class.
      "train_labels": jnp.asarray(self.train_source.labels),
    }
    images = self.normalize(batch["image"])
    student = self.student.clone(bn_axis_name=None)
    variables = student.init(student_key, images, train=False)
    distiller_variables = loss.init_distiller(
      self._distiller(None),
      {"params": distiller_key, "distiller": memory_key},
      student=student,
      student_variables=variables,
      teachers=self.teacher_networks,
      teacher_variables=teacher_variables,
      images=images,
      batch=batch,
    )
    return variables, distiller_variables

  def train(self) -> dict[str, Any]:
    """Obtains the teacher, restores, trains to the end, exports."""
    self.teachers_about = self._obtain_teachers()
    # Run once: on a CPU, compiling it well takes five times as long.
    options = {"xla_backend_optimization_level": 0}
    initialize = jax.jit(
      self._initialize,
      compiler_options=options if jax.default_backend() == "cpu" else None,
    )
    student, distilled = initialize(
      jax.random.key(self.config.seed), self.teacher_variables
    )
    state = state_lib.create(student, distilled, self.optimizer)
    specs = state_lib.state_specs(state, self.distiller)
    if self.config.parallel.mapping == "pmap":  # has no other way
      specs = jax.tree.map(lambda _: P(), state)
    state = self.devices.place(state, specs)
    self._compile_functions(specs)
    name = self.config.student.name
    _log.info("%s", logs.parameter_overview(state.params, name))
    if memory := state.collections["distiller"].get("memory"):
      _log.info("%s", logs.memory_overview(memory))
    loop = Loop(self, state)
    try:
      result = loop.run()
    except errors.AGREED:
      loop.close()
      raise
    except BaseException:
      loop.abandon()
      raise
    finally:
      self.pipeline.close()
    loop.close()
    return result

  def _compile_functions(self, specs):
    arguments, optimizer = self._loss_arguments(), self.optimizer
    step = step_lib.make_train_step(
      optimizer=optimizer,
      axis_name=collectives.AXIS,
      accumulate_steps=self.config.accumulate_steps,
      **arguments,
    )
    chunk = step_lib.make_train_chunk(step, self.pipeline.load)
    self.train_chunk = self.devices.map_chunk(
      chunk, donate=True, carry_specs=specs
    )
    self.resident = self.devices.replicate(self.pipeline.resident)
    seeds = step_lib.make_seeds(self.config.seed, self.data_seed)
    self.constants = step_lib.Constants(
      self._frozen_teachers(), self.devices.replicate(seeds)
    )
    self.begin_evaluation = self._evaluator(
      self.student, self.teacher_networks, self.distiller
    )

  def _evaluator(self, student, teachers, distiller):
    """A function that gives the devices the whole test set to score.

    It takes the variables, and returns a function that waits for the scores.
    """
    chunks = self._eval_chunks()
    step = eval_step.make_eval_step(
      student=student,
      teachers=teachers,
      distiller=distiller,
      transform=lambda _, batch: self.normalize(batch["image"]),
      axis_name=collectives.AXIS,
    )
    mapped = self.devices.map_chunk(eval_step.make_eval_chunk(step))

    def begin(variables, teacher_variables):
      sums: list[dict[str, Any]] = []
      for chunk in chunks():
        sums.append(mapped(variables, teacher_variables, {}, chunk))
        if len(sums) > 1:  # one late: batches do not pile up on the device
          sums[-2] = jax.device_get(sums[-2])
      # A CPU has no queue: collectives of two programs in flight might meet.
      if jax.default_backend() == "cpu":
        jax.block_until_ready(sums)

      def scores():
        fetched = jax.device_get(sums)
        stacked = {k: np.stack([s[k] for s in fetched]) for k in fetched[0]}
        return processes.broadcast(metrics.means(stacked))

      return scores

    return begin

  def _eval_chunks(self):
    """A function that gives the test set, on the devices, in parts."""
    batch_size = self.config.eval.batch_size
    batch_size = math.ceil(batch_size / self.num_devices) * self.num_devices
    share = {
      "process_index": jax.process_index(),
      "process_count": jax.process_count(),
    }
    if isinstance(self.test_source, data.EncodedSource):
      stream = data.eval_stream(
        self.test_source,
        batch_size,
        pipeline=self.config.data.pipeline,
        device=self.config.data.decoder,
        **share,
      )
      self.skipped["test"] = stream.skipped
      return lambda: (
        self.devices.shard({k: v[None] for k, v in batch.items()})
        for batch in stream
      )
    xs = data.eval_batches(self.test_source, batch_size, **share)
    count = len(xs["label"])
    size = 1 if jax.default_backend() == "cpu" else count
    chunks = [
      self.devices.shard({k: v[i : i + size] for k, v in xs.items()})
      for i in range(0, count, size)
    ]
    return lambda: chunks

  def _obtain_teachers(self):
    """Trains those without weights, puts all on the devices, scores them.

    Returns:
      What the result says of them: a dict, a list of several, {} of none.
    """
    path = self.workdir / "teacher.json"
    kept = processes.broadcast(
      records.read_teachers(self.workdir, len(self.teacher_specs))
    )
    abouts = []
    for i, spec in enumerate(self.teacher_specs):
      if not spec.checkpoint:
        spec = dataclasses.replace(spec, checkpoint=self._train_teacher(spec))
        self.teachers[i] = processes.on_all_processes(
          functools.partial(self._find_teacher, spec)
        )
      known = kept and kept[i]
      about = self._place_teacher(i, spec, known)
      logs.say(
        f"teacher {spec.name}: {logs.scores_in_words(about)}"
        f" ({spec.checkpoint})"
      )
      abouts.append(about)
    # A result holds a list only where there are several teachers.
    about = abouts[0] if len(abouts) == 1 else abouts or {}
    if abouts and kept is None and processes.is_first():
      storage.write_json(path, about)
    return about

  def _train_teacher(self, spec):
    teacher_config = teachers.teacher_config(self.config, spec.name)
    folder = teachers.teacher_workdir(
      self.workdir, teacher_config, self.train_source
    )
    if self._has_result(folder):
      logs.say(f"teacher {spec.name}: reusing {folder}")
      return str(folder)
    # Runs beside each other, started at once, train it once.
    with workdir_lib.locked(folder):
      if not self._has_result(folder):
        logs.say(
          f"no {spec.where}.checkpoint: training {spec.name} first in {folder}"
        )
        train_and_evaluate(teacher_config, str(folder))
    return str(folder)

  def _has_result(self, folder):
    return processes.broadcast(workdir_lib.result(folder)) is not None

  def _place_teacher(self, i, spec, known):
    loaded = self.teachers[i]
    weights = teachers.fingerprint(loaded.variables)
    teacher = dataclasses.replace(
      loaded, variables=self.devices.replicate(loaded.variables)
    )
    self.teachers[i] = teacher
    if known is None:
      begin = self._evaluator(teacher.network, (), distillers.create("none"))
      scores = begin({"student": teacher.variables, "distiller": {}}, ())()
      return {
        "name": spec.name,
        "checkpoint": spec.checkpoint,
        "fingerprint": weights,
        **scores,
      }
    if known["fingerprint"] != weights:
      raise ValueError(
        f"{spec.where}.checkpoint: expected the weights that {self.workdir}"
        f" began with, those of {known['checkpoint']}, got others in"
        f" {spec.checkpoint}. Name the same teacher, or give another"
        " --workdir"
      )
    return known


def _abstract_batch(size, shape):
  struct = jax.ShapeDtypeStruct
  return {
    "image": struct((size, *shape), jnp.uint8),
    "label": struct((size,), jnp.int32),
    "index": struct((size,), jnp.int32),
    "mask": struct((size,), jnp.bool_),
  }


def _predict_in_fresh_process(workdir, source, student, examples=4):
  from PIL import Image

  folder = workdir / "samples"
  folder.mkdir(exist_ok=True)
  found = (
    (image, source.class_names[label])
    for batch in data.eval_stream(source, examples)
    for image, label, good in zip(batch["image"], batch["label"], batch["mask"])
    if good
  )
  paths: list[str] = []
  for image, name in itertools.islice(found, examples):
    path = folder / f"{len(paths)}_{name.replace('/', '_')}.png"
    Image.fromarray(image).save(path)
    paths.append(str(path))
  command = [sys.executable, "-m", "kd_jax", "predict", "--model"]
  command += [str(workdir / "export"), "--model_name", student, *paths]
  logs.say("in a fresh process: python " + " ".join(command[1:]))
  package = pathlib.Path(__file__).resolve().parents[2]
  python_path = f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
  subprocess.run(
    command,
    check=True,
    # This process may hold the accelerator's memory.
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": python_path},
  )


# The loop gives its state away to the next dispatch.
_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


class Evaluation(NamedTuple):
  """A state that the devices are scoring.

  Attributes:
    step: of the state.
    epoch: that it ends.
    scores: waits for them.
    variables: of the state, those to keep if it is the best.
  """

  step: int
  epoch: int
  scores: Callable[[], dict[str, float]]
  variables: Any


class Trial:
  """What the loop of a run keeps: its scores, and its files."""

  def __init__(self, run: Run):
    """Opens the checkpoints."""
    self.run_, self.workdir, self.config = run, run.workdir, run.config
    self.best: dict[str, Any] = {}
    self.last_eval: dict[str, Any] = {}
    self.unscored: Evaluation | None = None
    self.totals: dict[str, float] = {}

  def begin(self, step: int, meta: dict[str, Any] | None) -> None:
    """Goes on from a step, with what was saved there if it is not the first."""
    # What is on disk, which may be of after the checkpoint.
    best = self.workdir / "best"
    kept = checkpoint.restore_latest(best, None, required=False)
    self.best = {} if kept is None else kept.meta["card"]["test"]
    with self.saving("the checkpoint folders"):
      self.checkpoints = checkpoint.Checkpointer(
        self.workdir / "checkpoints", keep=self.config.checkpoint.keep
      )
      self.best_checkpoint = checkpoint.Checkpointer(best)
    if meta is not None:
      self.last_eval = meta["last_eval"]
      self.totals = meta["totals"]
    self.writer = writers.Writer(
      self.workdir, resume_step=step, enabled=processes.is_first()
    )

  def close(self) -> None:
    """Releases files and waits for what is being saved."""
    self.writer.close()
    self.checkpoints.close()
    self.best_checkpoint.close()

  def require_finite(self, first: int, sums: dict[str, np.ndarray]) -> None:
    """Refuses sums [k] of the steps after `first` that are not finite."""
    found = metrics.first_non_finite(sums)
    if found is None:
      return
    offset, names = found
    terms = [n for n in names if n in self.config.loss_weights] or names
    kept = "No checkpoint had been written"
    self.wait()
    if saved := self.saved():
      kept = f"The last checkpoint, of step {saved}, is from before it"
    raise errors.NonFiniteLossError(
      f"step {first + offset + 1}: the loss is not finite (terms:"
      f" {', '.join(terms)}). {kept}. Lower config.optim.learning_rate (now"
      f" {self.config.optim.learning_rate}) or set"
      " config.optim.warmup_epochs or config.optim.gradient_clip"
    )

  def add(self, sums: dict[str, np.ndarray]) -> None:
    """Adds sums [k] of steps to those of which the next line is made."""
    for name, value in sums.items():
      total = self.totals.get(name, 0.0)
      self.totals[name] = total + float(np.sum(value, dtype=np.float64))

  def log(self, step: int) -> str:
    """Writes a line of training metrics; says it in words."""
    run, values = self.run_, metrics.means(self.totals)
    self.totals = {}
    values["learning_rate"] = float(run.schedule(step - 1))
    values["epoch"] = step / run.steps_per_epoch
    with self.saving("metrics.jsonl"):
      self.writer.write(step, "train", values)
    return (
      f"step {step}/{run.total_steps} loss {values['loss']:.4f}"
      f" top-1 {values['top1']:.2f} %"
    )

  def begin_evaluation(
    self, step: int, epoch: int, state: state_lib.TrainState
  ) -> None:
    """Has the devices score a state, which may be given away thereafter."""
    run = self.run_
    # Memories are of training alone, and may be split over the devices.
    variables = {
      name: {
        collection: value
        for collection, value in state.variables(name).items()
        if collection != "memory"
      }
      for name in ("student", "distiller")
    }
    scores = run.begin_evaluation(variables, run.teacher_variables)
    tree = finished_lib.inference_variables(state, run.distiller, run.teachers)
    self.unscored = Evaluation(step, epoch, scores, _copy(tree))

  def score(self) -> str:
    """Waits for the scores of what is being evaluated, and keeps the best.

    Returns:
      The scores in words; "" if nothing is being evaluated.
    """
    if self.unscored is None:
      return ""
    (step, epoch, wait, tree), self.unscored = self.unscored, None
    scores = wait()
    with self.saving("metrics.jsonl"):
      self.writer.write(step, "eval", {**scores, "epoch": epoch})
    self.last_eval = {**scores, "epoch": epoch}
    if not self.best or scores["top1"] > self.best["top1"]:
      self.best = self.last_eval
      with self.saving("the best weights"):
        self.best_checkpoint.save(
          step, tree, position={}, meta={"card": self._card()}
        )
    words = logs.scores_in_words(scores)
    return f"epoch {epoch}/{self.config.epochs}: {words}"

  def _card(self):
    run = self.run_
    return finished_lib.model_card(
      self.config,
      source=run.train_source,
      distiller=run.distiller,
      teachers=run.teachers,
      scores=self.last_eval,
    )

  def save(
    self,
    step: int,
    state: state_lib.TrainState,
    seconds: float,
    skipped: dict[str, dict[str, str]],
  ) -> None:
    """Starts saving a checkpoint."""
    with self.saving(f"the checkpoint of step {step}"):
      self.best_checkpoint.wait()
      self.checkpoints.save(
        step,
        state,
        position=self.run_.pipeline.get_state(),
        meta={
          "last_eval": self.last_eval,
          "seconds": seconds,
          "skipped": skipped,
          "totals": self.totals,
          "card": self._card(),
        },
      )

  def saved(self) -> int:
    """Step of the newest whole checkpoint, 0 if there is none."""
    return max(checkpoint.steps(self.workdir / "checkpoints"), default=0)

  @contextlib.contextmanager
  def saving(self, what: str) -> Iterator[None]:
    """Names what could not be saved, and the step to resume from."""
    try:
      yield
    except Exception as error:
      raise errors.UnsavedError(
        f"{what} could not be saved in {self.workdir} ({type(error).__name__}:"
        f" {error}). Make room; the same command resumes from step"
        f" {self.saved()}"
      ) from error

  def wait(self) -> None:
    """Waits until what was saved is on disk."""
    with self.saving("a checkpoint"):
      self.best_checkpoint.wait()
      self.checkpoints.wait()

  def conclude(
    self,
    state: state_lib.TrainState,
    seconds: float,
    skipped: dict[str, int],
  ) -> dict[str, Any]:
    """Exports, and writes the result: the first process does.

    Args:
      state: the last.
      seconds: that the run has taken.
      skipped: how many images could not be decoded.
    """
    run = self.run_
    finished_lib.export_run(self.workdir, self.workdir / "export")
    steps = run.total_steps
    result = {
      "final": self.last_eval,
      "best": self.best,
      "teacher": run.teachers_about,
      "student": self.config.student.name,
      "method": self.config.distiller.name,
      "seed": self.config.seed,
      "parameters": base.count_parameters(state.params["student"]),
      "distiller_parameters": base.count_parameters(state.params["distiller"]),
      "steps": steps,
      "seconds": round(seconds, 3),
      "images_per_second": round(steps * self.config.batch_size / seconds, 1),
      "hardware": workdir_lib.hardware(),
      "skipped_images": skipped,
    }
    if self.config.verify_export:
      _predict_in_fresh_process(
        self.workdir, run.test_source, self.config.student.name
      )
    storage.write_json(self.workdir / "result.json", result)
    return result


class Loop:
  """The training loop of a run, and what has to survive a restart of it."""

  def __init__(self, run: Run, state: state_lib.TrainState):
    """Restores the newest checkpoint, if there is one.

    Args:
      run: whose loop it is.
      state: a fresh one, placed.
    """
    self.run_, self.config, self.state = run, run.config, state
    self.trial = Trial(run)
    self.step, self.seconds, self.started = 0, 0.0, time.monotonic()
    folder = run.workdir / "checkpoints"
    restored = checkpoint.restore_latest(folder, state)
    if restored is not None:
      self.state, self.step = restored.state, restored.step
      run.pipeline.set_state(restored.position)
      self.seconds = restored.meta["seconds"]
      # Not in a checkpoint of before it was kept.
      for name, found in restored.meta.get("skipped", {}).items():
        run.skipped[name].merge(found)
      logs.say(f"going on from step {self.step} of {run.total_steps}")
    self.trial.begin(self.step, None if restored is None else restored.meta)
    self.tried_step, self.tried_time = self.step, time.monotonic()
    self.progress = writers.Progress(
      total=run.total_steps,
      initial=self.step,
      title=f"{run.config.distiller.name}:{run.config.student.name}",
      enabled=processes.is_first(),
    )
    self.pending: list[tuple[int, Any, Any]] = []
    self.stop = signals.StopSignals()
    # In how many processes a signal has come, and the clock says save.
    self.wishes = np.zeros(2, int)

  def close(self) -> None:
    """Releases files and waits for what is being saved."""
    self.progress.close()
    self.trial.close()

  def abandon(self) -> None:
    """As `close` after an error, when other processes may not come along."""
    if jax.process_count() == 1:
      return self.close()
    self.progress.close()
    self.trial.writer.close()

  def run(self) -> dict[str, Any]:
    """Trains to the last step."""
    run = self.run_
    with self.stop:
      while self.step < run.total_steps:
        self._dispatch()
        stopping, due = self._agree()
        epoch, within = divmod(self.step, run.steps_per_epoch)
        last = self.step == run.total_steps
        if last or (within == 0 and epoch % self.config.eval.every_epochs == 0):
          self._begin_evaluation(epoch)
        if last or stopping or due:
          self._save()
        if stopping and not last:
          raise self._stopped()
      # One that came since the last step would be forgotten.
      received = np.int32(self.stop.received is not None)
      if collectives.gather_processes(received).any():
        raise self._stopped()
      if not self.trial.best:  # lost since the last
        self._begin_evaluation(self.config.epochs)
        self._save()
    return self._finish()

  def _agree(self) -> tuple[bool, bool]:
    """Whether to stop, and whether to save: the same in all processes."""
    every = self.config.checkpoint.every_steps
    due = bool(every) and self.step - self.tried_step >= every
    if jax.process_count() == 1:
      return self.stop.received is not None, due or self._clock_is_due()
    signalled, clocks = self.wishes > 0
    return bool(signalled), bool(due or clocks)

  def _clock_is_due(self) -> bool:
    minutes = self.config.checkpoint.every_minutes
    return time.monotonic() - self.tried_time >= 60 * minutes

  def _stopped(self) -> errors.PreemptedError:
    self.trial.wait()
    return errors.PreemptedError(
      f"stopped by {self.stop.received or 'a signal to another process'} at"
      f" step {self.step}, saved in {self.run_.workdir}: the same command goes"
      " on from there"
    )

  def _dispatch(self):
    run, whole = self.run_, self.run_.steps_per_dispatch
    # A checkpoint may be of other hardware, and of between two dispatches.
    size = whole - self.step % whole
    xs = run.devices.shard(run.pipeline.next_chunk(size))
    self.state, sums = run.train_chunk(
      self.state, run.constants, run.resident, xs
    )
    wishes: Any = np.zeros(2, int)
    if jax.process_count() > 1:
      wishes = run.devices.count(
        self.stop.received is not None, self._clock_is_due()
      )
    self.pending.append((self.step, sums, wishes))
    self.step += size
    self.progress.advance(size)
    # One dispatch late: the device already has its next work.
    self._collect(leave=1)
    self._score()

  def _collect(self, *, leave: int):
    """Fetches metrics, writes those that are due."""
    run = self.run_
    while len(self.pending) > leave:
      first, sums, wishes = self.pending.pop(0)
      sums, wishes = jax.device_get((sums, wishes))
      self.wishes += wishes
      done = first + len(sums[metrics.COUNT])
      every = self.config.log.every_steps
      due = done // every > first // every or done % run.steps_per_epoch == 0
      self.trial.require_finite(first, sums)
      self.trial.add(sums)
      if due:
        self.progress.line(self.trial.log(done))

  def _begin_evaluation(self, epoch: int):
    self.trial.begin_evaluation(self.step, epoch, self.state)

  def _score(self):
    if text := self.trial.score():
      self.progress.line(text)

  def _elapsed(self) -> float:
    return self.seconds + time.monotonic() - self.started

  def _save(self):
    # What has not been looked at may not be finite, and must not be kept.
    self._collect(leave=0)
    self._score()
    self.wishes[:] = 0
    skipped = self._unite_skipped()
    self.trial.save(self.step, self.state, self._elapsed(), skipped)
    self.tried_step, self.tried_time = self.step, time.monotonic()

  def _finish(self) -> dict[str, Any]:
    trial, skipped = self.trial, self._list_skipped()
    trial.wait()
    result = {}
    if processes.is_first():
      with trial.saving("the result"):
        result = trial.conclude(self.state, self._elapsed(), skipped)
    logs.say(
      f"{trial.workdir}: last epoch {logs.scores_in_words(trial.last_eval)}"
    )
    return processes.broadcast(result)

  def _unite_skipped(self) -> dict[str, dict[str, str]]:
    """What all processes have left out, by split and position."""
    found = {name: s.get_state() for name, s in self.run_.skipped.items()}
    for theirs in processes.all_gather_object(found):
      for name, state in theirs.items():
        self.run_.skipped[name].merge(state)
    return {name: s.get_state() for name, s in self.run_.skipped.items()}

  def _list_skipped(self) -> dict[str, int]:
    """Writes down the images that were left out; how many, in all."""
    self._unite_skipped()
    listed = {name: s.reasons() for name, s in self.run_.skipped.items()}
    if any(listed.values()) and processes.is_first():
      path = self.run_.workdir / "skipped_images.json"
      storage.write_json(path, listed)
    return {name: len(reasons) for name, reasons in listed.items()}
