"""Converts weights from other toolboxes, and to them.

    python -m kd_jax convert --from weights.pth --to DIR

writes an export, which evaluates, predicts and teaches like any other. The
ending of --to names other forms, see `kd_jax.interop.formats.save`. --from may
be an export or a finished run as well. A student of SimKD's own training loop
comes without its teacher's classifier:

    python -m kd_jax convert --simkd_student student.pth \\
        --teacher teacher.pth --to DIR

makes one model of both files.
"""

import argparse

from kd_jax.cli import arguments
from kd_jax.interop import conversion, naming, opening


def main() -> None:
  """Run the command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax convert",
    description="Converts weights from other toolboxes, and to them.",
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument(
    "--from",
    dest="source",
    type=arguments.path,
    help="file of weights (.pth, .safetensors, .npz); an export or a run",
  )
  source.add_argument(
    "--simkd_student",
    type=arguments.path,
    help="student file of SimKD's training loop (needs --teacher)",
  )
  arguments.add_target_argument(parser)
  arguments.add_origin_arguments(parser)
  parser.add_argument(
    "--prefix",
    help="of --from: first part of the names that are meant, or the key that"
    " they stand under, such as student or model_ema",
  )
  parser.add_argument(
    "--rename",
    default="",
    help="of --from: texts to replace in names, such as"
    " stage=layer,shortcut=downsample",
  )
  parser.add_argument(
    "--model_name", help="name of the network (default: the one that fits)"
  )
  parser.add_argument(
    "--num_classes", type=int, help="its classes (default: as the file has)"
  )
  parser.add_argument(
    "--teacher",
    type=arguments.path,
    help="of the SimKD student: file of weights, export or run",
  )
  parser.add_argument(
    "--teacher_name", help="name of its network (default: the one that fits)"
  )
  parser.add_argument(
    "--factor", type=int, help="of the projector (default: as the file has)"
  )
  args = parser.parse_args()
  if args.source is None and args.teacher is None:
    parser.error(
      "--simkd_student needs --teacher: the student predicts with its"
      " classifier"
    )
  for name in ("teacher", "teacher_name", "factor"):
    if args.source is not None and getattr(args, name) is not None:
      parser.error(f"--{name} goes with --simkd_student, not --from")
  options = {
    "num_classes": args.num_classes,
    "origin": opening.Origin(args.data, args.image_size),
  }
  with arguments.exit_on_error(parser):
    if args.source is not None:
      rename = naming.parse_rename(args.rename) if args.rename else ()
      words = conversion.convert(
        args.source,
        args.to,
        model_name=args.model_name,
        names=naming.Names(args.prefix, rename),
        **options,
      )
    else:
      words = conversion.convert_simkd(
        args.simkd_student,
        args.teacher,
        args.to,
        model_name=args.model_name,
        teacher_name=args.teacher_name,
        factor=args.factor,
        **options,
      )
    print(f"{args.to}: {words}")
