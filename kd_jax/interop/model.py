"""Models that predict: a network alone, or one with a reused classifier.

A model is a card (JSON: what to build, what it was trained on) and variables.
A SimKD student is one network of three parts, so it is evaluated, exported and
used as a teacher like any other.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kd_jax import distillers, models
from kd_jax.data import augment
from kd_jax.interop import card as card_lib
from kd_jax.models import ModelOutputs

Variables = dict[str, Any]


class ReusedClassifier(models.Classifier):
  """A student that predicts with its teacher's classifier, as in SimKD.

  Its features are the student's, except that `last` and `pooled` are the
  projection, which the classifier reads. It predicts and teaches, but cannot be
  trained as a whole.

  Attributes:
    student: the network.
    distiller: the method, whose `last_map` is the projection.
    teacher_maps: (height, width, channels) of each teacher's last map.
  """

  student: Any = None
  distiller: Any = None
  teacher_maps: tuple[tuple[int, int, int], ...] = ()

  head: ClassVar[str] = "classifier"

  def setup(self) -> None:
    """Make the classifier; the other parts are given."""
    self.classifier = nn.Dense(self.num_classes)

  def __call__(self, images: jax.Array, *, train: bool = False) -> ModelOutputs:
    """See `models.Classifier`; `train` must be false."""
    if train:
      raise ValueError(
        "A student with its teacher's classifier cannot be trained as one"
        " network; train its student with a distiller instead."
      )
    output = self.student(images, train=False)
    # A prediction needs only the shapes of the teachers' maps.
    maps: list[Any] = [
      jax.ShapeDtypeStruct((images.shape[0], *shape), jnp.float32)
      for shape in self.teacher_maps
    ]
    teachers = tuple(ModelOutputs(output.logits, {"last": x}) for x in maps)
    last = self.distiller.last_map(output, teachers)
    pooled = self.pool(last)
    return ModelOutputs(
      self.classifier(pooled),
      {**output.features, "last": last, "pooled": pooled},
    )

  @nn.nowrap
  def stage_norms(
    self, params: Mapping[str, Any]
  ) -> list[tuple[jax.Array, jax.Array]]:
    """See `models.Classifier`: those of the student."""
    norms: list[tuple[jax.Array, jax.Array]]
    norms = self.student.stage_norms(params["student"])
    return norms


def join(
  student: Mapping[str, Any],
  distiller: Mapping[str, Any],
  classifier: Mapping[str, Any],
) -> Variables:
  """Join the variables of the parts of a `ReusedClassifier`.

  Args:
    student: variables of the student.
    distiller: variables of the distiller; collections that only training
      needs are left out.
    classifier: kernel and bias.
  """
  params = {"student": student["params"], "distiller": distiller["params"]}
  variables: Variables = {"params": {**params, "classifier": classifier}}
  stats = {
    name: part["batch_stats"]
    for name, part in (("student", student), ("distiller", distiller))
    if part.get("batch_stats")
  }
  if stats:
    variables["batch_stats"] = stats
  return variables


def mean_classifier(
  classifiers: Sequence[Mapping[str, Any]], weights: Sequence[float]
) -> dict[str, Any]:
  """Merge classifiers into one that gives the weighted mean of their logits.

  Args:
    classifiers: kernel [C, K] and bias [K] of each.
    weights: of each; their sum is 1.

  Returns:
    kernel [sum of C, K] and bias [K], for the concatenated features.
  """
  if len(classifiers) == 1:
    return dict(classifiers[0])
  kernels = [w * c["kernel"] for w, c in zip(weights, classifiers, strict=True)]
  biases = [w * c["bias"] for w, c in zip(weights, classifiers, strict=True)]
  return {
    "kernel": jnp.concatenate(kernels),
    "bias": sum(biases[1:], biases[0]),
  }


def build(card: Mapping[str, Any]) -> models.Classifier:
  """Build the network that a model card describes, without variables.

  Raises:
    ValueError: if the card names something unknown; see also
      `card.require_imported`.
  """
  card_lib.require_imported(card)
  dtype = jnp.dtype(card["dtype"])
  num_classes = card["num_classes"]
  student = models.create(card["architecture"], num_classes, dtype=dtype)
  head = card["head"]
  if head is None:
    return student
  return ReusedClassifier(
    num_classes=num_classes,
    dtype=dtype,
    student=student,
    distiller=distillers.create_for_teachers(
      weights=head["weights"], dtype=dtype, **head["distiller"]
    ),
    teacher_maps=tuple(tuple(shape) for shape in head["teacher_maps"]),
  )


def variable_shapes(
  network: models.Classifier, image_shape: Sequence[int]
) -> Any:
  """Compute the shapes of a network's variables, for images (H, W, C)."""
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  init = functools.partial(network.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), image)


def output_shapes(
  network: models.Classifier, image_shape: Sequence[int]
) -> ModelOutputs:
  """Compute the shapes of a network's outputs for one image (H, W, C)."""
  init = functools.partial(network.init_with_output, train=False)
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  output: Any = jax.eval_shape(init, jax.random.key(0), image)[0]
  return output


def check_fit(
  card: Mapping[str, Any], variables: Variables, where: object
) -> None:
  """Raise ValueError unless a card describes the network of these variables.

  Args:
    card: see `card.make`.
    variables: as read.
    where: names the file in the error.
  """
  try:
    wanted = variable_shapes(build(card), card["image_shape"])
    problem = ""
  except Exception as error:  # a wrong field may provoke anything
    wanted = {}
    problem = f" ({(str(error).splitlines() or [type(error).__name__])[0]})"
  theirs, ours = (
    {name: x.shape for name, x in traverse_util.flatten_dict(tree).items()}
    for tree in (wanted, variables)
  )
  different = [
    f"{'/'.join(name)} (expected {theirs.get(name)}, got {ours.get(name)})"
    for name in {**theirs, **ours}
    if theirs.get(name) != ours.get(name)
  ]
  if different:
    raise ValueError(
      f"{where}: expected the network of the card's architecture, num_classes,"
      f" image_shape and head{problem}, got {len(different)} other arrays, such"
      f" as {different[0]}. Export or copy the model again"
    )


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that predicts.

  Attributes:
    card: the content of `model.json`, see `card.make`.
    variables: `{"params": ..., "batch_stats": ...}` of its network.
  """

  card: dict[str, Any]
  variables: Variables

  @functools.cached_property
  def network(self) -> models.Classifier:
    """The network, without variables."""
    return build(self.card)

  def output(self, variables: Variables, images: jax.Array) -> ModelOutputs:
    """Compute logits and features of raw images; a pure function."""
    card = self.card
    x = augment.normalize(
      images,
      mean=card["normalization"]["mean"],
      std=card["normalization"]["std"],
      dtype=jnp.dtype(card["dtype"]),
    )
    output: Any = self.network.apply(variables, x, train=False)
    return output

  def apply(self, variables: Variables, images: jax.Array) -> jax.Array:
    """Compute the logits of raw images; a pure function, not compiled."""
    return self.output(variables, images).logits

  @functools.cached_property
  def _compiled(self):
    return jax.jit(self.apply)

  def logits(self, images: jax.Array | np.ndarray) -> jax.Array:
    """Compute the logits of images.

    Args:
      images: [B, H, W, C] uint8, of the card's `image_shape`.

    Returns:
      [B, num_classes] float32.
    """
    return self._compiled(self.variables, images)
