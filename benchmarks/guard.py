"""Guards the train step's speed: ratios of timings, kept for each commit.

    python -m benchmarks.guard            # measures, appends to the history
    python -m benchmarks.guard --check    # measures, compares, appends nothing

Seconds depend on the machine; that kd_jax's step takes so many times as long
as eager PyTorch's, or as its own parts, hardly does. In at most two minutes on
2 cores it measures ResNet-32x4 -> ResNet-8x4 on the cells below, turn by turn,
and divides:

  simkd / eager   images/s of kd_jax's SimKD step, on as many devices as a run
                  takes, over eager PyTorch's
  none / eager    likewise of training the student alone
  simkd / parts   ms of the SimKD step over those of its parts, the teacher's
                  forward pass and the student's own step

A line of benchmarks/history.jsonl is a measurement: ratios, hardware, versions,
commit. --check compares with the last line of the same kind of hardware, and
ends with exit code 1 if a ratio is worse by more than --tolerance. On a busy
machine nothing is appended: other programs do not slow all cells alike.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import step

HISTORY = pathlib.Path(__file__).resolve().parent / "history.jsonl"
# Of each ratio, whether more is better.
RATIOS = {"simkd / eager": True, "none / eager": True, "simkd / parts": False}
# Per core, in the last minute.
IDLE = 0.5
_WORKS = (("none", ("jax", "eager")), ("simkd", ("jax", "eager", "teacher")))


def measure_cells(args: argparse.Namespace) -> dict[str, Any]:
  """Measures what the ratios need, as `benchmarks.step` does."""
  cells = []
  for method, sides in _WORKS:
    options = [
      *("--pairs", args.pair, "--methods", method, "--sides", *sides),
      *("--batch", str(args.batch), "--steps", str(args.steps)),
      *("--turns", str(args.turns), "--dtype", "float32"),
      *("--examples", str(4 * args.batch), "--workers", "0"),
      *("--steps_per_dispatch", "1", "--weights", args.weights),
    ]
    cells += step.make_cells(step.parse(options))
  out = pathlib.Path(args.weights) / "guard.json"
  out.unlink(missing_ok=True)  # to measure anew
  return step.measure_all(
    cells, out=out, seconds=args.seconds, together=lambda _: None
  )


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
  """Divides the cells' medians.

  Raises:
    SystemExit: if a cell was not measured, with its error.
  """
  ms = {}
  for row in rows:
    name = (row["cell"]["work"]["method"], row["cell"]["side"])
    if "error" in row["result"]:
      raise SystemExit(
        f"{' '.join(name)}: expected a measurement, got"
        f" {row['result']['error']!r}. Give it more --seconds, or put it right"
      )
    ms[name] = row["result"]["ms_per_step"]
  parts = ms["simkd", "teacher"] + ms["none", "jax"]
  return {
    "simkd / eager": ms["simkd", "eager"] / ms["simkd", "jax"],
    "none / eager": ms["none", "eager"] / ms["none", "jax"],
    "simkd / parts": ms["simkd", "jax"] / parts,
  }


def entry(result: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
  """A line of the history."""
  rows = result["rows"]
  found = ratios(rows)
  hardware = result["hardware"]
  return {
    "commit": result["commit"],
    "date": result["date"],
    "ratios": {name: round(value, 4) for name, value in found.items()},
    "pair": args.pair,
    "batch": args.batch,
    "kind": {
      "cpu": hardware["cpu"],
      "cores": hardware["cores"],
      "devices": sorted(
        {
          f"{row['result']['devices']} {row['result']['device']}"
          for row in rows
          if row["cell"]["side"] == "jax"
        }
      ),
    },
    "load_average": hardware["load_average"],
    "versions": result["versions"],
  }


def last_like(
  new: dict[str, Any], history: pathlib.Path
) -> dict[str, Any] | None:
  """The last line of the same work on the same kind of hardware."""
  lines = history.read_text().splitlines() if history.exists() else []
  for line in reversed(lines):
    old = json.loads(line)
    if all(old[k] == new[k] for k in ("kind", "pair", "batch")):
      return old
  return None


def worse(
  new: dict[str, Any], old: dict[str, Any], tolerance: float
) -> list[str]:
  """Says of each ratio that is worse by more than the tolerance, how much."""
  found = []
  for name, more_is_better in RATIOS.items():
    before, now = old["ratios"][name], new["ratios"][name]
    loss = before / now - 1 if more_is_better else now / before - 1
    if loss > tolerance:
      found.append(
        f"{name}: {now:.3f}, worse by {loss:.0%} than {before:.3f} of"
        f" {old['commit'][:12]}, and {tolerance:.0%} are allowed"
      )
  return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  """The arguments."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--check", action="store_true")
  add("--tolerance", type=float, default=0.15)
  add("--pair", default="resnet32x4:resnet8x4")
  add("--batch", type=int, default=16)
  add("--steps", type=int, default=4)
  add("--turns", type=int, default=5)
  add("--seconds", type=float, default=120)
  add("--weights", default="runs/benchmarks/weights")
  add("--history", default=str(HISTORY))
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures, and appends or compares."""
  args = parse(arguments)
  load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
  if load > IDLE * cores and not args.check:
    raise SystemExit(
      f"the machine is busy: expected a load of at most {IDLE * cores:.1f} on"
      f" {cores} cores, got {load:.1f}. Nothing was measured; wait until other"
      " programs are done"
    )
  new = entry(measure_cells(args), args)
  for name, value in new["ratios"].items():
    print(f"{name:<14} {value:.3f}")
  history = pathlib.Path(args.history)
  if not args.check:
    with history.open("a") as file:
      file.write(json.dumps(new) + "\n")
    print(f"appended to {history}")
    return
  old = last_like(new, history)
  if old is None:
    print(f"nothing to compare with: {history} has no line of this hardware")
    return
  if found := worse(new, old, args.tolerance):
    raise SystemExit("\n".join(found))
  print(f"no worse than {old['commit'][:12]} of {old['date']}")


if __name__ == "__main__":
  main()
