"""Results to keep, and their tables in a document.

    python -m kd_jax results runs/table --to results/cifar100/table
    python -m kd_jax results results/cifar100 --readme README.md
    python -m kd_jax results results/cifar100 --page docs/results.md

The first gathers the finished runs of a workdir. The second writes the short
tables of what has been gathered into a document, the third those of all
published pairs and methods, see `kd_jax.reporting.documents`.
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
    "folder", type=arguments.path, help="of runs; of results but for --to"
  )
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--to", type=arguments.path, help="folder to gather into")
  action.add_argument(
    "--readme", type=arguments.path, help="document to write short tables into"
  )
  action.add_argument(
    "--page", type=arguments.path, help="document to write all tables into"
  )
  args = parser.parse_args()
  with arguments.exit_on_error(parser):
    reporting.require_packages()
    from kd_jax.reporting import documents, gather

    if args.to is not None:
      print(*gather.gather(args.folder, args.to), sep="\n")
      return
    document = args.readme or args.page
    make = documents.tables if args.readme else documents.page
    text = document.read_text(encoding="utf-8")
    try:
      new = documents.rewrite(text, make(args.folder))
    except ValueError as error:
      raise ValueError(f"{document}: {error}") from error
    if new != text:
      storage.write_whole(document, new)
    print(f"{document}: {'unchanged' if new == text else 'written'}")
