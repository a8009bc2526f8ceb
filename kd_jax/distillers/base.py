"""What every distiller is: a module from two networks' outputs to losses."""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.models.layers import ModelOutputs

Batch = Mapping[str, jax.Array]
Classifier = Callable[[jax.Array], jax.Array]


class DistillOutput(NamedTuple):
  """What a distiller returns.

  Attributes:
    logits: [B, num_classes] float32, the method's prediction.
    losses: unweighted terms by name, [B] (one value per example) or scalar.
  """

  logits: jax.Array
  losses: dict[str, jax.Array]


class Distiller(nn.Module, metaclass=abc.ABCMeta):
  """Base of the methods; each is one final subclass in a file of its name.

  A distiller owns what its method learns (`params`, `batch_stats`) and
  remembers (`memory`), and reads every shape from what `init` is given. Maps
  are NHWC. While its variables are being made no mapped axis is bound.

  Attributes:
    axis_name: the mapped axis of the devices, if any.
    sync: whether BatchNorm and relational losses see the batch of the whole
      axis (then results do not depend on the number of devices) or the
      device's own, as the reference toolboxes do per GPU.
    dtype: of the learned modules' arithmetic; losses are float32.
    temperature: of the term "kd".
    label_smoothing: of the term "ce".
  """

  axis_name: str | None = None
  sync: bool = False
  dtype: Any = jnp.float32
  temperature: float = 4.0
  label_smoothing: float = 0.0

  # Whether the mean of the losses over several teachers makes sense.
  takes_many_teachers: ClassVar[bool] = False
  # Arrays of "memory" with a row for every training example. On several
  # devices each may be given its share of the rows; see `crd`.
  memory_rows: ClassVar[tuple[str, ...]] = ()

  @property
  def predicts_with_teacher_head(self) -> bool:
    """Whether the prediction is the teacher's classifier on `last_map`.

    An export then needs what this module learns, and that classifier too.
    """
    return False

  @property
  def batch_axis(self) -> str | None:
    """The axis over which batch-wide quantities are taken, or None."""
    return self.axis_name if self.sync else None

  def bound(self, axis_name: str | None) -> str | None:
    """`axis_name`, or None while the variables are being made."""
    return None if self.is_initializing() else axis_name

  @abc.abstractmethod
  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: Batch,
    *,
    teacher_head: Classifier,
    step: jax.Array | int,
    train: bool,
  ) -> DistillOutput:
    """Compares a student with its teacher on one batch.

    Args:
      student: the student's output.
      teacher: the teacher's, gradients already stopped.
      batch: at least `label` [B]; with `index` [B] in training. Where images
        are mixed, `share` (scalar) is that of `label` and the rest is that of
        `mixed_label` [B].
      teacher_head: from a pooled feature [B, C] to the teacher's logits.
      step: number of the step, from 0.
      train: whether running statistics and memories move.

    Returns:
      The prediction and the terms: always "ce", with a teacher "kd", and the
      method's own term under its word. CRD and SemCKD leave theirs out when
      `train` is false: it is defined on training batches only.
    """

  def last_map(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool = False
  ) -> jax.Array:
    """The map whose global average pool the prediction's classifier takes.

    `distiller.apply(variables, student, teacher, method="last_map")`, where
    the teacher's features may be `jax.ShapeDtypeStruct`s: only their shapes
    are read.

    Args:
      student: the student's output.
      teacher: the teacher's.
      train: whether running statistics move.

    Returns:
      [B, H, W, C]: the student's own last map, unless
      `predicts_with_teacher_head`.
    """
    del teacher, train
    return feature(student, "last", whose="student")

  def logit_losses(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs | None,
    batch: Batch,
  ) -> dict[str, jax.Array]:
    """The terms that need no features: "ce" and, with a teacher, "kd"."""
    terms = {"ce": self._cross_entropy(student.logits, batch)}
    if teacher is not None:
      terms["kd"] = losses.kd_loss(
        student.logits, teacher.logits, temperature=self.temperature
      )
    return terms

  def _cross_entropy(self, logits: jax.Array, batch: Batch) -> jax.Array:
    def of(labels):
      return losses.cross_entropy_loss(
        logits, labels, label_smoothing=self.label_smoothing
      )

    own = of(batch["label"])
    if "share" not in batch:
      return own
    share = batch["share"]
    return share * own + (1 - share) * of(batch["mixed_label"])


def feature(output: ModelOutputs, name: str, *, whose: str) -> Any:
  """One of a network's features.

  Raises:
    ValueError: if the network has no feature of that name.
  """
  if name not in output.features:
    raise ValueError(
      f"the {whose} has no feature {name!r}; it has "
      f"{', '.join(output.features)}"
    )
  return output.features[name]


def stages(output: ModelOutputs, *, whose: str) -> list[jax.Array]:
  """The maps stage1..stageN of a network.

  Raises:
    ValueError: if there are none.
  """
  maps = output.stages()
  if not maps:
    raise ValueError(
      f"the {whose} has no feature 'stage1'; it has "
      f"{', '.join(output.features)}. This method compares stages"
    )
  return maps


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


def inverse_softplus(value: float) -> float:
  """x with log(1 + exp(x)) = value."""
  return math.log(math.expm1(value))
