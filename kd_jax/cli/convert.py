"""Makes weights of other toolboxes this package's own, and back.

    python -m kd_jax convert --from weights.pth --model resnet32x4 --to DIR

writes an export, which evaluates, predicts and teaches like any other; a
`--to` that ends in .pth, .safetensors or .npz gets state dicts under the
reference toolboxes' names instead, and one in .stablehlo a program; see
`kd_jax.export`. `--from` may be an export or a finished run as well. A student
of SimKD's own training loop comes without its teacher's classifier:

    python -m kd_jax convert --simkd_student student.pth --model resnet8x4 \\
        --teacher teacher.pth --teacher_model resnet32x4 --to DIR

makes one model of both files.
"""

import argparse
import pathlib

from kd_jax.interop import conversion, opening
from kd_jax.runs import logs


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


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax convert",
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
  logs.configure_logging()
  options = {
    "num_classes": args.num_classes,
    "origin": opening.Origin(args.data, args.image_size),
  }
  try:
    if args.source is not None:
      for name in ("teacher", "teacher_model", "factor"):
        if getattr(args, name) is not None:
          raise ValueError(f"--{name} goes with --simkd_student, not --from")
      words = conversion.convert(
        args.source, args.to, model_name=args.model, **options
      )
    else:
      if args.teacher is None:
        raise ValueError(
          "--simkd_student needs --teacher: through its classifier the student"
          " predicts"
        )
      words = conversion.convert_simkd(
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
