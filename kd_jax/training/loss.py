"""The total loss of one batch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax.data import augment
from kd_jax.distillers import base
from kd_jax.distributed import collectives
from kd_jax.training import cached_logits, metrics

# "image", "label", "index", "mask", and "cached_logits" of a cached teacher;
# after `precompute_teacher` also "augmented_images" and "teacher_outputs".
Batch = Mapping[str, Any]
# (key, batch) -> images [B, H, W, C] as the networks take them.
Transform = Callable[[jax.Array, Batch], jax.Array]
# (teacher_variables, batch, step, seeds) -> batch
PrecomputeTeacher = Callable[[Any, Batch, jax.Array, jax.Array], Batch]


def run_teachers(
  teachers: Sequence[Any], variables: Sequence[Any], images: jax.Array
) -> tuple[tuple[Any, ...], tuple[base.Head, ...]]:
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
) -> tuple[base.Head, ...]:
  """The teachers' classifiers as functions: pooled -> logits."""
  return tuple(
    classifier(teacher, v)
    for teacher, v in zip(teachers, variables, strict=True)
  )


def classifier(network: Any, variables: Any) -> base.Head:
  """A network's classifier as a function: pooled -> logits."""
  # Looked up when called: a student of no teacher needs no `classify`.
  return lambda pooled: network.classify(variables["params"], pooled)


def init_distiller(
  distiller: base.Distiller,
  rngs: Any,
  *,
  student: nn.Module,
  student_variables: Any,
  teachers: Sequence[Any],
  teacher_variables: Sequence[Any],
  images: jax.Array,
  batch: Batch,
) -> Any:
  """Initial variables of a distiller, from the networks and their outputs.

  Args:
    distiller: the method.
    rngs: a key, or keys of the streams "params" and "distiller".
    student: the model.
    student_variables: of the student.
    teachers: the networks; `()` if there are none.
    teacher_variables: of each, not folded if the method has
      `teacher_constants`.
    images: [B, H, W, C] float, for the shapes.
    batch: with "label" [B]; for methods with a memory also "train_labels" [N].

  Raises:
    ValueError: if the teacher's constants cannot be computed, or are others
      than the method reads.
  """
  outputs, heads = run_teachers(teachers, teacher_variables, images)
  student_output = student.apply(student_variables, images, train=False)
  if distiller.views > 1:
    views = {"strong_student": student_output, "strong_teachers": outputs}
    batch = {**batch, **views}
  variables = distiller.init(
    rngs,
    student_output,
    outputs,
    batch,
    teacher_heads=heads,
    student_head=classifier(student, student_variables),
    step=jnp.zeros((), jnp.int32),
    epoch=jnp.ones((), jnp.int32),
    train=True,
    method="distill",
  )
  constants = distiller.teacher_constants(teachers, teacher_variables)
  read, found = (
    jax.tree.map(jnp.shape, arrays)
    for arrays in (variables.get(base.CONSTANTS, {}), constants)
  )
  if read != found:
    raise ValueError(
      f"{type(distiller).__name__}: expected teacher_constants of the shapes"
      f" {read}, got {found}; does the teacher's stage_norms have an entry for"
      " each of its stages?"
    )
  return {**variables, base.CONSTANTS: constants} if constants else variables


def make_precompute_teacher(
  *,
  teachers: Sequence[Any],
  transform: Transform,
  strong_transform: Transform | None = None,
  mixing: Mapping[str, float] | None = None,
) -> PrecomputeTeacher:
  """Builds the part of a step that needs no student.

  See `step.make_train_step` for the arguments.

  Returns:
    `precompute_teacher(teacher_variables, batch, step, seeds) -> batch` with
    "augmented_images" and "teacher_outputs", and with a `strong_transform`
    also "strong_images" and "strong_teachers". For several steps at once,
    `step` is [k] and all leaves of the batch are [k, B, ...].

  Raises:
    ValueError: for mixing with a `strong_transform`.
  """
  if mixing and strong_transform:
    raise ValueError(
      "config.data.mixup and cutmix: expected 0 for a method with two views of"
      f" an image, got {dict(mixing)}. Set both to 0, or choose another method"
    )

  def augment_images(
    batch: Batch, step: jax.Array, seeds: jax.Array
  ) -> dict[str, Any]:
    augment_key, _, _ = _keys(seeds[1], step)
    images = transform(augment_key, batch)
    if strong_transform:
      # A crop of its own, too.
      strong = strong_transform(jax.random.fold_in(augment_key, 1), batch)
      return {**batch, "augmented_images": images, "strong_images": strong}
    if not mixing:
      return {**batch, "augmented_images": images}
    (mix_key,) = jax.random.split(augment_key, 1)
    images, lam = augment.mix(mix_key, images, **mixing)
    return {
      **batch,
      "augmented_images": images,
      "lam": lam,
      "mixed_label": augment.partner(batch["label"]),
    }

  def precompute_teacher(
    teacher_variables: Any, batch: Batch, step: jax.Array, seeds: jax.Array
  ) -> Batch:
    batch = dict(batch)
    if (kept := batch.pop("cached_logits", None)) is not None:
      (teacher,) = teachers
      outputs = (cached_logits.expand(kept, teacher.num_classes),)
      augment_all = augment_images
      if jnp.ndim(step):
        augment_all = jax.vmap(augment_images, (0, 0, None))
      return {**augment_all(batch, step, seeds), "teacher_outputs": outputs}
    several = jnp.ndim(step)  # also the axis of the examples
    augment_all = (
      jax.vmap(augment_images, (0, 0, None)) if several else augment_images
    )
    augmented = augment_all(batch, step, seeds)
    images = augmented["augmented_images"]
    if strong_transform:
      strong = augmented["strong_images"]
      images = jnp.concatenate([images, strong], axis=several)
    first = images.shape[: several + 1]
    if several:
      images = images.reshape(-1, *images.shape[2:])
    outputs, _ = run_teachers(teachers, teacher_variables, images)
    if several:
      outputs = jax.tree.map(lambda x: x.reshape(*first, *x.shape[1:]), outputs)
    if not strong_transform:
      return {**augmented, "teacher_outputs": outputs}
    weak, strong = (
      jax.tree.map(lambda x, i=i: jnp.split(x, 2, several)[i], outputs)
      for i in range(2)
    )
    return {**augmented, "teacher_outputs": weak, "strong_teachers": strong}

  return precompute_teacher


def _keys(seed: jax.Array, step: jax.Array) -> jax.Array:
  """Keys of augmentation, of the distiller and of dropout in a step."""
  return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)


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
  total: jax.Array | None = None
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
  steps_per_epoch: int,
  transform: Transform,
  ramp_steps: Mapping[str, int] | None = None,
  strong_transform: Transform | None = None,
  mixing: Mapping[str, float] | None = None,
  idle: Collection[str] = (),
  axis_name: str | None = None,
  split_ce: bool = False,
) -> Callable[..., tuple[Any, Any]]:
  """Builds the loss of this replica's batch.

  See `step.make_train_step` for the arguments.

  Returns:
    `loss(params, collections, teacher_variables, batch, step, seeds, part)
    -> (total loss, (new collections, sums))`. The batch comes as it is or from
    `precompute_teacher`. `part` numbers the parts of an accumulated batch; it
    is None if the batch is whole. With `split_ce`, the total is a pair.
  """
  ramps = ramp_steps or {}
  if (distiller.views > 1) != (strong_transform is not None):
    raise ValueError(
      "strong_transform: expected one for a method with two views of an image,"
      f" else None; got {strong_transform} for {type(distiller).__name__} with"
      f" {distiller.views}"
    )
  precompute_teacher = make_precompute_teacher(
    teachers=teachers,
    transform=transform,
    strong_transform=strong_transform,
    mixing=mixing,
  )
  # Such a student draws its dropout for the batch of all devices.
  draws_alike = getattr(student, "bn_axis_name", None) is not None

  def loss_fn(
    params: Any,
    collections: Any,
    teacher_variables: Any,
    batch: Batch,
    step: jax.Array,
    seeds: jax.Array,
    part: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    if "teacher_outputs" not in batch:
      batch = precompute_teacher(teacher_variables, batch, step, seeds)
    batch = dict(batch)
    images = batch.pop("augmented_images")
    teacher_outputs = batch.pop("teacher_outputs")
    _, distiller_key, dropout_key = _keys(seeds[0], step)
    dropout_key = jax.random.fold_in(
      dropout_key, collectives.axis_index(None if draws_alike else axis_name)
    )
    if part is not None:
      distiller_key = jax.random.fold_in(distiller_key, part)
      dropout_key = jax.random.fold_in(dropout_key, part)

    def run_student(
      images: jax.Array, rest: Any, key: jax.Array
    ) -> tuple[Any, Any]:
      outputs, updates = student.apply(
        {"params": params["student"], **rest},
        images,
        train="student" not in idle,
        mutable=list(rest),
        rngs={"dropout": key},
      )
      return outputs.checked(), {**rest, **updates}

    student_outputs, student_rest = run_student(
      images, collections["student"], dropout_key
    )
    if "strong_images" in batch:
      batch["strong_student"], student_rest = run_student(
        batch.pop("strong_images"),
        student_rest,
        jax.random.fold_in(dropout_key, 1),
      )
    output: base.DistillOutput
    output, distiller_updates = distiller.apply(
      {"params": params["distiller"], **collections["distiller"]},
      student_outputs,
      teacher_outputs,
      batch,
      teacher_heads=teacher_heads(teachers, teacher_variables),
      student_head=classifier(student, {"params": params["student"]}),
      step=step,
      epoch=step // steps_per_epoch + 1,
      train=True,
      method="distill",
      mutable=[n for n in collections["distiller"] if n != base.CONSTANTS],
      rngs={"distiller": distiller_key},
    )
    # With a ramp of W steps, a term's weight grows to 1 over W steps.
    weights = {
      name: weight * jnp.minimum((step + 1) / ramps[name], 1.0)
      if weight and name in ramps
      else weight
      for name, weight in loss_weights.items()
    }
    total: Any
    if split_ce:
      ce = {name: weights[name] for name in weights if name == "ce"}
      rest = {name: weights[name] for name in weights if name != "ce"}
      total = weighted_sum(output.terms, ce), weighted_sum(output.terms, rest)
    else:
      total = weighted_sum(output.terms, weights)
    count = jnp.asarray(batch["label"].shape[0], jnp.float32)
    correct = metrics.topk_correct(output.logits, batch["label"], 1)
    whole = total[0] + total[1] if split_ce else total
    sums = {"loss": whole * count, "top1": jnp.sum(correct)}
    for name, weight in loss_weights.items():
      if weight:
        sums[name] = jnp.mean(output.terms[name]) * count
    if "distiller" in idle:
      distiller_updates = {}
    collections = {
      "student": student_rest,
      "distiller": {**collections["distiller"], **distiller_updates},
    }
    return total, (collections, sums)

  return loss_fn
