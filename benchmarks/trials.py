"""Trials trained at once, beside the same trials one after another.

    python -m benchmarks.trials [--pairs TEACHER:STUDENT ...] [--trials 4 ...]

Both are kd_jax's train chunk on made-up images, as `config.trials_together`
and `config.trials` have it, in one process and by turns. A turn of --steps
steps is timed; "alone" is a single student's, times the number of trials.
Compiling is the first dispatch, less a later one. Prints a table and writes a
JSON file.
"""

import argparse
import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import measure
from benchmarks import work as work_lib
from benchmarks.step import make_work
from kd_jax.distributed import cpu_environment
from kd_jax.distributed import devices as devices_lib


def compare(
  work: work_lib.Work,
  weights: pathlib.Path,
  *,
  trials: int,
  devices: int,
  steps: int,
  turns: int,
) -> dict[str, Any]:
  """Times a student and several at once, turn by turn.

  Args:
    work: what is trained.
    weights: folder of the initial weights.
    trials: how many at once.
    devices: over which the batch is spread.
    steps: of a turn.
    turns: that are timed.

  Returns:
    For JSON: the timings of both, the ratio of each turn, the seconds that
    both took to compile, and the machine's load average before.
  """
  from benchmarks import jax_side

  work_lib.prepare([work], weights)
  load = list(os.getloadavg())
  programs = [
    jax_side.Program(
      work, weights, steps_per_dispatch=1, devices=devices, trials=count
    )
    for count in (1, trials)
  ]
  compiling = []
  for program in programs:
    marks = [time.perf_counter()]
    for _ in range(2):
      program.run(1)
      marks.append(time.perf_counter())
    compiling.append(marks[1] - marks[0] - (marks[2] - marks[1]))
  timings: list[tuple[float, ...]] = []
  for _ in range(turns):
    alone, together = (
      measure.take_turns(program.run, steps=steps, turns=1)[0]
      for program in programs
    )
    timings.append((trials * alone, together))
  named = zip(("alone", "together"), zip(*timings))
  return {
    "work": dataclasses.asdict(work),
    "trials": trials,
    "devices": devices,
    **{name: measure.summary("ms_per_step", ms) for name, ms in named},
    "ratios": [a / b for a, b in timings],
    "compile_seconds": compiling,
    "load_average": load,
  }


def report(rows: Sequence[dict[str, Any]]) -> str:
  """A table of what `compare` has found."""
  head = (
    *("pair", "method", "batch", "trials", "alone, ms", "together, ms"),
    *("ratio", "least", "most", "compiling, s"),
  )
  lines = []
  for row in rows:
    work, ratios = row["work"], sorted(row["ratios"])
    alone, together = (
      row[name]["ms_per_step"] for name in ("alone", "together")
    )
    lines.append(
      (
        *(f"{work['teacher']}:{work['student']}", work["method"]),
        *(str(work["batch"]), str(row["trials"])),
        *(f"{alone:.0f}", f"{together:.0f}", f"{alone / together:.2f}"),
        *(f"{ratios[0]:.2f}", f"{ratios[-1]:.2f}"),
        " and ".join(f"{s:.1f}" for s in row["compile_seconds"]),
      )
    )
  return measure.table(head, lines)


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures, prints and writes."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  methods = [name for name in work_lib.METHODS if name != "none"]
  add("--pairs", nargs="+", default=[work_lib.PAIRS[0]])
  add("--methods", nargs="+", choices=methods, default=["kd", "simkd"])
  add("--trials", type=int, nargs="+", default=[4])
  add("--batch", type=int, default=64)
  add("--devices", type=int, help="default: all; of a CPU, each core")
  add("--steps", type=int, default=2, help="of a turn")
  add("--turns", type=int, default=5)
  add("--examples", type=int, default=512, help="in the training set")
  add("--image_size", type=int, help="in pixels (32; of ResNets 224)")
  add("--negatives", type=int, default=16384, help="of crd")
  add("--weights", default="runs/benchmarks/weights")
  add("--out", default="runs/benchmarks/trials.json")
  args = parser.parse_args(arguments)
  devices_lib.split_cpu(args.batch)
  result = measure.head()
  result["hardware"]["device"] = jax.devices()[0].device_kind
  result["hardware"]["platform"] = jax.default_backend()
  rows = []
  for pair, method, trials in itertools.product(
    args.pairs, args.methods, args.trials
  ):
    work = make_work(pair, method, args.batch, args)
    rows.append(
      compare(
        work,
        pathlib.Path(args.weights),
        trials=trials,
        devices=args.devices or jax.device_count(),
        steps=args.steps,
        turns=args.turns,
      )
    )
  out = pathlib.Path(args.out)
  measure.write(out, {**result, "rows": rows})
  print(report(rows))
  print(f"written: {out}")


if __name__ == "__main__":
  cpu_environment.restart_prepared()
  main()
