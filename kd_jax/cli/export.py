"""Writes a student as a model that stands alone.

    python -m kd_jax export --workdir RUN --to DIR
    python -m kd_jax export --model DIR --to student.stablehlo --fold_batch_norm

The ending of --to names the form, see `kd_jax.interop.formats.save`.
"""

import argparse

from kd_jax import models
from kd_jax.cli import arguments
from kd_jax.interop import formats, opening
from kd_jax.runs import finished


def main() -> None:
  """Run the command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax export",
    description="Writes a student as a model that stands alone.",
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", type=arguments.path, help="folder of a run")
  arguments.add_model_arguments(parser, source)
  arguments.add_target_argument(parser)
  parser.add_argument(
    "--weights",
    choices=("best", "last"),
    default="best",
    help="of --workdir: highest test top-1, or newest checkpoint (default:"
    " best)",
  )
  parser.add_argument(
    "--fold_batch_norm",
    action="store_true",
    help="fold BatchNorm into the convolutions",
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    help="of the arithmetic and the kernels (default: as it was trained)",
  )
  parser.add_argument(
    "--weights_beside",
    action="store_true",
    help="put the weights of a .stablehlo program into a .safetensors file"
    " beside it",
  )
  args = parser.parse_args()
  with arguments.exit_on_error(parser):
    if args.model_name is not None:
      models.entry(args.model_name)  # imports a network of the user's own
    model = (
      opening.open_model(args.model, model_name=args.model_name)
      if args.workdir is None
      else finished.run_model(args.workdir.absolute(), weights=args.weights)
    )
    model = formats.transform(
      model, fold_batch_norm=args.fold_batch_norm, dtype=args.dtype
    )
    words = formats.save(model, args.to, weights_inside=not args.weights_beside)
    print(f"{args.to}: {words}")
