"""kd_jax's side of `benchmarks.step`: its real train chunk on its pipeline."""

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from benchmarks import work as work_lib
from kd_jax import data, distillers, models
from kd_jax.data import augment
from kd_jax.distributed import collectives
from kd_jax.distributed import devices as devices_lib
from kd_jax.interop import pytorch
from kd_jax.models import fold
from kd_jax.training import loss as loss_lib
from kd_jax.training import optim, state
from kd_jax.training import step as step_lib


class Program:
  """The compiled training of a work, as a run of kd_jax puts it together.

  Attributes:
    steps: optimiser updates in one dispatch.
    host_seconds: spent by the host on dispatches, waiting for results left out.
    dispatches: made.
  """

  def __init__(
    self,
    work: work_lib.Work,
    weights: pathlib.Path,
    *,
    dtype: str = "float32",
    steps_per_dispatch: int = 0,
    devices: int = 1,
  ):
    """Builds it; nothing is compiled yet.

    Args:
      work: what to train.
      weights: folder that `work.prepare` wrote.
      dtype: "float32" or "bfloat16".
      steps_per_dispatch: 0 takes what a run of kd_jax takes: 1 on a CPU, else
        an epoch.
      devices: over which the batch is spread.

    Raises:
      ValueError: if the dispatches do not divide the epoch.
    """
    self._work = work
    epoch = work_lib.steps_per_epoch(work)
    on_cpu = jax.default_backend() == "cpu"
    self.steps = steps_per_dispatch or (1 if on_cpu else epoch)
    if epoch % self.steps:
      raise ValueError(
        f"steps_per_dispatch: expected a divisor of the {epoch} steps of an"
        f" epoch, got {self.steps}"
      )
    source = work.source
    self._devices = devices_lib.make_devices(num_devices=devices)
    self._pipeline = data.create(
      "device", source, batch_size=work.batch, seed=work_lib.SEED
    )
    self._normalize = functools.partial(
      augment.normalize,
      mean=source.mean,
      std=source.std,
      dtype=jnp.dtype(dtype),
    )
    self._dtype = dtype
    variables = {
      role: pytorch.from_state_dict(
        name, work.classes, _state_dict(weights / work.network_file(role))
      )
      for role, name in work.networks.items()
    }
    method = work_lib.read(weights / work.method_file)
    distilled = traverse_util.unflatten_dict(
      {k: v for k, v in method.items() if not k.startswith("torch/")}, sep="/"
    )
    teacher_variables = tuple(
      variables[role] for role in ("teacher",) if role in variables
    )
    arguments = self._arguments(None)
    student_params, student_rest = state.split_params(variables["student"])
    params, rest = state.split_params(distilled)
    uses = optim.parameter_uses(
      loss_lib.make_loss_fn(axis_name=None, **arguments),
      {"student": student_params, "distiller": params},
      {"student": student_rest, "distiller": rest},
      teacher_variables,
      self._batch_shapes(),
      jax.ShapeDtypeStruct((), jnp.int32),
      step_lib.make_seeds(work_lib.SEED),
    )
    optimizer = optim.sgd(
      optim.learning_rate_schedule(
        work_lib.LEARNING_RATE,
        schedule="constant",
        epochs=1,
        steps_per_epoch=epoch,
      ),
      momentum=work_lib.MOMENTUM,
      weight_decay=work_lib.WEIGHT_DECAY,
      decay_mask=uses.reached,
    )
    place = self._devices.replicate
    self._state = place(
      state.create(variables["student"], distilled, optimizer)
    )
    frozen = [
      fold.freeze(network, v, source.image_shape)
      for network, v in zip(
        arguments["teachers"], teacher_variables, strict=True
      )
    ]
    self._constants = place(
      step_lib.Constants(tuple(frozen), step_lib.make_seeds(work_lib.SEED))
    )
    self._resident = place(self._pipeline.resident)
    self._alone = step_lib.make_train_step(optimizer=optimizer, **arguments)
    arguments = self._arguments(collectives.AXIS)
    step = step_lib.make_train_step(
      optimizer=optimizer,
      axis_name=collectives.AXIS,
      shared_statistics=True,
      **arguments,
    )
    chunk = step_lib.make_train_chunk(step, self._pipeline.load, uses.dtypes)
    self._chunk = self._devices.map_chunk(chunk, donate=True)
    self.host_seconds, self.dispatches = 0.0, 0

  def _arguments(self, axis_name: str | None) -> dict[str, Any]:
    work, dtype = self._work, jnp.dtype(self._dtype)
    teachers = ()
    if work.has_teacher:
      teachers = (models.create(work.teacher, work.classes, dtype=dtype),)
    distiller = distillers.create(
      work.method,
      axis_name=axis_name,
      sync=True,
      dtype=dtype,
      **work.settings,
    )
    views = {}
    if distiller.views > 1:
      views["strong_transform"] = self._strong_transform
    return {
      "student": models.create(
        work.student, work.classes, dtype=dtype, bn_axis_name=axis_name
      ),
      "teachers": teachers,
      "distiller": distiller,
      **views,
      "loss_weights": work.weights,
      "steps_per_epoch": self._pipeline.steps_per_epoch,
      "transform": self._transform,
    }

  def _transform(self, key, batch):
    images, index = batch["image"], batch["index"]
    return self._normalize(augment.augment(key, images, index, **self._crops))

  def _strong_transform(self, key, batch):
    images, index = batch["image"], batch["index"]
    fill = [round(255 * mean) for mean in self._work.source.mean]
    return self._normalize(
      augment.strong_view(key, images, index, fill=fill, **self._crops)
    )

  @property
  def _crops(self) -> dict[str, Any]:
    return {"pad": self._work.pad, "flip": self._work.flip}

  def _batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    size, side = self._work.batch, self._work.image_size
    struct = jax.ShapeDtypeStruct
    return {
      "image": struct((size, side, side, 3), jnp.uint8),
      "label": struct((size,), jnp.int32),
      "index": struct((size,), jnp.int32),
      "mask": struct((size,), jnp.bool_),
    }

  def run(self, steps: int) -> list[float]:
    """Takes steps, and waits for the last.

    Args:
      steps: a multiple of `self.steps`.

    Returns:
      The loss of each.
    """
    sums = []
    for _ in range(steps // self.steps):
      begin = time.perf_counter()
      chunk = self._devices.shard(self._pipeline.next_chunk(self.steps))
      self._state, found = self._chunk(
        self._state, self._constants, self._resident, chunk
      )
      self.host_seconds += time.perf_counter() - begin
      self.dispatches += 1
      sums.append(found)
    return [
      float(loss) / self._work.batch
      for found in jax.device_get(sums)
      for loss in found["loss"]
    ]

  def compiled_text(self) -> str:
    """The compiled program of a dispatch, as XLA writes it."""
    chunk = self._devices.shard(self._pipeline.next_chunk(self.steps))
    lowered = self._chunk.lower(
      self._state, self._constants, self._resident, chunk
    )
    return lowered.compile().as_text()

  def flops(self) -> float | None:
    """Of one step on all devices, by XLA's count of its program."""
    variables, seeds = self._constants
    lowered = jax.jit(self._alone).lower(
      self._state, variables, self._batch_shapes(), seeds
    )
    cost = lowered.cost_analysis()
    return float(cost["flops"]) if cost and "flops" in cost else None


class TeacherForward:
  """The frozen teacher alone, on the batches that a step would show it."""

  def __init__(
    self,
    work: work_lib.Work,
    weights: pathlib.Path,
    *,
    dtype: str = "float32",
    devices: int = 1,
  ):
    """Builds it; nothing is compiled yet. See `Program`."""
    network = models.create(work.teacher, work.classes, dtype=jnp.dtype(dtype))
    self.steps, self.host_seconds, self.dispatches = 1, 0.0, 0
    placed = devices_lib.make_devices(num_devices=devices)
    source = work.source
    variables = pytorch.from_state_dict(
      work.teacher,
      work.classes,
      _state_dict(weights / work.network_file("teacher")),
    )
    self._variables = placed.replicate(
      fold.freeze(network, variables, source.image_shape)
    )
    self._pipeline = data.create(
      "device", source, batch_size=work.batch, seed=work_lib.SEED
    )

    self._resident = placed.replicate(self._pipeline.resident)

    @jax.jit
    @functools.partial(
      jax.shard_map,
      mesh=placed.mesh,
      in_specs=(P(), P(), P(collectives.AXIS)),
      out_specs=P(collectives.AXIS),
    )
    def forward(variables, resident, index):
      batch = self._pipeline.load(resident, {"index": index})
      images = augment.normalize(
        batch["image"], source.mean, source.std, jnp.dtype(dtype)
      )
      (output,), _ = loss_lib.run_teachers((network,), (variables,), images)
      return output.logits, output.features["last"]

    self._forward = forward

  def run(self, steps: int) -> list[float]:
    """Runs it on so many batches, and waits for the last; no losses."""
    found = None
    for _ in range(steps):
      begin = time.perf_counter()
      index = self._pipeline.next_chunk(1)["index"][0]
      found = self._forward(self._variables, self._resident, index)
      self.host_seconds += time.perf_counter() - begin
      self.dispatches += 1
    jax.block_until_ready(found)
    return []

  def flops(self) -> None:
    """Not counted."""


def _state_dict(path: pathlib.Path) -> dict[str, Any]:
  return {k: v for k, v in work_lib.read(path).items() if k != "logits"}


def device() -> dict[str, Any]:
  """The devices' kind, and their peak memory in bytes where they count it."""
  first = jax.devices()[0]
  stats = first.memory_stats() or {}
  return {
    "device": first.device_kind,
    "platform": first.platform,
    "peak_bytes": stats.get("peak_bytes_in_use"),
  }
