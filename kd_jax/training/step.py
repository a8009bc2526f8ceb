"""The train step: one for every method and any number of devices."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax.distributed import collectives
from kd_jax.training import loss, metrics
from kd_jax.training.state import TrainState

Sums = dict[str, jax.Array]
# Pixels that a teacher sees at once: 1,024 images of 32x32 keep a GPU busy.
_TEACHER_PIXELS = 1024 * 32 * 32


class Constants(NamedTuple):
  """What a dispatch reads and no step changes.

  Attributes:
    teacher_variables: of each teacher, a tuple.
    seeds: from `make_seeds`.
  """

  teacher_variables: Any
  seeds: Any


def make_seeds(seed: int, data_seed: int | None = None) -> np.ndarray:
  """The step's seeds, uint32 [2]: of the run, and of the data.

  Args:
    seed: of dropout and of what a distiller draws.
    data_seed: of augmentation and mixing; None: `seed`.

  Raises:
    ValueError: if a seed is not in 0..2**32-1.
  """
  seeds = (seed, seed if data_seed is None else data_seed)
  if not all(0 <= value < 2**32 for value in seeds):
    raise ValueError(f"expected seeds in 0..{2**32 - 1}, got {seeds}")
  return np.array(seeds, np.uint32)


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """`step(state, teacher_variables, batch, seeds, copies) -> (state, sums)`.

  `copies` are parameters in the dtype in which the networks read them (see
  `optim.ParameterUses`), and None where that is their own. Without any, the
  networks cast them.

  Attributes:
    student_step: the whole step; skips the part that `precompute_teacher` has
      done for the batch.
    precompute_teacher: `(teacher_variables, batch, step, seeds) -> batch` with
      augmented images and teacher outputs, of one step or of several; None if
      the batch is cut into parts, which are augmented and mixed by themselves.
  """

  student_step: Callable[..., tuple[TrainState, Sums]]
  precompute_teacher: loss.PrecomputeTeacher | None = None

  def __call__(
    self,
    state: TrainState,
    teacher_variables: Any,
    batch: loss.Batch,
    seeds: Any,
    copies: Any = None,
  ) -> tuple[TrainState, Sums]:
    """Takes the step."""
    return self.student_step(state, teacher_variables, batch, seeds, copies)


def make_train_step(
  *,
  optimizer: optax.GradientTransformation,
  axis_name: str | None = None,
  accumulate_steps: int = 1,
  split_ce: bool = False,
  shared_statistics: bool = False,
  **loss_arguments: Any,
) -> TrainStep:
  """Builds the train step of one replica.

  All randomness is derived from the seeds and the number of the step, and is
  the same on any number of devices, with one exception: dropout of a student
  that does not share its batch statistics is each device's own. Dropout and
  the distiller's draws differ between the parts of an accumulated batch.

  Args:
    optimizer: for example `optim.sgd`.
    axis_name: the mapped axis that holds the other replicas, or None.
    accumulate_steps: parts into which the batch is cut; the gradient is the
      mean over them, BatchNorm and batch-relational losses see one at a time.
    split_ce: whether the optimiser takes a pair of gradients, as `optim.dot`
      does: of the term "ce", and of all others. That is one forward pass and
      two backward passes.
    shared_statistics: whether every BatchNorm sees the batch of all replicas.
      Its running statistics are then equal on each of them; else the step
      averages them.
    **loss_arguments: of `loss.make_loss_fn`:
      student: the model.
      teachers: frozen networks, none, one or several.
      distiller: the method.
      loss_weights: term -> weight; a term of weight 0 is not computed.
      steps_per_epoch: for the number of the epoch.
      transform: (key, batch) -> images [B, H, W, C] as the networks take them.
      strong_transform: likewise, for the second view of a method that asks for
        one (`Distiller.views`). The student sees the views one after the other,
        each by itself in BatchNorm.
      ramp_steps: term -> steps over which its weight grows to full size.
      mixing: None, or `augment.mix`'s mixup and cutmix.
      idle: "student" or "distiller", if no term trains it: its running
        statistics stay as they are.

  Returns:
    The step; its sums are of "loss", "top1" and each term that has a weight,
    over the examples of all replicas, whose number is "count".
  """
  loss_fn = loss.make_loss_fn(
    axis_name=axis_name, split_ce=split_ce, **loss_arguments
  )
  value_and_grad = (
    _value_and_grads_of_pair(loss_fn)
    if split_ce
    else jax.value_and_grad(loss_fn, has_aux=True)
  )

  def gradients(
    state: TrainState,
    params: Any,
    teacher_variables: Any,
    batch: loss.Batch,
    seeds: Any,
  ) -> tuple[Any, Any, Sums]:
    like = (state.params, state.params) if split_ce else state.params
    if accumulate_steps == 1:
      (_, (collections, sums)), grads = value_and_grad(
        *(params, state.collections, teacher_variables),
        *(batch, state.step, seeds),
      )
      grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, like)
      return grads, collections, sums

    def add_part(carry: Any, part: Any) -> tuple[Any, Sums]:
      total, collections = carry
      (_, (collections, sums)), grads = value_and_grad(
        *(params, collections, teacher_variables),
        *(part[1], state.step, seeds, part[0]),
      )
      return (jax.tree.map(jnp.add, total, grads), collections), sums

    # Every n-th row, so that the parts hold the same examples on however many
    # devices the batch is spread.
    parts = jax.tree.map(
      lambda x: x.reshape(-1, accumulate_steps, *x.shape[1:]).swapaxes(0, 1),
      batch,
    )
    zeros = jax.tree.map(jnp.zeros_like, like)
    (grads, collections), sums = jax.lax.scan(
      add_part,
      (zeros, state.collections),
      (jnp.arange(accumulate_steps), parts),
    )
    grads = jax.tree.map(lambda g: g / accumulate_steps, grads)
    return grads, collections, jax.tree.map(lambda s: jnp.sum(s, 0), sums)

  def student_step(
    state: TrainState,
    teacher_variables: Any,
    batch: loss.Batch,
    seeds: Any,
    copies: Any = None,
  ) -> tuple[TrainState, Sums]:
    seeds = jnp.asarray(seeds)
    params = state.params
    if copies is not None:
      params = jax.tree.map(
        lambda copied, p: p if copied is None else copied,
        *(copies, params),
        is_leaf=lambda x: x is None,
      )
    grads, collections, sums = gradients(
      state, params, teacher_variables, batch, seeds
    )
    grads = collectives.axis_mean_of_gradients(grads, axis_name)
    if not shared_statistics:
      collections = {
        module: {
          name: collectives.axis_mean(value, axis_name)
          if name == "batch_stats"
          else value
          for name, value in parts.items()
        }
        for module, parts in collections.items()
      }
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
    return TrainStep(student_step)
  names = ("teachers", "transform", "strong_transform", "mixing")
  arguments = {n: loss_arguments[n] for n in names if n in loss_arguments}
  return TrainStep(student_step, loss.make_precompute_teacher(**arguments))


def _value_and_grads_of_pair(
  loss_fn: Callable[..., Any],
) -> Callable[..., Any]:
  """`jax.value_and_grad` with `has_aux` of a loss that is a pair."""

  def value_and_grads(params: Any, *arguments: Any) -> tuple[Any, Any]:
    totals, pull_back, aux = jax.vjp(
      lambda params: loss_fn(params, *arguments), params, has_aux=True
    )
    one, zero = jnp.ones_like(totals[0]), jnp.zeros_like(totals[0])
    (first,), (second,) = pull_back((one, zero)), pull_back((zero, one))
    return (totals, aux), (first, second)

  return value_and_grads


def make_train_chunk(
  step: TrainStep, load: Callable[..., loss.Batch], dtypes: Any = None
) -> Callable[..., tuple[TrainState, Sums]]:
  """Wraps a step to take k steps in one dispatch.

  A teacher need not wait for the student: it sees the batches of several steps
  at once, since a batch of 64 small images would leave most of a large GPU
  idle.

  Args:
    step: made by `make_train_step`.
    load: (resident data, one step's slice) -> batch, of the pipeline.
    dtypes: of the parameters as the networks read them, a pytree like them (see
      `optim.ParameterUses`). The copies are then made with the update, and not
      again by every step's networks.

  Returns:
    `train_chunk(state, constants, resident, xs) -> (state, sums [k])` for `xs`
    with leaves [k, B, ...] and `constants` of type `Constants`.
  """

  def train_chunk(
    state: TrainState, constants: Any, resident: Any, xs: Any
  ) -> tuple[TrainState, Sums]:
    teacher_variables, seeds = constants
    seeds = jnp.asarray(seeds)
    steps = jax.tree.leaves(xs)[0].shape[0]

    def copy(params: Any) -> Any:
      if dtypes is None:
        return None
      return jax.tree.map(
        lambda p, dtype: None if p.dtype == dtype else p.astype(dtype),
        *(params, dtypes),
      )

    def take_step(carry: Any, batch: Any) -> tuple[Any, Sums]:
      state, copies = carry
      state, sums = step(state, teacher_variables, batch, seeds, copies)
      return (state, copy(state.params)), sums

    first = jax.tree.map(lambda x: x[0], xs)
    if steps == 1:  # XLA's CPU convolutions are slower in a loop
      batch = load(resident, first)
      state, sums = step(state, teacher_variables, batch, seeds)
      return state, jax.tree.map(lambda s: s[None], sums)
    carry = state, copy(state.params)
    at_once = 1
    precompute_teacher = step.precompute_teacher
    if precompute_teacher is not None and jax.tree.leaves(teacher_variables):
      shape = jax.eval_shape(load, resident, first)["image"].shape
      at_once = precomputed_steps(steps, shape)
    if precompute_teacher is None or at_once == 1:
      (state, _), sums = jax.lax.scan(
        lambda carry, x: take_step(carry, load(resident, x)), carry, xs
      )
      return state, sums

    def take_steps(carry: Any, group: Any) -> tuple[Any, Sums]:
      batches = jax.vmap(load, (None, 0))(resident, group)
      numbers = carry[0].step + jnp.arange(at_once)
      return jax.lax.scan(
        take_step,
        carry,
        precompute_teacher(teacher_variables, batches, numbers, seeds),
      )

    groups = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), xs)
    (state, _), sums = jax.lax.scan(take_steps, carry, groups)
    return state, jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), sums)

  return train_chunk


def make_teacher_chunk(
  precompute_teacher: loss.PrecomputeTeacher, load: Callable[..., loss.Batch]
) -> Callable[..., jax.Array]:
  """Wraps the teacher's part of k steps: what a cache keeps of them.

  Args:
    precompute_teacher: of one teacher.
    load: see `make_train_chunk`.

  Returns:
    `teacher_chunk(first step, constants, resident, xs) -> logits [k, B, C]` of
    the images that the steps from `first step` on will see.
  """

  def teacher_chunk(
    first: jax.Array, constants: Any, resident: Any, xs: Any
  ) -> jax.Array:
    teacher_variables, seeds = constants
    batches = jax.vmap(load, (None, 0))(resident, xs)
    numbers = first + jnp.arange(jax.tree.leaves(xs)[0].shape[0])
    batches = precompute_teacher(
      teacher_variables, batches, numbers, jnp.asarray(seeds)
    )
    (output,) = batches["teacher_outputs"]
    logits: jax.Array = output.logits
    return logits

  return teacher_chunk


def precomputed_steps(steps: int, shape: Sequence[int]) -> int:
  """The number of steps whose batches a teacher sees at once.

  Args:
    steps: of a dispatch.
    shape: of a step's images, [B, H, W, C].

  Returns:
    A divisor of `steps`.
  """
  most = min(max(_TEACHER_PIXELS // math.prod(shape[:3]), 1), steps)
  return max(n for n in range(1, most + 1) if steps % n == 0)
