"""The compiled functions of a run, kept for the next run of the process.

Runs that differ only in their seeds, such as the trials of a grid, share one
`Programs`: each function is compiled once.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax import distillers, models
from kd_jax.data import augment
from kd_jax.distillers import base
from kd_jax.distributed import collectives, devices
from kd_jax.interop import model
from kd_jax.training import eval_step, loss, optim
from kd_jax.training import state as state_lib
from kd_jax.training import step as step_lib

Items = tuple[tuple[str, Any], ...]
# Of the student and of the distiller.
Variables = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything that the compiled functions of a run depend on, hashable.

  Attributes:
    student: name of the network.
    teachers: frozen networks.
    teacher_weights: one a teacher.
    distiller: "name" and the fields of the method, as items.
    loss_weights: weight of each term, as items.
    ramp_steps: steps over which a term's weight grows, as items.
    label_smoothing: share of the target that goes to all classes alike.
    mixup: alpha, 0 for none.
    cutmix: alpha, 0 for none.
    crop_padding: pixels around an image before its random crop.
    flip: whether to mirror half of the images.
    mean: of the training images, per channel.
    std: likewise.
    image_shape: (height, width, channels).
    num_classes: of the data.
    train_labels: int32, as bytes.
    load: (resident data, one step's slice) -> batch.
    cached_teacher: whether the slice holds the teacher's logits.
    dtype: of the networks' arithmetic.
    sync: whether BatchNorm and the losses see the batch of all devices.
    batch_size: over all devices.
    accumulate_steps: parts of a batch.
    epochs: length of the run.
    steps_per_epoch: optimiser updates in an epoch.
    optim: `config.optim`, as items.
    devices: over which a batch is split.
  """

  student: str
  teachers: tuple[models.Classifier, ...]
  teacher_weights: tuple[float, ...]
  distiller: Items
  loss_weights: Items
  ramp_steps: Items
  label_smoothing: float
  mixup: float
  cutmix: float
  crop_padding: int
  flip: bool
  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_shape: tuple[int, ...]
  num_classes: int
  train_labels: bytes
  load: Callable[..., loss.Batch]
  cached_teacher: bool
  dtype: str
  sync: bool
  batch_size: int
  accumulate_steps: int
  epochs: int
  steps_per_epoch: int
  optim: Items
  devices: devices.Devices


@dataclasses.dataclass(frozen=True)
class Programs:
  """Compiled functions, and what they were made of.

  Attributes:
    distiller: of a replica.
    schedule: learning rate as a function of the step.
    teachers: shapes of the variables that `initialize` takes, of each teacher;
      "class_means" among them if the distiller needs them.
    initialize: (seed, teacher variables, initial) -> a fresh TrainState;
      `initial` are variables of the student and of the distiller that replace
      the random ones of the same names.
    shapes: of the state's arrays, whole.
    reached: which parameters some term of the loss reaches.
    specs: which arrays of the state are split over the devices.
    train_chunk: (state, `step.Constants`, resident data, chunk) -> (state, sums
      [k]); the state is donated.
    teacher_chunk: (step, `step.Constants`, resident data, chunk) -> the
      teacher's logits [k, B, C].
    eval_chunk: ({"student", "distiller"}, teacher variables, {}, chunk) ->
      sums.
  """

  distiller: distillers.Distiller
  schedule: optax.Schedule
  teachers: tuple[Any, ...]
  initialize: Callable[..., state_lib.TrainState]
  shapes: state_lib.TrainState
  reached: Any
  specs: state_lib.TrainState
  train_chunk: Callable[..., tuple[state_lib.TrainState, Any]]
  teacher_chunk: Callable[..., jax.Array]
  eval_chunk: Callable[..., Any]


@functools.lru_cache(maxsize=32)
def make_programs(recipe: Recipe) -> Programs:
  """Build the compiled functions; the first call of each compiles it.

  Raises:
    ValueError: for a mistake that shapes can show.
  """
  axis = collectives.AXIS
  student = models.create(
    recipe.student,
    recipe.num_classes,
    dtype=jnp.dtype(recipe.dtype),
    bn_axis_name=axis if recipe.sync else None,
  )
  distiller = _distiller(recipe, axis)
  parts = {
    "student": student,
    "teachers": recipe.teachers,
    "distiller": distiller,
  }
  # Collectives need a mapped axis: shapes are tried on one replica alone.
  alone = {
    "student": student.clone(bn_axis_name=None),
    "teachers": recipe.teachers,
    "distiller": _distiller(recipe, None),
  }

  def init_variables(seed: Any, teacher_variables: Any) -> Variables:
    return _initialize(recipe, seed, teacher_variables, **alone)

  # Run once: on a CPU, compiling it well takes five times as long.
  on_cpu = jax.default_backend() == "cpu"
  options = {"xla_backend_optimization_level": 0} if on_cpu else None
  compiled = jax.jit(init_variables, compiler_options=options)
  teachers = tuple(
    _teacher_shapes(recipe, network, distiller) for network in recipe.teachers
  )
  # With the real arguments' shardings, `compiled` is traced only once.
  replicated = NamedSharding(recipe.devices.mesh, P())
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    teachers,
  )
  shapes = compiled.eval_shape(np.uint32(0), placed)
  schedule, uses, optimizer = _optimizer(recipe, alone, shapes, teachers)

  def create(variables: Variables) -> state_lib.TrainState:
    return state_lib.create(variables[0], variables[1], optimizer)

  def initialize(
    seed: Any, teacher_variables: Any, initial: Variables = ({}, {})
  ) -> state_lib.TrainState:
    variables = compiled(seed, teacher_variables)
    student, distiller = map(_replaced, variables, initial)
    return create((student, distiller))

  shapes = jax.eval_shape(create, shapes)
  specs = state_lib.state_specs(shapes, distiller)
  if recipe.devices.mapping == "pmap":  # it has no other way
    specs = jax.tree.map(lambda _: P(), shapes)
  step = step_lib.make_train_step(
    optimizer=optimizer,
    axis_name=axis,
    accumulate_steps=recipe.accumulate_steps,
    split_ce=bool(dict(recipe.optim)["dot_delta"]),
    shared_statistics=recipe.sync,
    idle=optim.idle_parts(uses.reached),
    **_loss_arguments(recipe),
    **parts,
  )
  return Programs(
    distiller=distiller,
    schedule=schedule,
    teachers=teachers,
    initialize=initialize,
    shapes=shapes,
    reached=uses.reached,
    specs=specs,
    train_chunk=recipe.devices.map_chunk(
      step_lib.make_train_chunk(step, _load(recipe), uses.dtypes),
      donate=True,
      carry_specs=specs,
    ),
    teacher_chunk=recipe.devices.map_batches(
      step_lib.make_teacher_chunk(
        loss.make_precompute_teacher(
          teachers=recipe.teachers,
          transform=_loss_arguments(recipe)["transform"],
        ),
        recipe.load,
      )
    ),
    eval_chunk=_eval_chunk(recipe.devices, _normalizer(recipe), **parts),
  )


@functools.lru_cache(maxsize=32)
def network_eval_chunk(
  network: nn.Module,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: str,
  devices: devices.Devices,
) -> Callable[..., Any]:
  """Build `Programs.eval_chunk` of a network alone, such as a teacher."""
  normalize = functools.partial(
    augment.normalize, mean=mean, std=std, dtype=jnp.dtype(dtype)
  )
  return _eval_chunk(
    devices,
    normalize,
    student=network,
    teachers=(),
    distiller=distillers.create("none"),
  )


@functools.lru_cache(maxsize=32)
def class_sums_chunk(
  network: nn.Module,
  *,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  dtype: str,
  devices: devices.Devices,
) -> Callable[..., Any]:
  """Build the sum of a network's pooled features over each class's images.

  Returns:
    (variables, (), {}, chunk) -> "pooled" [K, C] and "images" [K].
  """

  def step(variables: Any, _: Any, batch: loss.Batch) -> dict[str, jax.Array]:
    images = augment.normalize(
      batch["image"], mean=mean, std=std, dtype=jnp.dtype(dtype)
    )
    outputs: Any = network.apply(variables, images, train=False)
    classes = jax.nn.one_hot(batch["label"], outputs.logits.shape[-1])
    # A padded row may hold anything, NaN included.
    mask = batch["mask"][:, None]
    classes = jnp.where(mask, classes, 0.0)
    pooled = jnp.where(mask, outputs.features["pooled"], 0.0)
    sums = {
      "pooled": jnp.matmul(classes.T, pooled, precision="highest"),
      "images": jnp.sum(classes, 0),
    }
    return collectives.axis_sum(sums, collectives.AXIS)

  return devices.map_chunk(eval_step.make_eval_chunk(step))


def _teacher_shapes(
  recipe: Recipe, network: Any, distiller: distillers.Distiller
) -> Any:
  """The variables that `Programs.initialize` takes of a teacher."""
  shapes = model.variable_shapes(network, recipe.image_shape)
  if not distiller.needs_class_means:
    return shapes
  image = jax.ShapeDtypeStruct((1, *recipe.image_shape), jnp.float32)
  outputs = jax.eval_shape(
    functools.partial(network.apply, train=False), shapes, image
  )
  means = jax.ShapeDtypeStruct(
    (recipe.num_classes, outputs.features["pooled"].shape[-1]), jnp.float32
  )
  return {**shapes, base.CLASS_MEANS: {"pooled": means}}


def _eval_chunk(
  devices: devices.Devices, normalize: Callable[..., jax.Array], **parts: Any
) -> Callable[..., Any]:
  step = eval_step.make_eval_step(
    transform=lambda _, batch: normalize(batch["image"]),
    axis_name=collectives.AXIS,
    **parts,
  )
  return devices.map_chunk(eval_step.make_eval_chunk(step))


def _distiller(recipe: Recipe, axis_name: str | None) -> distillers.Distiller:
  return distillers.create_for_teachers(
    weights=recipe.teacher_weights,
    axis_name=axis_name,
    sync=recipe.sync,
    dtype=jnp.dtype(recipe.dtype),
    label_smoothing=recipe.label_smoothing,
    **dict(recipe.distiller),
  )


def _normalizer(recipe: Recipe) -> Callable[..., jax.Array]:
  return functools.partial(
    augment.normalize,
    mean=recipe.mean,
    std=recipe.std,
    dtype=jnp.dtype(recipe.dtype),
  )


def _loss_arguments(recipe: Recipe) -> dict[str, Any]:
  """The arguments of `make_loss_fn` that are no networks."""
  normalize = _normalizer(recipe)

  crops: dict[str, Any] = {"pad": recipe.crop_padding, "flip": recipe.flip}
  mean_colour = [round(255 * mean) for mean in recipe.mean]

  def transform(key, batch):
    images, index = batch["image"], batch["index"]
    return normalize(augment.augment(key, images, index, **crops))

  def strong_transform(key, batch):
    images, index = batch["image"], batch["index"]
    return normalize(
      augment.strong_view(key, images, index, fill=mean_colour, **crops)
    )

  views = _distiller(recipe, None).views
  mixing = {"mixup": recipe.mixup, "cutmix": recipe.cutmix}
  return {
    "loss_weights": dict(recipe.loss_weights),
    "ramp_steps": dict(recipe.ramp_steps),
    "steps_per_epoch": recipe.steps_per_epoch,
    "transform": transform,
    **({"strong_transform": strong_transform} if views > 1 else {}),
    "mixing": mixing if any(mixing.values()) else None,
  }


def _load(recipe: Recipe) -> Callable[..., loss.Batch]:
  """The pipeline's `load`, which hands a cached teacher's logits through."""
  if not recipe.cached_teacher:
    return recipe.load
  return lambda resident, x: {
    **recipe.load(resident, x["batch"]),
    "cached_logits": x["cached_logits"],
  }


def _local_batch_size(recipe: Recipe) -> int:
  """Images that a network sees at once."""
  size = recipe.batch_size // recipe.accumulate_steps
  return size if recipe.sync else size // recipe.devices.mesh.devices.size


def _initialize(
  recipe: Recipe,
  seed: Any,
  teacher_variables: Any,
  *,
  student: Any,
  teachers: Any,
  distiller: Any,
) -> Variables:
  """Variables of the student and of the distiller, from one seed."""
  keys = jax.random.split(jax.random.key(seed), 3)
  student_key, distiller_key, memory_key = keys
  size = _local_batch_size(recipe)
  batch = {
    "image": jnp.zeros((size, *recipe.image_shape), jnp.uint8),
    "label": jnp.zeros(size, jnp.int32),
    "index": jnp.arange(size, dtype=jnp.int32),
    "mask": jnp.ones(size, bool),
    # Only here: the number of rows of a memory, and each row's class.
    "train_labels": jnp.asarray(np.frombuffer(recipe.train_labels, np.int32)),
  }
  images = _normalizer(recipe)(batch["image"])
  variables = student.init(student_key, images, train=False)
  distiller_variables = loss.init_distiller(
    distiller,
    {"params": distiller_key, "distiller": memory_key},
    student=student,
    student_variables=variables,
    teachers=teachers,
    teacher_variables=teacher_variables,
    images=images,
    batch=batch,
  )
  return variables, distiller_variables


def _replaced(variables: Any, by: Any) -> Any:
  """Nested variables, some of them replaced."""
  if not by:
    return variables
  flat = traverse_util.flatten_dict(variables) | traverse_util.flatten_dict(by)
  return traverse_util.unflatten_dict(flat)


def _optimizer(
  recipe: Recipe, parts: Any, variables: Variables, teachers: Any
) -> tuple[optax.Schedule, optim.ParameterUses, optax.GradientTransformation]:
  """The schedule, what the loss does with its parameters, the optimiser."""
  student_params, student_rest = state_lib.split_params(variables[0])
  distiller_params, distiller_rest = state_lib.split_params(variables[1])
  size, struct = _local_batch_size(recipe), jax.ShapeDtypeStruct

  def uses_by(weights: dict[str, float]) -> optim.ParameterUses:
    arguments = {**_loss_arguments(recipe), "loss_weights": weights, **parts}
    return optim.parameter_uses(
      loss.make_loss_fn(axis_name=None, **arguments),
      {"student": student_params, "distiller": distiller_params},
      {"student": student_rest, "distiller": distiller_rest},
      teachers,
      {
        "image": struct((size, *recipe.image_shape), jnp.uint8),
        "label": struct((size,), jnp.int32),
        "index": struct((size,), jnp.int32),
        "mask": struct((size,), jnp.bool_),
      },
      struct((), jnp.int32),
      struct((2,), jnp.uint32),
    )

  weights, settings = dict(recipe.loss_weights), dict(recipe.optim)
  schedule = optim.learning_rate_schedule(
    optim.scaled_learning_rate(
      settings["learning_rate"],
      batch_size=recipe.batch_size,
      reference_batch_size=settings["reference_batch_size"],
    ),
    epochs=recipe.epochs,
    steps_per_epoch=recipe.steps_per_epoch,
    **{
      name: settings[name]
      for name in ("schedule", "milestones", "decay_rate", "warmup_epochs")
    },
  )
  options = {
    name: settings[name]
    for name in ("momentum", "nesterov", "weight_decay", "gradient_clip")
  }
  uses = uses_by(weights)
  options["decay_mask"] = uses.reached
  if delta := settings["dot_delta"]:
    ce = {"ce": weights.pop("ce")}
    shared = jax.tree.map(
      operator.and_, uses_by(ce).reached, uses_by(weights).reached
    )
    dot = optim.dot(schedule, delta=delta, shared=shared, **options)
    return schedule, uses, dot
  return schedule, uses, optim.sgd(schedule, **options)
