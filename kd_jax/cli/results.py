"""Results to keep: of each finished run what its numbers were made of.

    python -m kd_jax results runs/table --to results/cifar100/table
    python -m kd_jax results results/cifar100 --readme README.md

The first gathers the finished runs of a workdir: `result.json`, `config.json`,
`environment.json` (the command, versions, hardware) and `metrics.jsonl.gz` of
each, a few kilobytes without a path of the machine. `kd_jax.report` reads such
a folder as it reads runs. The second writes the tables of what has been
gathered into a document, between the lines `BEGIN` and `END`.
"""

import argparse
import pathlib

from kd_jax.reporting import gather as gather_lib


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax results",
    description="Gathers what is worth keeping of finished runs, or writes the"
    " tables of what has been gathered into a document.",
  )
  parser.add_argument(
    "folder", type=pathlib.Path, help="of runs; for --readme, of results"
  )
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--to", type=pathlib.Path, help="folder to gather into")
  action.add_argument(
    "--readme", type=pathlib.Path, help="document to write tables into"
  )
  args = parser.parse_args()
  try:
    if args.to is not None:
      print(*gather_lib.gather(args.folder, args.to), sep="\n")
      return
    text = args.readme.read_text(encoding="utf-8")
    try:
      new = gather_lib.rewrite(text, gather_lib.tables(args.folder))
    except ValueError as error:
      raise ValueError(f"{args.readme}: {error}") from error
    args.readme.write_text(new, encoding="utf-8")
    print(f"{args.readme}: {'unchanged' if new == text else 'written'}")
  except (ValueError, OSError) as error:
    parser.exit(2, f"{error}\n")
