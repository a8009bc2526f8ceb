"""Tables, figures and a page of finished runs.

python -m kd_jax report RUNS
python -m kd_jax report RUNS --analysis
"""

import argparse

from kd_jax import reporting
from kd_jax.cli import arguments


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="kd_jax report",
    description="Prints a table of the finished runs at or below a folder, and"
    " writes it (table.md, table.csv), their curves (.png, .svg), a page with"
    " both (report.html) and TensorBoard's view of their settings (hparams).",
  )
  parser.add_argument("runs", type=arguments.path, help="folder of runs")
  parser.add_argument(
    "--to", type=arguments.path, help="folder to write into (default: RUNS)"
  )
  parser.add_argument(
    "--analysis",
    action="store_true",
    help="compare students with their teachers on the test set too: agreement,"
    " correlations of logits, features",
  )
  parser.add_argument(
    "--data_dir",
    help="folder of the data set for --analysis (default: as the runs had it)",
  )
  args = parser.parse_args()
  with arguments.exit_on_error(parser):
    reporting.require_packages()
    from kd_jax.reporting import report

    text, paths = report.write_report(
      args.runs, args.to, analysed=args.analysis, data_dir=args.data_dir
    )
  print(text)
  print(*paths, sep="\n")
