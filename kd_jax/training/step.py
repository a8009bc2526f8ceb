"""The train step and the evaluation step: one of each for every method."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.distributed import collectives
from kd_jax.training import loss, metrics
from kd_jax.training.state import TrainState

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

  learn: Callable[[TrainState, Any, loss.Batch], tuple[TrainState, dict]]
  look: Callable[[Any, loss.Batch, jax.Array], loss.Batch] | None = None

  def __call__(
    self, state: TrainState, teacher_variables: Any, batch: loss.Batch
  ) -> tuple[TrainState, dict]:
    """Takes the step."""
    return self.learn(state, teacher_variables, batch)


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
      student: the model.
      teachers: frozen networks, none, one or several.
      distiller: the method.
      loss_weights: term -> weight; a term of weight 0 is not computed.
      ramp_steps: term -> steps over which its weight grows to full size.
      steps_per_epoch: for the number of the epoch.
      transform: (key, batch) -> images [B, H, W, C] as the models want them.
      mixing: None, or `augment.mix`'s mixup and cutmix.
      seed: of all randomness, which is derived from it and the step alone.
      data_seed: of augmentation and mixing; None: `seed`.

  Returns:
    The step.
  """
  loss_fn = loss.make_loss_fn(axis_name=axis_name, **loss_arguments)
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
    grads = collectives.axis_mean(grads, axis_name)
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
  names = ("teachers", "transform", "mixing", "seed", "data_seed")
  look = {n: loss_arguments[n] for n in names if n in loss_arguments}
  return Step(train_step, loss.make_precompute_teacher(**look))


def _average_statistics(collections, axis_name):
  return {
    module: {
      name: collectives.axis_mean(value, axis_name)
      if name == "batch_stats"
      else value
      for name, value in parts.items()
    }
    for module, parts in collections.items()
  }


def make_train_chunk(
  step: Step, load: Callable[..., loss.Batch]
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


def _length(xs) -> int:
  return jax.tree.leaves(xs)[0].shape[0]


def _first(xs):
  return jax.tree.map(lambda x: x[0], xs)
