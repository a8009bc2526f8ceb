"""Results to keep, and their tables in a document.

    python -m kd_jax results runs/table --to results/cifar100/table
    python -m kd_jax results results/cifar100 --readme README.md

The first gathers the finished runs of a workdir; the second writes the tables
of what has been gathered into a document, see `kd_jax.reporting.gather`.
"""

import argparse

from kd_jax import reporting, storage
from kd_jax.cli import arguments


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax results",
    description="Gathers the results of finished runs, or writes the tables of"
    " gathered results into a document.",
  )
  parser.add_argument(
    "folder", type=arguments.path, help="of runs; for --readme, of results"
  )
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--to", type=arguments.path, help="folder to gather into")
  action.add_argument(
    "--readme", type=arguments.path, help="document to write tables into"
  )
  args = parser.parse_args()
  with arguments.exit_on_error(parser):
    reporting.require_packages()
    from kd_jax.reporting import gather

    if args.to is not None:
      print(*gather.gather(args.folder, args.to), sep="\n")
      return
    text = args.readme.read_text(encoding="utf-8")
    try:
      new = gather.rewrite(text, gather.tables(args.folder))
    except ValueError as error:
      raise ValueError(f"{args.readme}: {error}") from error
    if new != text:
      storage.write_whole(args.readme, new)
    print(f"{args.readme}: {'unchanged' if new == text else 'written'}")
