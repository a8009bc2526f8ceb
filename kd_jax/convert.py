"""Makes weights of other toolboxes this package's own, and back.

    python -m kd_jax.convert --from weights.pth --model resnet32x4 --to DIR

writes an export, which evaluates, predicts and teaches like any other; a
`--to` that ends in .pth, .safetensors or .npz gets a state dict under the
reference toolboxes' names instead, and `--from` may then be an export or a
finished run as well. A student of SimKD's own training loop comes without its
teacher's classifier:

    python -m kd_jax.convert --simkd_student student.pth --model resnet8x4 \\
        --teacher teacher.pth --teacher_model resnet32x4 --to DIR

makes one model of both files.
"""

import argparse
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import data, distillers, export, models, setup
from kd_jax.interop import files, guess, pytorch
from kd_jax.models.layers import ModelOutput

# Assumed of a network with this many classes, if its data is not named.
_LIKELY_DATA = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}


def convert(
  source: pathlib.Path,
  to: pathlib.Path,
  *,
  model_name: str | None = None,
  num_classes: int | None = None,
  data_name: str | None = None,
  image_size: int | None = None,
) -> str:
  """Converts the weights of one network.

  Args:
    source: a file of weights; or, if `to` is such a file, an export or a
      finished run's workdir.
    to: a folder, which gets an export, or a new file of weights.
    model_name: one of `kd_jax.models.names()`; None: the one that fits.
    num_classes: of the classifier; None: as the file has.
    data_name: what it was trained on, see `kd_jax.data.constants`: the names
      of the classes and the normalisation. None: CIFAR or ImageNet, as the
      network and its classes have it.
    image_size: pixels, height and width; None: as that data has.

  Returns:
    What was written, in words.

  Raises:
    ValueError: if the source cannot be read or does not fit, if the target is
      taken, or if the data has to be named. Nothing is written then.
    ImportError: if it takes PyTorch and there is none.
  """
  to_file = to.suffix.lower() in files.SUFFIXES
  if to_file:
    files.check_new(to)
  elif source.is_dir():
    raise ValueError(
      "--to: expected a file that ends in .pth, .safetensors or .npz, got"
      f" {to}: {source} is a folder, which --from takes to write such a file"
    )
  model_name, num_classes, variables = _read(source, model_name, num_classes)
  words = f"{model_name} with {num_classes} classes"
  if to_file:
    files.write(to, pytorch.to_state_dict(model_name, variables))
    return f"{words}, a state dict"
  card = _card(model_name, num_classes, data_name, image_size)
  export.write(to, {"student": variables}, card)
  return f"{words}, for images like those of {card['trained_on']}"


def convert_simkd(
  student: pathlib.Path,
  teacher: pathlib.Path,
  to: pathlib.Path,
  *,
  student_model: str | None = None,
  teacher_model: str | None = None,
  num_classes: int | None = None,
  factor: int | None = None,
  data_name: str | None = None,
  image_size: int | None = None,
) -> str:
  """Makes one model of a student of SimKD's training loop and its teacher.

  That loop saves the student's network (`model`) and projector (`proj`), but
  not the teacher's classifier, through which the student predicts.

  Args:
    student: the student's file.
    teacher: the teacher's file of weights, export or finished run.
    to: a folder, which gets an export.
    student_model: one of `kd_jax.models.names()`; None: the one that fits.
    teacher_model: the teacher's; None: the one that fits.
    num_classes: of the data; None: as the teacher has.
    factor: of the projector; None: as its tensors have.
    data_name: see `convert`.
    image_size: see `convert`.

  Returns:
    What was written, in words.

  Raises:
    ValueError: if a file cannot be read or does not fit, if the target is
      taken, or if the data has to be named. Nothing is written then.
    ImportError: if it takes PyTorch and there is none.
  """
  if to.suffix.lower() in files.SUFFIXES:
    raise ValueError(
      f"--to: expected a folder, got {to}: this student is three parts, which"
      " no state dict of one network can hold"
    )
  weights = files.read(student)
  if weights.projector is None:
    raise ValueError(
      f"{student}: expected a SimKD student with 'model' and 'proj', got a"
      " file without a projector. Convert a network alone with --from"
    )
  teacher_model, num_classes, teacher_variables = _read(
    teacher, teacher_model, num_classes
  )
  student_model, _ = _identify(
    student, weights.tensors, student_model, num_classes
  )
  student_variables = files.variables(
    student, weights.tensors, model_name=student_model, num_classes=num_classes
  )
  card = _card(student_model, num_classes, data_name, image_size)
  outputs = [
    _output(name, num_classes, tuple(card["image_shape"]))
    for name in (student_model, teacher_model)
  ]
  fields = {
    "name": "simkd",
    "factor": _factor(student, weights.projector, factor),
    # The loop projects the feature before the last one, the pooled.
    "student_map": f"stage{len(outputs[0].stages())}",
  }
  head = models.create(teacher_model, 1).head
  tree = {
    "student": student_variables,
    "distiller": _projector(student, weights.projector, fields, outputs),
    "teacher_classifier": {head: teacher_variables["params"][head]},
  }
  card["method"] = "simkd"
  card["head"] = {
    "distiller": fields,
    "teacher": teacher_model,
    "teacher_map": list(outputs[1].features["last"].shape[1:]),
  }
  export.write(to, tree, card)
  return (
    f"{student_model} with the classifier of {teacher_model}, {num_classes}"
    f" classes, for images like those of {card['trained_on']}"
  )


def _read(
  path: pathlib.Path, model_name: str | None, num_classes: int | None
) -> tuple[str, int, dict[str, Any]]:
  """A network's name, classes and variables, from a file or a folder."""
  if not path.is_dir():
    tensors = files.read_tensors(path)
    name, classes = _identify(path, tensors, model_name, num_classes)
    variables = files.variables(
      path, tensors, model_name=name, num_classes=classes
    )
    return name, classes, variables
  model = export.load(path)
  if model.card["head"] is not None:
    raise ValueError(
      f"{path}: expected a network with a classifier of its own, got a"
      f" {model.card['method']} student, which predicts through another's: no"
      " state dict of one network can hold it"
    )
  for what, wanted, key in (
    ("model", model_name, "architecture"),
    ("number of classes", num_classes, "num_classes"),
  ):
    if wanted is not None and wanted != model.card[key]:
      raise ValueError(
        f"{path}: expected the {what} that was asked for, {wanted}, got"
        f" {model.card[key]}. Ask for that, or for none"
      )
  card = model.card
  return card["architecture"], card["num_classes"], model.variables["student"]


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


def _output(
  model_name: str, num_classes: int, image_shape: tuple[int, ...]
) -> Any:
  """The shapes of what a network returns for one image."""
  model = models.create(model_name, num_classes)
  init = functools.partial(model.init_with_output, train=False)
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  return jax.eval_shape(init, jax.random.key(0), image)[0]


def _card(
  model_name: str,
  num_classes: int,
  data_name: str | None,
  image_size: int | None,
) -> dict[str, Any]:
  """The model card of a network that was trained elsewhere."""
  if data_name is None:
    data_name = _likely_data(model_name, num_classes)
  known = data.constants(data_name)
  if known.num_classes != num_classes:
    raise ValueError(
      f"--data: expected data of {num_classes} classes, as the network has,"
      f" got {data_name} with {known.num_classes}"
    )
  shape = list(known.image_shape)
  if image_size is not None:
    if image_size < 1:
      raise ValueError(
        f"--image_size: expected 1 pixel or more, got {image_size}"
      )
    shape[:2] = image_size, image_size
  return {
    "format": export.FORMAT,
    "architecture": model_name,
    "num_classes": num_classes,
    "image_shape": shape,
    "dtype": "float32",
    "head": None,
    "class_names": list(known.class_names),
    "normalization": {
      "mean": list(known.mean),
      "std": list(known.std),
      "of": "pixel / 255, per channel: (x - mean) / std",
    },
    "trained_on": data_name,
    "data_options": {} if image_size is None else {"image_size": image_size},
    "method": "none",
    "test": {},
  }


def _likely_data(model_name: str, num_classes: int) -> str:
  name = _LIKELY_DATA.get(num_classes)
  if name is not None:
    # A network for ImageNet leaves one pixel of an image of CIFAR's size.
    last = _output(model_name, num_classes, (32, 32, 3)).features["last"]
    if (name == "imagenet") == (last.shape[1] == 1):
      return name
  raise ValueError(
    "--data: expected the name of the data that the network was trained on,"
    " got none, and there is no telling the normalisation of"
    f" {model_name} with {num_classes} classes. Name data that is alike:"
    " cifar10, cifar100, imagenet, digits"
  )


# SimKD's student.


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


def _projector_name(path: tuple[str, ...]) -> str:
  """("projector", "conv2") -> "transfer.3": every layer has three places."""
  kind, number = path[-1][:-1], int(path[-1][-1])
  return f"transfer.{3 * (number - 1) + ('conv', 'bn').index(kind)}"


def _projector(
  path: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  fields: Mapping[str, Any],
  outputs: list[ModelOutput],
) -> dict[str, Any]:
  """The distiller's variables from the projector's tensors."""
  options = dict(fields)
  distiller = distillers.create(options.pop("name"), **options)
  student, teacher = outputs

  def init(key, student, teacher):
    return distiller.init(
      key,
      student,
      teacher,
      teacher_classifier=lambda pooled: pooled,
      method="predict",
    )

  try:
    template = jax.eval_shape(init, jax.random.key(0), student, teacher)
    return pytorch.variables_from_tensors(
      template,
      tensors,
      rename=_projector_name,
      what=f"the projector from {fields['student_map']} of the student to the"
      " teacher's map",
    )
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


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
    help="folder for an export, or new file for a state dict",
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
    "data_name": args.data,
    "image_size": args.image_size,
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
