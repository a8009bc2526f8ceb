"""The total loss of one batch."""

import functools
from collections.abc import Callable, Mapping, Sequence
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


def run_teachers(
  teachers: Sequence[Any], variables: Sequence[Any], images: jax.Array
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Runs the frozen teachers.

  Args:
    teachers: the networks; `()` if there are none.
    variables: of each.
    images: [B, H, W, C] float.

  Returns:
    (outputs in evaluation mode, without gradient; heads: pooled -> logits).
  """
  outputs = tuple(
    jax.lax.stop_gradient(teacher.apply(v, images, train=False).checked())
    for teacher, v in zip(teachers, variables, strict=True)
  )
  return outputs, teacher_heads(teachers, variables)


def teacher_heads(
  teachers: Sequence[Any], variables: Sequence[Any]
) -> tuple[Any, ...]:
  """The teachers' classifiers as functions: pooled -> logits."""
  return tuple(
    functools.partial(teacher.classify, v["params"])
    for teacher, v in zip(teachers, variables, strict=True)
  )


def make_precompute_teacher(
  *,
  teachers: Sequence[Any],
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
      images, lam = augment.mix(mix_key, images, **mixing)
      neighbours = augment.partner(batch["label"])
      batch = {**batch, "lam": lam, "mixed_label": neighbours}
    return {**batch, "shown": images}

  def look(teacher_variables, batch, step):
    """Of several steps at once, if `step` is [k] and all leaves [k, B, ...]."""
    several = jnp.ndim(step) > 0
    batch = (jax.vmap(show) if several else show)(batch, step)
    images = batch["shown"]
    if several:
      images = images.reshape(-1, *images.shape[2:])
    taught, _ = run_teachers(teachers, teacher_variables, images)
    if several:
      shape = batch["shown"].shape[:2]
      taught = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), taught)
    return {**batch, "taught": taught}

  return look


def _keys(seed, step):
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.random.split(key, 3)


def weighted_sum(
  terms: Mapping[str, jax.Array], weights: Mapping[str, Any]
) -> jax.Array:
  """The scalar that training minimises: sum of weight * mean(term).

  A term without a weight, or of weight 0, is left out altogether: 0 * inf is
  NaN, and a parameter that only such a term reaches keeps a gradient that can
  be recognised as absent.

  Args:
    terms: [B] or scalar values by name.
    weights: numbers, or traced scalars (a ramp), by name.

  Returns:
    Scalar float32.

  Raises:
    ValueError: if a weight other than 0 names no term, or none is left.
  """
  total = None
  for name, weight in weights.items():
    if isinstance(weight, int | float) and weight == 0:
      continue
    if name not in terms:
      raise ValueError(
        f"loss_weights: {name!r} is not a term of this method; its terms are "
        f"{', '.join(sorted(terms))}. Set the weight to 0 or choose one of "
        "them"
      )
    value = weight * jnp.mean(terms[name].astype(jnp.float32))
    total = value if total is None else total + value
  if total is None:
    raise ValueError(
      "loss_weights: expected at least one weight other than 0, got "
      f"{dict(weights)}; the terms are {', '.join(sorted(terms))}"
    )
  return total


def make_loss_fn(
  *,
  student: nn.Module,
  teachers: Sequence[Any],
  distiller: base.Distiller,
  loss_weights: Mapping[str, float],
  ramp_steps: Mapping[str, int],
  steps_per_epoch: int,
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
    teachers=teachers,
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
    teacher_outputs = batch.pop("taught")
    heads = teacher_heads(teachers, teacher_variables)
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
    student_output.checked()
    output, distiller_updates = distiller.apply(
      {"params": params["distiller"], **collections["distiller"]},
      student_output,
      teacher_outputs,
      batch,
      teacher_heads=heads,
      step=step,
      epoch=step // steps_per_epoch + 1,
      train=True,
      method="distill",
      mutable=list(collections["distiller"]),
      rngs={"distiller": example_key},
    )
    losses = {
      # With a ramp of W steps, a term's weight grows to 1 over W steps.
      name: value * jnp.minimum((step + 1) / ramp_steps[name], 1.0)
      if name in ramp_steps
      else value
      for name, value in output.terms.items()
    }
    total = weighted_sum(losses, loss_weights)
    count = jnp.asarray(batch["label"].shape[0], jnp.float32)
    correct = metrics.topk_correct(output.logits, batch["label"], 1)
    sums = {"loss": total * count, "top1": jnp.sum(correct)}
    for name, weight in loss_weights.items():
      if weight:
        sums[name] = jnp.mean(output.terms[name]) * count
    collections = {
      "student": {**collections["student"], **student_updates},
      "distiller": {**collections["distiller"], **distiller_updates},
    }
    return total, (collections, sums)

  return loss_fn
