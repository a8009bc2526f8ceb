"""Makes weights of other toolboxes this package's own, and back.

    python -m kd_jax.convert --from weights.pth --model resnet32x4 --to DIR

writes an export, which evaluates, predicts and teaches like any other; a
`--to` that ends in .pth, .safetensors or .npz gets state dicts under the
reference toolboxes' names instead, and one in .stablehlo a program; see
`kd_jax.export`. `--from` may be an export or a finished run as well. A student
of SimKD's own training loop comes without its teacher's classifier:

    python -m kd_jax.convert --simkd_student student.pth --model resnet8x4 \\
        --teacher teacher.pth --teacher_model resnet32x4 --to DIR

makes one model of both files.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kd_jax import data, export, inference, models, setup
from kd_jax.inference import Model
from kd_jax.interop import files, guess, pytorch, reused

# Assumed of a network with this many classes, if its data is not named.
_LIKELY_DATA = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}


@dataclasses.dataclass(frozen=True)
class Origin:
  """What to assume of weights whose file does not say it.

  Attributes:
    data_name: what they were trained on, see `kd_jax.data.constants`: the
      names of the classes and the normalisation. None: CIFAR or ImageNet, as
      the network and its classes have it.
    image_size: pixels, height and width; None: as that data has.
    source: a set that they were trained on, or that is like it; it goes before
      the other two.
  """

  data_name: str | None = None
  image_size: int | None = None
  source: data.Source | data.EncodedSource | None = None


UNKNOWN = Origin()


def open_model(
  path: pathlib.Path,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  origin: Origin = UNKNOWN,
) -> Model:
  """Reads a model of any form: a file of weights, an export, a finished run.

  Args:
    path: of it.
    model_name: one of `kd_jax.models.names()`; None: the one that fits.
    num_classes: of the classifier; None: as the file has.
    origin: what to assume of a file without a model card.

  Returns:
    The model.

  Raises:
    ValueError: if it cannot be read or does not fit, or if the data has to be
      named.
    ImportError: if it takes PyTorch and there is none.
  """
  if files.is_weights_file(path):
    model = _open_file(path, model_name, num_classes, origin)
  else:
    model = export.load(path)
  for what, wanted, key in (
    ("model", model_name, "architecture"),
    ("number of classes", num_classes, "num_classes"),
  ):
    if wanted is not None and wanted != model.card[key]:
      raise ValueError(
        f"{path}: expected the {what} that was asked for, {wanted}, got"
        f" {model.card[key]}. Ask for that, or for none"
      )
  return model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --model and --model_name, which say what to open."""
  parser.add_argument(
    "--model",
    required=True,
    type=pathlib.Path,
    help="an export, a finished run's workdir, or a file of weights",
  )
  parser.add_argument(
    "--model_name", help="of a file of weights (default: the one that fits)"
  )


def _open_file(
  path: pathlib.Path,
  model_name: str | None,
  num_classes: int | None,
  origin: Origin,
) -> Model:
  weights = files.read(path)
  if weights.card is not None:
    return _with_card(path, weights, weights.card)
  name, classes, variables = _network(path, weights, model_name, num_classes)
  return Model(_card(name, classes, origin), variables)


def _network(
  path: pathlib.Path,
  weights: files.Weights,
  model_name: str | None,
  num_classes: int | None,
) -> tuple[str, int, dict[str, Any]]:
  """The name, classes and variables of a file without a card."""
  tensors = files.network_alone(path, weights)
  name, classes = _identify(path, tensors, model_name, num_classes)
  variables = files.variables(
    path, tensors, model_name=name, num_classes=classes
  )
  return name, classes, variables


def _with_card(
  path: pathlib.Path, weights: files.Weights, card: dict[str, Any]
) -> Model:
  """A model of a file that `export.save` wrote."""
  if card.get("format") != export.FORMAT:
    raise ValueError(
      f"{path}: expected a model card of format {export.FORMAT!r}, got"
      f" {card.get('format')!r}. Write it again with python -m kd_jax.export"
    )
  if card["batch_norm_folded"]:
    raise ValueError(
      f"{path}: expected a network with BatchNorm, got one whose BatchNorm is"
      " folded into its convolutions, which this file cannot give back. Take"
      " the folder that it was written from, or a file that is not folded"
    )
  variables = files.variables(
    path,
    weights.tensors,
    model_name=card["architecture"],
    num_classes=card["num_classes"],
  )
  if card["head"] is not None:
    try:
      variables = reused.from_parts(
        card, variables, weights.projector or {}, weights.classifier or {}
      )
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
  return Model(card, variables)


def name_of(path: pathlib.Path) -> str:
  """The network that a file of weights, an export or a run is of.

  Raises:
    ValueError: if it cannot be read, or is of no network that is known.
    ImportError: if it takes PyTorch and there is none.
  """
  if not files.is_weights_file(path):
    return export.read_card(export.find(path))["architecture"]
  weights = files.read(path)
  if weights.card is not None:
    return weights.card["architecture"]
  return _identify(path, files.network_alone(path, weights), None, None)[0]


def convert(
  source: pathlib.Path,
  to: pathlib.Path,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  origin: Origin = UNKNOWN,
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
    if origin == UNKNOWN and files.is_weights_file(source):
      weights = files.read(source)
      if weights.card is None:  # nor will there be one: no data to be named
        name, classes, variables = _network(
          source, weights, model_name, num_classes
        )
        files.write(to, {"model": pytorch.to_state_dict(name, variables)})
        return f"{name}, {classes} classes, a state dict"
  model = open_model(
    source, model_name=model_name, num_classes=num_classes, origin=origin
  )
  return f"{export.save(model, to)}, for images like those of" + (
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
  origin: Origin = UNKNOWN,
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
  student_model, _ = _identify(
    student, weights.tensors, student_model, num_classes
  )
  variables = files.variables(
    student, weights.tensors, model_name=student_model, num_classes=num_classes
  )
  card = _card(student_model, num_classes, origin)
  shape = card["image_shape"]
  stages = inference.output_shapes(inference.build(card), shape).stages()
  last = inference.output_shapes(theirs.network, shape).features["last"]
  card["method"] = "simkd"
  card["head"] = export.reused_head(
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
    variables = reused.from_parts(
      card, variables, weights.projector, classifier
    )
  except ValueError as error:
    raise ValueError(f"{student}: {error}") from error
  return f"{export.save(Model(card, variables), to)}, for images like those" + (
    f" of {card['trained_on']}"
  )


def _identify(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  model_name: str | None,
  num_classes: int | None,
) -> tuple[str, int]:
  """Fills what was not given from the file."""
  if model_name is None:
    found = guess.guess_model(tensors)
    if found is None:
      raise ValueError(
        f"{path} is of no network that is known here: its"
        f" {len(tensors)} tensors begin with {', '.join(list(tensors)[:3])}."
        f" Name the one it should fit with --model: {', '.join(models.names())}"
      )
    model_name = found.model_name
  if num_classes is None:
    # Without a classifier any number will do: it is reported as missing.
    num_classes = guess.count_classes(model_name, tensors) or 1
  return model_name, num_classes


def _card(model_name: str, num_classes: int, origin: Origin) -> dict[str, Any]:
  """The model card of a network that was trained elsewhere."""
  known: data.Source | data.EncodedSource | data.Constants
  if origin.source is not None:
    known, name = origin.source, origin.source.name
    shape = list(origin.source.image_shape)
    size = None
  else:
    name = origin.data_name or _likely_data(model_name, num_classes)
    known, size = data.constants(name), origin.image_size
    shape = list(known.image_shape)
  if known.num_classes != num_classes:
    raise ValueError(
      f"expected data of {num_classes} classes, as the network has, got"
      f" {name} with {known.num_classes}. Name the data that it was trained on"
    )
  if size is not None:
    if size < 1:
      raise ValueError(f"--image_size: expected 1 pixel or more, got {size}")
    shape[:2] = size, size
  return {
    "format": export.FORMAT,
    "architecture": model_name,
    "num_classes": num_classes,
    "image_shape": shape,
    "dtype": "float32",
    "batch_norm_folded": False,
    "head": None,
    "class_names": list(known.class_names),
    "normalization": export.normalization(known.mean, known.std),
    "trained_on": name,
    "data_options": {} if size is None else {"image_size": size},
    "method": "none",
    "test": {},
  }


def _likely_data(model_name: str, num_classes: int) -> str:
  name = _LIKELY_DATA.get(num_classes)
  if name is not None:
    # A network for ImageNet leaves one pixel of an image of CIFAR's size.
    network = models.create(model_name, num_classes)
    last = inference.output_shapes(network, (32, 32, 3)).features["last"]
    if (name == "imagenet") == (last.shape[1] == 1):
      return name
  raise ValueError(
    "--data: expected the name of the data that the network was trained on,"
    " got none, and there is no telling the normalisation of"
    f" {model_name} with {num_classes} classes. Name data that is alike:"
    " cifar10, cifar100, imagenet, digits"
  )


# SimKD's student.


def _open_teacher(
  path: pathlib.Path, model_name: str | None, num_classes: int | None
) -> Model:
  """A teacher of which only the network matters, not what it was trained on."""
  if files.is_weights_file(path):
    weights = files.read(path)
    if weights.card is None:
      name, classes, variables = _network(
        path, weights, model_name, num_classes
      )
      card = {
        "architecture": name,
        "num_classes": classes,
        "dtype": "float32",
        "head": None,
      }
      return Model(card, variables)
  return open_model(path, model_name=model_name, num_classes=num_classes)


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


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m kd_jax.convert",
    description="Converts weights from other toolboxes, and to them.",
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument(
    "--from",
    dest="source",
    type=pathlib.Path,
    help="file of weights (.pth, .safetensors, .npz); an export or a run",
  )
  source.add_argument(
    "--simkd_student",
    type=pathlib.Path,
    help="student file of SimKD's training loop (needs --teacher)",
  )
  parser.add_argument(
    "--to",
    required=True,
    type=pathlib.Path,
    help="folder for an export, or new file: .pth, .safetensors, .npz (state"
    " dicts) or .stablehlo (a program)",
  )
  parser.add_argument(
    "--model", help="name of the network (default: the one that fits)"
  )
  parser.add_argument(
    "--num_classes", type=int, help="its classes (default: as the file has)"
  )
  parser.add_argument(
    "--data",
    help="what it was trained on: cifar10, cifar100, imagenet, ... (default:"
    " as its classes suggest)",
  )
  parser.add_argument(
    "--image_size", type=int, help="pixels (default: those of the data)"
  )
  parser.add_argument(
    "--teacher",
    type=pathlib.Path,
    help="of the SimKD student: file of weights, export or run",
  )
  parser.add_argument(
    "--teacher_model", help="its name (default: the one that fits)"
  )
  parser.add_argument(
    "--factor", type=int, help="of the projector (default: as it has)"
  )
  args = parser.parse_args()
  setup.configure_logging()
  options = {
    "num_classes": args.num_classes,
    "origin": Origin(args.data, args.image_size),
  }
  try:
    if args.source is not None:
      for name in ("teacher", "teacher_model", "factor"):
        if getattr(args, name) is not None:
          raise ValueError(f"--{name} goes with --simkd_student, not --from")
      words = convert(args.source, args.to, model_name=args.model, **options)
    else:
      if args.teacher is None:
        raise ValueError(
          "--simkd_student needs --teacher: through its classifier the student"
          " predicts"
        )
      words = convert_simkd(
        args.simkd_student,
        args.teacher,
        args.to,
        student_model=args.model,
        teacher_model=args.teacher_model,
        factor=args.factor,
        **options,
      )
  except (ValueError, ImportError) as error:
    parser.exit(2, f"{error}\n")
  print(f"{args.to}: {words}")


if __name__ == "__main__":
  main()
