"""Tables, figures and a page from finished runs.

    python -m kd_jax report RUNS
    python -m kd_jax report RUNS --analysis

Runs that differ in their seed alone are trials of one line. Accuracies are of
the test set, in percent: after the last epoch, and at the best one, which was
chosen on the test set.
"""

import argparse
import pathlib

from kd_jax.reporting import report, runs


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax report",
    description="Prints a table of the finished runs at or below a folder, and"
    " writes it (table.md, table.csv), their curves (.png, .svg), a page with"
    " both (report.html) and TensorBoard's view of their settings (hparams).",
  )
  parser.add_argument("runs", type=pathlib.Path, help="folder of runs")
  parser.add_argument(
    "--to", type=pathlib.Path, help="folder to write into (default: RUNS)"
  )
  parser.add_argument(
    "--analysis",
    action="store_true",
    help="compare students with their teachers on the test set too: agreement,"
    " correlations of logits, features",
  )
  parser.add_argument(
    "--data_dir",
    help="of --analysis: folder of the data set (default: as the runs had it)",
  )
  args = parser.parse_args()
  try:
    groups = runs.group(runs.collect(args.runs))
    pairs = {}
    if args.analysis:
      pairs = report.analyse(args.runs, groups, args.data_dir)
    paths = report.write(args.runs, args.to or args.runs, pairs)
  except (ValueError, ImportError) as error:
    parser.exit(2, f"{error}\n")
  print(report.text(groups, pairs))
  print(*paths, sep="\n")
