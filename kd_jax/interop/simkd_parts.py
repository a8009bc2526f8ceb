"""State dicts of models, including those with a reused classifier.

A network alone has the reference toolboxes' names. A SimKD student has three
parts: `model` (the network) and `proj` (the projector), which SimKD's training
loop saves, and `classifier`, its teacher's, which that loop leaves out. With
several teachers the projector's names begin with the teacher's number, and the
classifier reads the concatenated projections.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_jax import models
from kd_jax.interop import model as model_lib
from kd_jax.interop import naming, pytorch
from kd_jax.models import fold

_MEMBERS = "members_"


def projector_name(path: tuple[str, ...]) -> str:
  """Name a projector's layer: ("projector", "conv2") -> "transfer.3"."""
  kind, number = path[-1][:-1], int(path[-1][-1])
  teacher = ""
  if path[0].startswith(_MEMBERS):
    teacher = f"{path[0].removeprefix(_MEMBERS)}."
  # Each convolution is followed by its BatchNorm and a ReLU.
  place = 3 * (number - 1) + ("conv", "bn").index(kind)
  return f"{teacher}transfer.{place}"


def to_parts(model: model_lib.Model) -> dict[str, dict[str, np.ndarray]]:
  """Make the state dicts of a model's parts, as `files.write` takes them.

  The convolutions of a folded model have biases, and BatchNorm remains only
  where it could not be folded.
  """
  card, variables = model.card, model.variables
  name, is_folded = card["architecture"], card["batch_norm_folded"]
  if is_folded:
    shape = card["image_shape"]
    before = model_lib.variable_shapes(model.network, shape)
    folded = fold.pairs(model.network, before, shape)
    variables = fold.unfold(variables["params"], folded)

  def part(key: str) -> dict[str, Any]:
    return {kind: tree[key] for kind, tree in variables.items() if key in tree}

  alone = card["head"] is None
  student = variables if alone else part("student")
  rename = models.entry(name).weight_names[0].rename
  write = pytorch.tensors_from_variables
  parts = {
    "model": write(student, rename=rename)
    if is_folded
    else pytorch.to_state_dict(name, student)
  }
  if not alone:
    parts[naming.PROJECTOR] = write(part("distiller"), rename=projector_name)
    parts[naming.CLASSIFIER] = write(
      {"params": variables["params"]["classifier"]}
    )
  return parts


def from_parts(
  card: Mapping[str, Any],
  student: Mapping[str, Any],
  projector: Mapping[str, np.ndarray],
  classifier: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Make the variables of a model with a reused classifier.

  Args:
    card: its model card.
    student: the variables of its network.
    projector: tensors by `projector_name`.
    classifier: its weight [K, C] and bias [K].

  Returns:
    Variables of `model.build(card)`.

  Raises:
    ValueError: if the tensors do not fit.
  """
  template = model_lib.variable_shapes(
    model_lib.build(card), card["image_shape"]
  )
  read = pytorch.variables_from_tensors
  source = card["head"]["distiller"].get("student_map") or "the last stage"
  distiller = read(
    {kind: template[kind]["distiller"] for kind in ("params", "batch_stats")},
    projector,
    rename=projector_name,
    what=f"the projector from {source} of the student to the teacher's map",
  )
  head = read(
    {"params": template["params"]["classifier"]},
    classifier,
    what="the teacher's classifier",
  )
  return model_lib.join(student, distiller, head["params"])
