"""Students that stand alone, in the forms that other tools read.

    python -m kd_jax export --workdir RUN --to DIR
    python -m kd_jax export --model DIR --to student.stablehlo --fold_batch_norm

A folder holds `checkpoint/` (a nested dict of arrays, `params` and
`batch_stats`, which plain Orbax restores) and `model.json`, its card
(architecture, classes, normalisation, accuracy). A SimKD student's arrays are
those of its network, of its projector and of its teacher's classifier: it
needs no other file.

A --to that ends in .pth, .safetensors or .npz gets state dicts under the
reference toolboxes' names; one that ends in .stablehlo a program that any JAX
runs, with the weights inside or beside.
"""

import argparse
import pathlib

from kd_jax.interop import formats, store
from kd_jax.runs import finished, logs


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax export",
    description="Writes a student as a model that stands alone.",
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", type=pathlib.Path, help="folder of a run")
  source.add_argument("--model", help="an export, or a finished run's workdir")
  parser.add_argument(
    "--to",
    required=True,
    type=pathlib.Path,
    help="folder to write, or new file: .pth, .safetensors, .npz (state dicts)"
    " or .stablehlo (a program)",
  )
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
    help="of the arithmetic and of the kernels (default: as it was trained)",
  )
  parser.add_argument(
    "--weights_beside",
    action="store_true",
    help="of a .stablehlo program: weights in a .safetensors file beside it",
  )
  args = parser.parse_args()
  logs.configure_logging()
  try:
    model = (
      store.load(args.model)
      if args.workdir is None
      else finished.run_model(args.workdir.absolute(), weights=args.weights)
    )
    model = formats.transform(
      model, fold_batch_norm=args.fold_batch_norm, dtype=args.dtype
    )
    words = formats.save(model, args.to, weights_inside=not args.weights_beside)
  except (ValueError, ImportError) as error:
    parser.exit(2, f"{error}\n")
  print(f"{args.to}: {words}")
