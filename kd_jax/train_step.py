"""The train step and the evaluation step: one of each for every method."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from kd_jax import metrics, parallel
from kd_jax.data import augment
from kd_jax.distillers import base
from kd_jax.state import TrainState

Batch = dict[str, jax.Array]
Transform = Callable[[jax.Array, Batch], jax.Array]

# Pixels that a frozen teacher is shown at once: 1,024 images of 32x32, with
# which a GPU is busy.
_SHOWN_PIXELS = 1024 * 32 * 32


@dataclasses.dataclass(frozen=True)
class Step:
  """A train step: `step(state, teacher_variables, batch) -> (state, sums)`.

  Attributes:
    learn: the same, of a batch as it comes or as `look` has shown it.
    look: (teacher_variables, batch, number of the step) -> the batch with what
      needs no student, the images ("shown") and the teacher's output
      ("taught"); None if they are not to be had before the step.
  """

  learn: Callable[[TrainState, Any, Batch], tuple[TrainState, dict]]
  look: Callable[[Any, Batch, jax.Array], Batch] | None = None

  def __call__(
    self, state: TrainState, teacher_variables: Any, batch: Batch
  ) -> tuple[TrainState, dict]:
    """Takes the step."""
    return self.learn(state, teacher_variables, batch)


def run_teacher(teacher: Any, variables: Any, images: jax.Array) -> Any:
  """The frozen teacher: its output, and its classifier as a function.

  Args:
    teacher: the model, None where there is none, or a tuple of several.
    variables: its variables, or a tuple of each one's.
    images: [B, H, W, C] float.

  Returns:
    (output in evaluation mode, cut from the gradient; pooled -> logits), or
    a tuple of all outputs and one of all classifiers.
  """
  if teacher is None:
    return None, None
  if isinstance(teacher, tuple):
    runs = zip(teacher, variables, strict=True)
    return tuple(zip(*[run_teacher(t, v, images) for t, v in runs]))
  output = teacher.apply(variables, images, train=False)
  return jax.lax.stop_gradient(output), _classifiers(teacher, variables)


def make_look(
  *,
  teacher: Any,
  transform: Transform,
  mixing: Mapping[str, float] | None = None,
  seed: int | Sequence[int],
  data_seed: int | None = None,
) -> Callable[[Any, Batch, jax.Array], Batch]:
  """Builds `Step.look`; see `make_train_step` for the arguments."""
  shown_seed = data_seed
  if shown_seed is None:
    shown_seed = seed if isinstance(seed, int) else seed[0]

  def show(batch, step):
    augment_key, _, _ = _keys(shown_seed, step)
    images = transform(augment_key, batch)
    if mixing:
      (mix_key,) = jax.random.split(augment_key, 1)
      images, share = augment.mix(mix_key, images, **mixing)
      neighbours = augment.partner(batch["label"])
      batch = {**batch, "share": share, "mixed_label": neighbours}
    return {**batch, "shown": images}

  def look(teacher_variables, batch, step):
    """Of several steps at once, if `step` is [k] and all leaves [k, B, ...]."""
    several = jnp.ndim(step) > 0
    batch = (jax.vmap(show) if several else show)(batch, step)
    images = batch["shown"]
    if several:
      images = images.reshape(-1, *images.shape[2:])
    taught, _ = run_teacher(teacher, teacher_variables, images)
    if several:
      shape = batch["shown"].shape[:2]
      taught = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), taught)
    return {**batch, "taught": taught}

  return look


def _after_teachers(images: jax.Array, outputs: Sequence[Any]) -> jax.Array:
  """The images, on a CPU not to be had before the teachers have seen them.

  XLA runs a CPU's operations as soon as their inputs are there. A student's
  BatchNorm that waits for the other devices holds one of the few threads, which
  those devices' teachers then lack. `jax.lax.optimization_barrier` does not
  help, since XLA drops it before it puts the operations in order; a term of
  zero does, which XLA has to compute because it might be NaN.

  Args:
    images: [B, H, W, C] float.
    outputs: of each teacher.

  Returns:
    The same images.
  """

  def waiting(images, *pooled):
    zeros = [0 * p.ravel()[0].astype(images.dtype) for p in pooled]
    return images + sum(zeros)

  pooled = [output.features["pooled"] for output in outputs]
  return jax.lax.platform_dependent(
    images, *pooled, cpu=waiting, default=lambda images, *pooled: images
  )


def _keys(seed, step):
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.random.split(key, 3)


def _classifiers(teacher: Any, variables: Any) -> Any:
  """pooled -> logits, of a teacher, or a tuple of several teachers'."""
  if teacher is None:
    return None
  if isinstance(teacher, tuple):
    return tuple(map(_classifiers, teacher, variables))
  return functools.partial(teacher.classify, variables["params"])


def make_loss_fn(
  *,
  student: nn.Module,
  teacher: Any,
  distiller: base.Distiller,
  loss_weights: Mapping[str, float],
  ramp_steps: Mapping[str, int],
  transform: Transform,
  mixing: Mapping[str, float] | None = None,
  seed: int | Sequence[int],
  data_seed: int | None = None,
  axis_name: str | None,
) -> Callable[..., tuple[jax.Array, Any]]:
  """Builds `loss(params, collections, teacher_variables, batch, step)`.

  See `make_train_step` for the arguments.

  Returns:
    The function; it returns (total loss, (new collections, sums)), both of
    this replica's batch. Of several trials, the total is the sum of theirs,
    whose gradient for each one's parameters is that of its own.
  """
  several = not isinstance(seed, int)
  seeds = (seed,) if isinstance(seed, int) else tuple(seed)
  look = make_look(
    teacher=teacher,
    transform=transform,
    mixing=mixing,
    seed=seed,
    data_seed=data_seed,
  )

  def loss_fn(params, collections, teacher_variables, batch, step):
    if "taught" not in batch:
      batch = look(teacher_variables, batch, step)
      if teacher is not None and parallel.axis_size(axis_name) > 1:
        taught = batch["taught"]
        outputs = taught if isinstance(teacher, tuple) else (taught,)
        batch["shown"] = _after_teachers(batch["shown"], outputs)
    batch = dict(batch)
    images = batch.pop("shown")
    taught = batch.pop("taught"), _classifiers(teacher, teacher_variables)
    if not several:
      return trial_loss(
        seeds[0], params, collections, taught, images, batch, step
      )
    totals, rest = zip(
      *[
        trial_loss(*trial, taught, images, batch, step)
        for trial in zip(seeds, params, collections, strict=True)
      ]
    )
    collections, sums = zip(*rest)
    sums = jax.tree.map(lambda *values: jnp.stack(values), *sums)
    return sum(totals), (collections, sums)

  def trial_loss(seed, params, collections, taught, images, batch, step):
    teacher_output, classify = taught
    _, example_key, replica_key = _keys(seed, step)
    replica_key = jax.random.fold_in(
      replica_key, parallel.axis_index(axis_name)
    )
    student_output, student_updates = student.apply(
      {"params": params["student"], **collections["student"]},
      images,
      train=True,
      mutable=list(collections["student"]),
      rngs={"dropout": replica_key},
    )
    output, distiller_updates = distiller.apply(
      {"params": params["distiller"], **collections["distiller"]},
      student_output,
      teacher_output,
      batch,
      teacher_classifier=classify,
      step=step,
      train=True,
      mutable=list(collections["distiller"]),
      rngs={"distiller": example_key},
    )
    losses = {
      # With a ramp of W steps, a term's weight grows to 1 over W steps.
      name: value * jnp.minimum((step + 1) / ramp_steps[name], 1.0)
      if name in ramp_steps
      else value
      for name, value in output.losses.items()
    }
    total = base.weighted_sum(losses, loss_weights)
    count = jnp.asarray(batch["label"].shape[0], jnp.float32)
    correct = metrics.topk_correct(output.logits, batch["label"], 1)
    sums = {"loss": total * count, "top1": jnp.sum(correct)}
    for name, weight in loss_weights.items():
      if weight:
        sums[name] = jnp.mean(output.losses[name]) * count
    collections = {
      "student": {**collections["student"], **student_updates},
      "distiller": {**collections["distiller"], **distiller_updates},
    }
    return total, (collections, sums)

  return loss_fn


def make_train_step(
  *,
  optimizer: optax.GradientTransformation,
  axis_name: str | None = None,
  accumulate_steps: int = 1,
  **loss_arguments: Any,
) -> Step:
  """Builds the train step of one replica.

  Args:
    optimizer: made by `optim.sgd`.
    axis_name: the mapped axis that holds the other replicas, or None.
    accumulate_steps: parts into which the batch is cut; the gradient is the
      mean over them, BatchNorm and batch-relational losses see one at a time.
    **loss_arguments: of `make_loss_fn`:
      student, teacher: models; the teacher as `run_teacher` takes it.
      distiller: the method.
      loss_weights: term -> weight; a term of weight 0 is not computed.
      ramp_steps: term -> steps over which its weight grows to full size.
      transform: (key, batch) -> images [B, H, W, C] as the models want them.
      mixing: None, or `augment.mix`'s mixup and cutmix.
      seed: of all randomness, which is derived from it and the step alone. A
        sequence trains as many trials at once, on the same images; they share
        the teacher's forward pass.
      data_seed: of augmentation and mixing; None: `seed`, or the first.

  Returns:
    The step; for several trials its state is one of `state.join`, its optimiser
    of `optim.for_each`, and its sums but "count" are [trials].
  """
  loss_fn = make_loss_fn(axis_name=axis_name, **loss_arguments)
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

  def gradients(state, teacher_variables, batch):
    if accumulate_steps == 1:
      (_, aux), grads = value_and_grad(
        state.params, state.collections, teacher_variables, batch, state.step
      )
      return grads, *aux

    def part(carry, piece):
      total, collections = carry
      (_, (collections, sums)), grads = value_and_grad(
        state.params, collections, teacher_variables, piece, state.step
      )
      total = jax.tree.map(jnp.add, total, grads)
      return (total, collections), sums

    # Every n-th row, so that the parts hold the same examples on however many
    # devices the batch is spread.
    pieces = jax.tree.map(
      lambda x: x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1),
      batch,
    )
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, collections), sums = jax.lax.scan(
      part, (zeros, state.collections), pieces
    )
    grads = jax.tree.map(lambda g: g / accumulate_steps, grads)
    return grads, collections, jax.tree.map(lambda s: jnp.sum(s, 0), sums)

  def train_step(state, teacher_variables, batch):
    grads, collections, sums = gradients(state, teacher_variables, batch)
    grads = parallel.axis_mean(grads, axis_name)
    # Shared statistics are equal already; local ones are averaged, so that
    # the state is the same on every device.
    collections = _average_statistics(collections, axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      collections=collections,
      opt_state=opt_state,
    )
    count = jnp.asarray(batch["label"].shape[0], jnp.float32)
    return state, metrics.global_sums(sums, count, axis_name)

  if accumulate_steps > 1:
    return Step(train_step)
  names = ("teacher", "transform", "mixing", "seed", "data_seed")
  look = {n: loss_arguments[n] for n in names if n in loss_arguments}
  return Step(train_step, make_look(**look))


def _average_statistics(collections, axis_name):
  if isinstance(collections, tuple):  # of several trials
    return tuple(_average_statistics(each, axis_name) for each in collections)
  return {
    module: {
      name: parallel.axis_mean(value, axis_name)
      if name == "batch_stats"
      else value
      for name, value in parts.items()
    }
    for module, parts in collections.items()
  }


def make_eval_step(
  *,
  student: nn.Module,
  teacher: Any,
  distiller: base.Distiller,
  transform: Transform,
  axis_name: str | None = None,
) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
  """Builds the evaluation step of one replica.

  Args:
    student: the model.
    teacher: as `run_teacher` takes it.
    distiller: the method, whose logits are the prediction.
    transform: (unused key, batch) -> images.
    axis_name: the mapped axis, or None.

  Returns:
    `eval_step(variables, teacher_variables, batch) -> sums`, where variables
    are `{"student": ..., "distiller": ...}` and the sums are of cross-entropy
    in nats ("ce"), hits ("top1", "top5") and real examples ("count").
  """

  def eval_step(variables, teacher_variables, batch):
    images = transform(jax.random.key(0), batch)
    teacher_output, classify = run_teacher(teacher, teacher_variables, images)
    student_output = student.apply(variables["student"], images, train=False)
    output: Any = distiller.apply(
      variables["distiller"],
      student_output,
      teacher_output,
      batch,
      teacher_classifier=classify,
      step=jnp.zeros((), jnp.int32),
      train=False,
    )
    return prediction_sums(
      output.logits, batch["label"], batch["mask"], axis_name
    )

  return eval_step


def prediction_sums(
  logits: jax.Array,
  labels: jax.Array,
  mask: jax.Array,
  axis_name: str | None = None,
) -> dict[str, jax.Array]:
  """Sums of cross-entropy and hits over the real examples of a batch.

  Args:
    logits: [B, C].
    labels: [B] int.
    mask: [B] bool, true for a real example.
    axis_name: the mapped axis to add over, or None.

  Returns:
    Float32 scalars "ce" (nats), "top1", "top5" and "count".
  """
  logits = logits.astype(jnp.float32)
  ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  values = {
    "ce": ce,
    "top1": metrics.topk_correct(logits, labels, 1),
    "top5": metrics.topk_correct(logits, labels, 5),
  }
  # where, not a product: a padded row may hold anything, NaN included.
  sums = {k: jnp.sum(jnp.where(mask, v, 0.0)) for k, v in values.items()}
  return metrics.global_sums(sums, jnp.sum(mask.astype(jnp.float32)), axis_name)


def make_train_chunk(
  step: Step, load: Callable[..., Batch]
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Wraps a step to take k steps in one dispatch.

  The teacher does not change, so that it need not wait for the student: it is
  shown the batches of several steps at once, as many as divide k and have not
  too many pixels together. A batch of 64 small images would leave most of a
  large GPU idle.

  Args:
    step: made by `make_train_step`.
    load: (resident data, one step's slice) -> batch, of the pipeline.

  Returns:
    `train_chunk(state, teacher_variables, resident, xs) -> (state, sums [k])`
    for `xs` with leaves [k, B, ...].
  """

  def train_chunk(state, teacher_variables, resident, xs):
    def body(state, x):
      return step(state, teacher_variables, load(resident, x))

    def several(look, state, group):
      batches = jax.vmap(load, (None, 0))(resident, group)
      numbers = state.step + jnp.arange(_length(group))
      return jax.lax.scan(
        lambda state, batch: step(state, teacher_variables, batch),
        state,
        look(teacher_variables, batches, numbers),
      )

    if _length(xs) == 1:  # XLA's CPU convolutions are slower in a loop
      state, sums = body(state, _first(xs))
      return state, jax.tree.map(lambda s: s[None], sums)
    together = 1
    if step.look is not None and jax.tree.leaves(teacher_variables):
      shape = jax.eval_shape(load, resident, _first(xs))["image"].shape
      together = steps_together(_length(xs), shape)
    if together == 1:
      return jax.lax.scan(body, state, xs)
    groups = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), xs)
    state, sums = jax.lax.scan(
      functools.partial(several, step.look), state, groups
    )
    return state, jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), sums)

  return train_chunk


def steps_together(steps: int, shape: Sequence[int]) -> int:
  """Of how many steps a teacher is shown the batches at once.

  Args:
    steps: of a dispatch.
    shape: of a step's images, [B, H, W, C].

  Returns:
    A divisor of `steps`.
  """
  most = min(max(_SHOWN_PIXELS // math.prod(shape[:3]), 1), steps)
  return max(n for n in range(1, most + 1) if steps % n == 0)


def make_eval_chunk(
  step: Callable[..., dict[str, jax.Array]],
) -> Callable[..., dict[str, jax.Array]]:
  """Wraps an evaluation step to add up k batches in one dispatch.

  Args:
    step: made by `make_eval_step`.

  Returns:
    `eval_chunk(variables, teacher_variables, resident, xs) -> sums` for `xs`
    with leaves [k, B, ...]; `resident` is not used.
  """

  def eval_chunk(variables, teacher_variables, resident, xs):
    del resident
    if _length(xs) == 1:
      return step(variables, teacher_variables, _first(xs))
    _, sums = jax.lax.scan(
      lambda carry, x: (carry, step(variables, teacher_variables, x)), 0, xs
    )
    return jax.tree.map(lambda s: jnp.sum(s, 0), sums)

  return eval_chunk


def _length(xs) -> int:
  return jax.tree.leaves(xs)[0].shape[0]


def _first(xs):
  return jax.tree.map(lambda x: x[0], xs)


def reached_parameters(
  loss_fn: Callable[..., Any], params: Any, *arguments: Any
) -> Any:
  """Finds the parameters that some term of the loss reaches.

  SimKD's student keeps a classifier that no term reads. Weight decay would
  shrink it to nothing, and with it whatever else an export or a later stage
  may want; so decay leaves out what has no gradient by construction.

  Args:
    loss_fn: made by `make_loss_fn`, with `axis_name=None`.
    params: its first argument, arrays or `jax.ShapeDtypeStruct`s.
    *arguments: the others.

  Returns:
    A pytree of bools like `params`: whether the gradient depends on anything.
  """
  grad = jax.grad(loss_fn, has_aux=True)
  jaxpr = jax.make_jaxpr(lambda *a: grad(*a)[0])(params, *arguments).jaxpr
  # A gradient that is zero by construction is made of constants alone.
  depends = set(jaxpr.invars)
  for equation in jaxpr.eqns:
    if any(v in depends for v in equation.invars if not _is_literal(v)):
      depends.update(equation.outvars)
  flags = [not _is_literal(v) and v in depends for v in jaxpr.outvars]
  return jax.tree.unflatten(jax.tree.structure(params), flags)


def _is_literal(variable) -> bool:
  return hasattr(variable, "val")
