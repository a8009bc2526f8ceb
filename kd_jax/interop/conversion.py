"""Conversion of foreign weights, and of SimKD students, to any form."""

import pathlib
from collections.abc import Mapping

import numpy as np

from kd_jax.interop import card as card_lib
from kd_jax.interop import files, formats, naming, opening, pytorch, simkd_parts
from kd_jax.interop import model as model_lib
from kd_jax.interop.model import Model


def convert(
  source: pathlib.Path,
  to: pathlib.Path,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  origin: opening.Origin = opening.UNKNOWN,
  names: naming.Names = naming.AS_THEY_ARE,
) -> str:
  """Convert one model.

  Args:
    source: see `opening.open_model`.
    to: see `formats.save`.
    model_name: see `opening.open_model`.
    num_classes: see `opening.open_model`.
    origin: see `opening.open_model`.
    names: see `opening.open_model`.

  Returns:
    A description of what was written.

  Raises:
    ValueError: if the source cannot be read or does not fit, if the target is
      taken, or if the data must be named. Nothing is written then.
    ImportError: if it needs PyTorch, which is missing.
  """
  formats.check_target(to)
  to_state_dict = to.suffix.lower() in files.WRITABLE
  is_unknown = origin == opening.UNKNOWN and files.is_weights_file(source)
  if to_state_dict and is_unknown:
    weights = files.read(source, names)
    if weights.card is None:  # nor will the new file have one
      name, classes, variables = opening.read_network(
        source, weights, model_name, num_classes
      )
      files.write(to, {"model": pytorch.to_state_dict(name, variables)})
      return f"{name}, {classes} classes, a state dict"
  model = opening.open_model(
    source,
    model_name=model_name,
    num_classes=num_classes,
    origin=origin,
    names=names,
  )
  return _save(model, to)


def _save(model: Model, to: pathlib.Path) -> str:
  words = formats.save(model, to)
  return f"{words}, for images like those of {model.card['trained_on']}"


def convert_simkd(
  student: pathlib.Path,
  teacher: pathlib.Path,
  to: pathlib.Path,
  *,
  model_name: str | None = None,
  teacher_name: str | None = None,
  num_classes: int | None = None,
  factor: int | None = None,
  origin: opening.Origin = opening.UNKNOWN,
) -> str:
  """Make one model of a student of SimKD's training loop and its teacher.

  That loop saves the student's network (`model`) and projector (`proj`), but
  not the teacher's classifier, which the student predicts with.

  Args:
    student: the student's file.
    teacher: the teacher's file of weights, export or finished run.
    to: see `formats.save`.
    model_name: name of its network; None: the one that fits.
    teacher_name: name of the teacher's; None: the one that fits.
    num_classes: of the data; None: as the teacher has.
    factor: of the projector; None: as its tensors have.
    origin: see `opening.open_model`.

  Returns:
    A description of what was written.

  Raises:
    ValueError: see `convert`.
    ImportError: if it needs PyTorch, which is missing.
  """
  formats.check_target(to)
  weights = files.read(student)
  if weights.projector is None:
    raise ValueError(
      f"{student}: expected a SimKD student with 'model' and 'proj', got a"
      " file without a projector. Convert a network alone with --from"
    )
  theirs = _open_teacher(teacher, teacher_name, num_classes)
  num_classes = theirs.card["num_classes"]
  model_name, _ = opening.identify(
    student, weights.tensors, model_name, num_classes
  )
  variables = opening.make_variables(
    student, weights.tensors, model_name, num_classes
  )
  card = opening.make_card(model_name, num_classes, origin)
  shape = card["image_shape"]
  stages = model_lib.output_shapes(model_lib.build(card), shape).stages()
  last = model_lib.output_shapes(theirs.network, shape).features["last"]
  card["method"] = "simkd"
  card["head"] = card_lib.reused_head(
    {
      "name": "simkd",
      "factor": _factor(student, weights.projector, factor),
      # The loop projects the feature before the last one, the pooled.
      "student_map": f"stage{len(stages)}",
    },
    names=[theirs.card["architecture"]],
    weights=[1.0],
    maps=[last.shape[1:]],
  )
  head = theirs.variables["params"][theirs.network.head]
  classifier = pytorch.tensors_from_variables({"params": head})
  try:
    variables = simkd_parts.from_parts(
      card, variables, weights.projector, classifier
    )
  except ValueError as error:
    raise ValueError(f"{student}: {error}") from error
  return _save(Model(card, variables), to)


def _open_teacher(
  path: pathlib.Path, model_name: str | None, num_classes: int | None
) -> Model:
  """Open a teacher; only its network matters, not its data."""
  if files.is_weights_file(path):
    weights = files.read(path)
    if weights.card is None:
      name, classes, variables = opening.read_network(
        path, weights, model_name, num_classes
      )
      card = {
        "architecture": name,
        "num_classes": classes,
        "dtype": "float32",
        "head": None,
      }
      return Model(card, variables)
  return opening.open_model(
    path, model_name=model_name, num_classes=num_classes
  )


def _factor(
  path: pathlib.Path, projector: Mapping[str, np.ndarray], given: int | None
) -> int:
  """Read the projector's factor off its tensors' shapes."""
  first, last = (projector.get(f"transfer.{i}.weight") for i in (0, 6))
  if first is None or last is None or not first.size or not last.size:
    raise ValueError(
      f"{path}: expected the projector of SimKD under 'proj', got"
      f" {', '.join(list(projector)[:4])}"
    )
  middle, channels = len(first), len(last)
  factor = channels // middle if given is None else given
  if factor < 1 or channels // factor != middle:
    raise ValueError(
      f"{path}: expected a projector whose middle has the teacher's channels"
      f" over --factor, got {middle} of {channels} channels and the factor"
      f" {factor}. Leave --factor out, and check the file"
    )
  return factor
