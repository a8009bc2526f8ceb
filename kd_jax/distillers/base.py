"""The base of all distillers: from two networks' outputs to loss terms."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd_jax import losses
from kd_jax.models.layers import ModelOutputs

_T = TypeVar("_T")
Batch = Mapping[str, Any]
# A classifier: pooled features [..., C] -> logits [..., num_classes].
Head = Callable[[jax.Array], jax.Array]
# The collection of `Distiller.teacher_constants`.
CONSTANTS = "constants"
# Among a teacher's variables, see `Distiller.needs_class_means`.
CLASS_MEANS = "class_means"


class DistillOutput(NamedTuple):
  """Prediction and loss terms of one batch.

  Attributes:
    logits: [B, num_classes] float32, the method's prediction.
    terms: unweighted loss terms by name, [B] (one value per example) or scalar.
  """

  logits: jax.Array
  terms: dict[str, jax.Array]


class Distiller(nn.Module):
  """Base of the methods; each is one final subclass in a file of its name.

  A distiller owns what its method learns (`params`, `batch_stats`), remembers
  (`memory`) and has read of its teachers' weights (`constants`, which never
  move). It reads every shape from the arguments of `init`. Maps are NHWC.

  A method with one teacher implements `__call__`. A method with none or
  several overrides `distill` instead. The train step always calls `distill`.

  Attributes:
    axis_name: the mapped axis of the devices, if any.
    sync: whether BatchNorm and relational losses see the batch of all devices.
      Then results do not depend on the number of devices. Otherwise each
      device uses its own batch, as the reference toolboxes do per GPU.
    dtype: of the learned modules' arithmetic; losses are float32.
    temperature: of the term "kd", and of the method's own if it has one.
    standardize: whether these terms see each example's logits less their mean,
      over their standard deviation (see `losses.standardize_logits`).
    label_smoothing: of the term "ce".
  """

  axis_name: str | None = None
  sync: bool = False
  dtype: Any = jnp.float32
  temperature: float = 4.0
  standardize: bool = False
  label_smoothing: float = 0.0

  # Whether the mean of the terms over several teachers makes sense.
  takes_many_teachers: ClassVar[bool] = False
  # Whether the method compares the student with a teacher at all.
  needs_teacher: ClassVar[bool] = True

  @property
  def needs_logits_only(self) -> bool:
    """Whether it reads nothing of the teacher but its logits.

    They may then come from a cache.
    """
    return False

  @property
  def views(self) -> int:
    """How often an image is shown: 2 adds a strongly augmented view."""
    return 1

  @property
  def needs_class_means(self) -> bool:
    """Whether `teacher_constants` reads the class means of the features.

    They are `variables["class_means"]["pooled"]` [num_classes, C], means of
    `pooled` over the training set.
    """
    return False

  @property
  def memory_rows(self) -> tuple[str, ...]:
    """Paths in the collection "memory" of arrays with a row per example.

    On several devices each may hold a shard of the rows; see `crd`.
    """
    return ()

  @property
  def predictor(self) -> "Distiller":
    """The module that the prediction needs: itself, or a member of several."""
    return self

  @property
  def predicts_with_teacher_head(self) -> bool:
    """Whether the prediction is the teacher's classifier on `last_map`.

    An export then needs this module's variables and that classifier too.
    """
    return False

  @property
  def batch_axis(self) -> str | None:
    """The axis over which batch-wide quantities are taken, or None."""
    return self.axis_name if self.sync else None

  def bound(self, axis_name: str | None) -> str | None:
    """`axis_name`, or None during `init`, where no axis is mapped."""
    return None if self.is_initializing() else axis_name

  def relational_axis(self, train: bool) -> str | None:
    """The axis of a loss over a batch, or None.

    Args:
      train: see `__call__`; evaluation may run without a mapped axis.
    """
    return self.bound(self.batch_axis) if train else None

  @nn.nowrap
  def teacher_constants(
    self, teachers: Sequence[Any], variables: Sequence[Any]
  ) -> dict[str, Any]:
    """Computes what the method reads of its teachers beyond their outputs.

    `training.loss.init_distiller` calls it once, when a run starts; `__call__`
    reads the arrays by `constant`.

    Args:
      teachers: the networks, each a `models.Classifier`.
      variables: of each, before BatchNorm is folded.

    Returns:
      Arrays by name, float32; most methods have none.
    """
    del teachers, variables
    return {}

  def constant(self, name: str, shape: Sequence[int]) -> jax.Array:
    """One of `teacher_constants`, float32; NaN until they are computed."""
    value: jax.Array = self.variable(
      CONSTANTS, name, jnp.full, tuple(shape), jnp.nan, jnp.float32
    ).value
    return value

  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: Batch,
    *,
    teacher_head: Head,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> DistillOutput:
    """Compares a student with its teacher on one batch.

    Args:
      student: the student's output.
      teacher: the teacher's, gradients already stopped.
      batch: at least `label` [B]; with `index` [B] in training. For mixed
        images, `lam` (scalar) weighs `label` and the rest goes to
        `mixed_label` [B]. With two `views`, `strong_student` is the student's
        output for the strong view, and `strong_teachers` that of each teacher.
      teacher_head: from a pooled feature [B, C] to the teacher's logits.
      step: number of the step, from 0.
      epoch: number of the epoch, from 1.
      train: whether running statistics and memories move.

    Returns:
      The prediction and the terms: always "ce", with a teacher "kd", and the
      method's own term under the method's name. CRD and SemCKD leave theirs
      out when `train` is false, since it is defined on training batches only.
    """
    raise NotImplementedError(
      f"{type(self).__name__} has no single-teacher form; call its `distill`"
    )

  def distill(
    self,
    student: ModelOutputs,
    teachers: Sequence[ModelOutputs],
    batch: Batch,
    *,
    teacher_heads: Sequence[Head],
    student_head: Head | None = None,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> DistillOutput:
    """`__call__` for any number of teachers: `apply(.., method="distill")`.

    Args:
      student: see `__call__`.
      teachers: the output of each teacher; `()` if there is none.
      batch: see `__call__`.
      teacher_heads: the classifier of each teacher.
      student_head: the student's own classifier, which a method that needs it
        takes by overriding `distill`.
      step: see `__call__`.
      epoch: see `__call__`.
      train: see `__call__`.

    Returns:
      See `__call__`.

    Raises:
      ValueError: if the method does not take so many teachers.
    """
    return self(
      student,
      self.only(teachers),
      batch,
      teacher_head=self.only(teacher_heads),
      step=step,
      epoch=epoch,
      train=train,
    )

  def last_map(
    self,
    student: ModelOutputs,
    teachers: Sequence[ModelOutputs],
    *,
    train: bool = False,
  ) -> jax.Array:
    """The map whose global average pool feeds the prediction's classifier.

    Call it as `apply(variables, student, teachers, method="last_map")`. The
    teachers' features may be `jax.ShapeDtypeStruct`s.

    Args:
      student: the student's output.
      teachers: the output of each teacher.
      train: whether running statistics move.

    Returns:
      [B, H, W, C]: the student's own last map, unless
      `predicts_with_teacher_head`.
    """
    del teachers, train
    return feature(student, "last", whose="student")

  def only(self, teachers: Sequence[_T]) -> _T:
    """The only one; a ValueError if there are none or several."""
    if len(teachers) != 1:
      raise ValueError(
        f"{type(self).__name__}: expected one teacher, got {len(teachers)}"
      )
    return teachers[0]

  def required(self, student_head: Head | None) -> Head:
    """The student's classifier; a ValueError if it was not passed."""
    if student_head is None:
      raise ValueError(
        f"{type(self).__name__.lower()}: expected student_head, the student's "
        "classifier, got None; pass functools.partial(student.classify, params)"
      )
    return student_head

  def logit_terms(
    self, student: ModelOutputs, teacher: ModelOutputs, batch: Batch
  ) -> dict[str, jax.Array]:
    """The terms "ce" and "kd", which need no features."""
    z_s, z_t = self.compared_logits(student, teacher)
    return {
      "ce": self.cross_entropy(student.logits, batch),
      "kd": losses.kd_loss(z_s, z_t, temperature=self.temperature),
    }

  def compared_logits(
    self, student: ModelOutputs, teacher: ModelOutputs
  ) -> tuple[jax.Array, jax.Array]:
    """Both networks' logits, standardised if `standardize`."""
    if not self.standardize:
      return student.logits, teacher.logits
    return (
      losses.standardize_logits(student.logits),
      losses.standardize_logits(teacher.logits),
    )

  def cross_entropy(self, logits: jax.Array, batch: Batch) -> jax.Array:
    """The term "ce" [B] with smoothed and mixed labels."""
    return over_labels(
      lambda labels: losses.cross_entropy_loss(
        logits, labels, label_smoothing=self.label_smoothing
      ),
      batch,
    )


class FeatureDistiller(Distiller):
  """Base of the methods that compare two networks' features and nothing else.

  Each is one final subclass with its formula in `compare`. Its term has the
  class's name in lower case.
  """

  def compare(
    self, student: ModelOutputs, teacher: ModelOutputs, *, train: bool
  ) -> jax.Array:
    """The method's own term.

    Args:
      student: see `Distiller.__call__`.
      teacher: likewise.
      train: likewise.

    Returns:
      [B] or scalar float32.
    """
    raise NotImplementedError(
      f"{type(self).__name__}: a FeatureDistiller has to define `compare`"
    )

  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: Batch,
    *,
    teacher_head: Head,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> DistillOutput:
    """See `Distiller.__call__`."""
    terms = self.logit_terms(student, teacher, batch)
    own = self.compare(student, teacher, train=train)
    return DistillOutput(
      student.logits, {**terms, type(self).__name__.lower(): own}
    )


class LogitDistiller(Distiller):
  """Base of the methods that compare two networks' logits and nothing else.

  Each is one final subclass with its formula in `compare`. Its term has the
  class's name in lower case.
  """

  takes_many_teachers: ClassVar[bool] = True

  @property
  def needs_logits_only(self) -> bool:
    """Always."""
    return True

  def compare(
    self,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    epoch: jax.Array | int,
    axis_name: str | None,
  ) -> jax.Array:
    """The method's own term.

    Args:
      student_logits: [B, C], standardised if `standardize`.
      teacher_logits: [B, C], likewise.
      labels: [B].
      epoch: number of the epoch, from 1.
      axis_name: the mapped axis of a relational term, or None.

    Returns:
      [B] or scalar float32.
    """
    raise NotImplementedError(
      f"{type(self).__name__}: a LogitDistiller has to define `compare`"
    )

  def __call__(
    self,
    student: ModelOutputs,
    teacher: ModelOutputs,
    batch: Batch,
    *,
    teacher_head: Head,
    step: jax.Array | int,
    epoch: jax.Array | int,
    train: bool,
  ) -> DistillOutput:
    """See `Distiller.__call__`."""
    z_s, z_t = self.compared_logits(student, teacher)
    axis_name = self.relational_axis(train)
    own = over_labels(
      lambda labels: self.compare(
        z_s, z_t, labels, epoch=epoch, axis_name=axis_name
      ),
      batch,
    )
    terms = self.logit_terms(student, teacher, batch)
    return DistillOutput(
      student.logits, {**terms, type(self).__name__.lower(): own}
    )


def over_labels(
  loss: Callable[[jax.Array], jax.Array], batch: Batch
) -> jax.Array:
  """A loss of the labels; of mixed images, the mean over both labels."""
  own = loss(batch["label"])
  if "lam" not in batch:
    return own
  lam: jax.Array = batch["lam"]
  return lam * own + (1 - lam) * loss(batch["mixed_label"])


def feature(output: ModelOutputs, name: str, *, whose: str) -> jax.Array:
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


def without_bias(head: Head, x: jax.Array) -> jax.Array:
  """A linear classifier's weights applied to x [..., C], its bias left out."""
  return head(x) - head(jnp.zeros((*(1,) * (x.ndim - 1), x.shape[-1])))


def paired_stages(
  student: ModelOutputs, teacher: ModelOutputs
) -> tuple[list[jax.Array], list[jax.Array]]:
  """The stages of both networks, paired from the first.

  If one network has more stages, its last ones are left out.

  Raises:
    ValueError: see `stages`.
  """
  maps_s = stages(student, whose="student")
  maps_t = stages(teacher, whose="teacher")
  pairs = min(len(maps_s), len(maps_t))
  return maps_s[:pairs], maps_t[:pairs]


def preactivations(output: ModelOutputs, *, whose: str) -> list[jax.Array]:
  """The maps stage1..stageN before their activation, if the network has them.

  Raises:
    ValueError: if there are no stages.
  """
  return [
    output.features.get(f"stage{i}_preact", x)
    for i, x in enumerate(stages(output, whose=whose), start=1)
  ]


def inverse_softplus(value: float) -> float:
  """x with log(1 + exp(x)) = value."""
  return math.log(math.expm1(value))
