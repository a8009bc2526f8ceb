"""Guards the train step's speed: ratios of timings, kept for each commit.

    python -m benchmarks.guard            # measures, appends to the history
    python -m benchmarks.guard --check    # measures, compares, appends nothing

Seconds depend on the machine; ratios hardly do. In at most two minutes on 2
cores it measures ResNet-32x4 -> ResNet-8x4 at batch 16, turn by turn:

  simkd / eager   images/s of kd_jax's SimKD step over eager PyTorch's
  none / eager    likewise of the student alone
  simkd / parts   ms of the SimKD step over the teacher's forward pass and the
                  student's own step

A line of benchmarks/history.jsonl is a measurement. --check compares with the
last line of the same kind of hardware, and exits with code 1 if a ratio is
worse by more than --tolerance. On a busy machine nothing is appended.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import step

HISTORY = pathlib.Path(__file__).resolve().parent / "history.jsonl"
PAIR, BATCH = "resnet32x4:resnet8x4", 16
# Whether more is better.
RATIOS = {"simkd / eager": True, "none / eager": True, "simkd / parts": False}
IDLE = 0.5  # load per core in the last minute
_WORKS = (("none", ("jax", "eager")), ("simkd", ("jax", "eager", "teacher")))


def measure_cells(weights: str, seconds: float) -> dict[str, Any]:
  """Measures what the ratios need, as `benchmarks.step` does."""
  cells = []
  for method, sides in _WORKS:
    options = [
      *("--pairs", PAIR, "--methods", method, "--sides", *sides),
      *("--batch", str(BATCH), "--steps", "4", "--turns", "5"),
      *("--dtype", "float32", "--examples", str(4 * BATCH), "--workers", "0"),
      *("--steps_per_dispatch", "1", "--weights", weights),
    ]
    cells += step.make_cells(step.parse(options))
  out = pathlib.Path(weights) / "guard.json"
  out.unlink(missing_ok=True)  # to measure anew
  return step.measure_all(
    cells, out=out, seconds=seconds, together=lambda _: None
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
  found = {
    "simkd / eager": ms["simkd", "eager"] / ms["simkd", "jax"],
    "none / eager": ms["none", "eager"] / ms["none", "jax"],
    "simkd / parts": ms["simkd", "jax"] / parts,
  }
  return {name: round(value, 4) for name, value in found.items()}


def entry(result: dict[str, Any]) -> dict[str, Any]:
  """A line of the history."""
  hardware = result["hardware"]
  devices = {
    f"{row['result']['devices']} {row['result']['device']}"
    for row in result["rows"]
    if row["cell"]["side"] == "jax" and "devices" in row["result"]
  }
  return {
    "commit": result["commit"],
    "date": result["date"],
    "ratios": ratios(result["rows"]),
    "pair": PAIR,
    "batch": BATCH,
    "kind": {
      "cpu": hardware["cpu"],
      "cores": hardware["cores"],
      "devices": sorted(devices),
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
  """Says by how much each ratio is worse, if by more than the tolerance."""
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


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures, and appends or compares."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--check", action="store_true")
  add("--tolerance", type=float, default=0.15)
  add("--seconds", type=float, default=120)
  add("--weights", default="runs/benchmarks/weights")
  add("--history", default=str(HISTORY))
  args = parser.parse_args(arguments)
  load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
  if load > IDLE * cores and not args.check:
    raise SystemExit(
      f"the machine is busy: expected a load of at most {IDLE * cores:.1f} on"
      f" {cores} cores, got {load:.1f}. Nothing was measured; wait until other"
      " programs are done"
    )
  new = entry(measure_cells(args.weights, args.seconds))
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
