"""The evaluation step."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.distillers import base
from kd_jax.training import loss, metrics


def make_eval_step(
  *,
  student: nn.Module,
  teachers: Sequence[Any],
  distiller: base.Distiller,
  transform: loss.Transform,
  axis_name: str | None = None,
) -> Callable[[Any, Any, loss.Batch], dict[str, jax.Array]]:
  """Builds the evaluation step of one replica.

  Args:
    student: the model.
    teachers: frozen networks, none, one or several.
    distiller: the method, whose logits are the prediction.
    transform: (unused key, batch) -> images.
    axis_name: the mapped axis, or None.

  Returns:
    `eval_step(variables, teacher_variables, batch) -> sums`, where variables
    are `{"student": ..., "distiller": ...}` and the sums are of cross-entropy
    in nats ("ce"), hits ("top1", "top5") and real examples ("count").
  """

  def eval_step(
    variables: Any, teacher_variables: Any, batch: loss.Batch
  ) -> dict[str, jax.Array]:
    images = transform(jax.random.key(0), batch)
    teacher_outputs, heads = loss.run_teachers(
      teachers, teacher_variables, images
    )
    student_output = student.apply(variables["student"], images, train=False)
    output: Any = distiller.apply(
      variables["distiller"],
      student_output,
      teacher_outputs,
      batch,
      teacher_heads=heads,
      student_head=loss.classifier(student, variables["student"]),
      step=jnp.zeros((), jnp.int32),
      epoch=jnp.ones((), jnp.int32),
      train=False,
      method="distill",
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
  values = {
    "ce": losses.cross_entropy_loss(logits, labels),
    "top1": metrics.topk_correct(logits, labels, 1),
    "top5": metrics.topk_correct(logits, labels, 5),
  }
  # where, not a product: a padded row may hold anything, NaN included.
  sums = {k: jnp.sum(jnp.where(mask, v, 0.0)) for k, v in values.items()}
  return metrics.global_sums(sums, jnp.sum(mask.astype(jnp.float32)), axis_name)


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

  def eval_chunk(
    variables: Any, teacher_variables: Any, resident: Any, xs: Any
  ) -> dict[str, jax.Array]:
    del resident
    if jax.tree.leaves(xs)[0].shape[0] == 1:
      first = jax.tree.map(lambda x: x[0], xs)
      return step(variables, teacher_variables, first)
    _, sums = jax.lax.scan(
      lambda carry, x: (carry, step(variables, teacher_variables, x)), 0, xs
    )
    return {name: jnp.sum(value, 0) for name, value in sums.items()}

  return eval_chunk
