"""The total loss of one batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.data import augment
from kd_jax.distillers import base
from kd_jax.distributed import collectives
from kd_jax.training import metrics

Batch = dict[str, jax.Array]


Transform = Callable[[jax.Array, Batch], jax.Array]


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


def make_precompute_teacher(
  *,
  teacher: Any,
  transform: Transform,
  mixing: Mapping[str, float] | None = None,
  seed: int,
  data_seed: int | None = None,
) -> Callable[[Any, Batch, jax.Array], Batch]:
  """Builds `Step.look`; see `make_train_step` for the arguments."""
  shown_seed = seed if data_seed is None else data_seed

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
  seed: int,
  data_seed: int | None = None,
  axis_name: str | None,
) -> Callable[..., tuple[jax.Array, Any]]:
  """Builds `loss(params, collections, teacher_variables, batch, step)`.

  See `make_train_step` for the arguments.

  Returns:
    The function; it returns (total loss, (new collections, sums)), both of
    this replica's batch.
  """
  look = make_precompute_teacher(
    teacher=teacher,
    transform=transform,
    mixing=mixing,
    seed=seed,
    data_seed=data_seed,
  )

  def loss_fn(params, collections, teacher_variables, batch, step):
    if "taught" not in batch:
      batch = look(teacher_variables, batch, step)
    batch = dict(batch)
    images = batch.pop("shown")
    teacher_output = batch.pop("taught")
    classify = _classifiers(teacher, teacher_variables)
    _, example_key, replica_key = _keys(seed, step)
    replica_key = jax.random.fold_in(
      replica_key, collectives.axis_index(axis_name)
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
      teacher_head=classify,
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
