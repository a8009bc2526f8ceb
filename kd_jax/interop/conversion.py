"""Converts foreign weights, and SimKD students, to exports."""

import pathlib
from collections.abc import Mapping

import numpy as np

from kd_jax.interop import card as card_lib
from kd_jax.interop import files, formats, opening, pytorch, simkd_parts
from kd_jax.interop import model as model_lib
from kd_jax.interop.model import Model


def convert(
  source: pathlib.Path,
  to: pathlib.Path,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  origin: opening.Origin = opening.UNKNOWN,
) -> str:
  """Converts one model.

  Args:
    source: see `open_model`.
    to: see `export.save`.
    model_name: see `open_model`.
    num_classes: see `open_model`.
    origin: see `open_model`.

  Returns:
    What was written, in words.

  Raises:
    ValueError: if the source cannot be read or does not fit, if the target is
      taken, or if the data has to be named. Nothing is written then.
    ImportError: if it takes PyTorch and there is none.
  """
  if to.suffix.lower() in files.SUFFIXES:
    files.check_new(to)
    if origin == opening.UNKNOWN and files.is_weights_file(source):
      weights = files.read(source)
      if weights.card is None:  # nor will there be one: no data to be named
        name, classes, variables = opening._network(
          source, weights, model_name, num_classes
        )
        files.write(to, {"model": pytorch.to_state_dict(name, variables)})
        return f"{name}, {classes} classes, a state dict"
  model = opening.open_model(
    source, model_name=model_name, num_classes=num_classes, origin=origin
  )
  return f"{formats.save(model, to)}, for images like those of" + (
    f" {model.card['trained_on']}"
  )


def convert_simkd(
  student: pathlib.Path,
  teacher: pathlib.Path,
  to: pathlib.Path,
  *,
  student_model: str | None = None,
  teacher_model: str | None = None,
  num_classes: int | None = None,
  factor: int | None = None,
  origin: opening.Origin = opening.UNKNOWN,
) -> str:
  """Makes one model of a student of SimKD's training loop and its teacher.

  That loop saves the student's network (`model`) and projector (`proj`), but
  not the teacher's classifier, through which the student predicts.

  Args:
    student: the student's file.
    teacher: the teacher's file of weights, export or finished run.
    to: see `export.save`.
    student_model: one of `kd_jax.models.names()`; None: the one that fits.
    teacher_model: the teacher's; None: the one that fits.
    num_classes: of the data; None: as the teacher has.
    factor: of the projector; None: as its tensors have.
    origin: see `open_model`.

  Returns:
    What was written, in words.

  Raises:
    ValueError: if a file cannot be read or does not fit, if the target is
      taken, or if the data has to be named. Nothing is written then.
    ImportError: if it takes PyTorch and there is none.
  """
  if to.suffix.lower() in files.SUFFIXES:
    files.check_new(to)
  weights = files.read(student)
  if weights.projector is None:
    raise ValueError(
      f"{student}: expected a SimKD student with 'model' and 'proj', got a"
      " file without a projector. Convert a network alone with --from"
    )
  theirs = _open_teacher(teacher, teacher_model, num_classes)
  num_classes = theirs.card["num_classes"]
  student_model, _ = opening._identify(
    student, weights.tensors, student_model, num_classes
  )
  variables = files.variables(
    student, weights.tensors, model_name=student_model, num_classes=num_classes
  )
  card = opening._card(student_model, num_classes, origin)
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
  return (
    f"{formats.save(Model(card, variables), to)}, for images like those"
    + (f" of {card['trained_on']}")
  )


def _open_teacher(
  path: pathlib.Path, model_name: str | None, num_classes: int | None
) -> Model:
  """A teacher of which only the network matters, not what it was trained on."""
  if files.is_weights_file(path):
    weights = files.read(path)
    if weights.card is None:
      name, classes, variables = opening._network(
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
  """The projector's factor, as the shapes of its tensors have it."""
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
