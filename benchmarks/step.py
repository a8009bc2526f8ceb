"""A training step's speed in kd_jax and in PyTorch, side by side in one run.

    python -m benchmarks.step [--pairs TEACHER:STUDENT ...] [--methods ...]

The same work on made-up images, from the same weights, each cell in a process
of its own, one after the other; with --by_turns a work's cells turn by turn:

  jax        kd_jax's train chunk on its device pipeline, as a run has it
  eager      PyTorch, float32, in the published toolboxes' structure: a loader
             with workers, .item() each step
  compiled   PyTorch at its best: channels-last, bfloat16 autocast,
             torch.compile (with CUDA graphs on a GPU), the set and the
             augmentation on the device
  teacher    kd_jax's frozen teacher alone

--methods all takes every method, others those that PyTorch's side does not
have. Cells are measured in the order of the methods. What --out has already, of
the same commit and hardware, is not measured again: give the same command to
resume after --seconds. A cell that was not reached is "not run"; one that
failed says how. On a CPU set the two variables that benchmarks/cpu.sh sets.

FLOPs are XLA's count of kd_jax's step, and the work of all sides alike; the
share of the peak is of the arithmetic's own peak (`benchmarks.measure.PEAKS`).
Prints a table and writes a JSON file.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import operator
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import measure, processes
from benchmarks import work as work_lib
from benchmarks.cell import SIDES, Cell

NOT_RUN = "not run"


def is_large(pair: str) -> bool:
  """Whether the networks are those for ImageNet, by their names."""
  return pair.startswith("ResNet")


def make_work(pair: str, method: str, batch: int, args: Any) -> work_lib.Work:
  """The work of a pair "TEACHER:STUDENT"."""
  teacher, colon, student = pair.partition(":")
  if not colon:
    raise SystemExit(
      f"--pairs: expected TEACHER:STUDENT, got {pair!r}; for example"
      f" {work_lib.PAIRS[0]}"
    )
  large = is_large(pair)
  fields = {"k": args.negatives} if method == "crd" else {}
  return work_lib.Work(
    teacher=teacher,
    student=student,
    method=method,
    batch=batch,
    image_size=args.image_size or (224 if large else 32),
    classes=1000 if large else 100,
    # Of large images as many as fit in memory.
    examples=args.examples or (8 * batch if large else work_lib.CIFAR),
    pad=0 if large else 4,
    fields=fields,
  )


def make_cells(args: Any) -> list[Cell]:
  """The cells that the arguments ask for, in the order of the table."""
  methods = args.methods
  if methods in (["all"], ["others"]):
    known = () if methods == ["all"] else work_lib.COMMON
    methods = [m for m in work_lib.methods() if m not in known]
  cells = []
  for pair, batch, method in itertools.product(args.pairs, args.batch, methods):
    work = make_work(pair, method, batch, args)
    if args.no_augment:
      work = dataclasses.replace(work, pad=0, flip=False)
    for side in args.sides:
      if side in ("eager", "compiled") and method not in work_lib.COMMON:
        continue
      if side == "teacher" and not work.has_teacher:
        continue
      fixed = {"eager": ["float32"], "compiled": ["bfloat16"]}
      counts = args.steps_per_dispatch if side == "jax" else [0]
      devices = args.devices if side in ("jax", "teacher") else [1]
      for dtype, count, device in itertools.product(
        fixed.get(side, args.dtype), counts, devices
      ):
        cells.append(
          Cell(
            side=side,
            work=work,
            dtype=dtype,
            steps_per_dispatch=count,
            devices=device,
            steps=args.steps,
            turns=args.turns,
            workers=args.workers,
            weights=str(pathlib.Path(args.weights).absolute()),
          )
        )
  return cells


def _start(
  cell: Cell, seconds: float
) -> contextlib.AbstractContextManager[processes.Process]:
  variables = dict(os.environ)
  if cell.side in ("eager", "compiled"):
    variables["JAX_PLATFORMS"] = "cpu"  # it only reads kd_jax's tables
  fields = {**cell.key, "weights": cell.weights}
  return processes.started(
    ["benchmarks.cell", json.dumps(fields)], seconds, variables
  )


def measure_in_processes(
  cells: Sequence[Cell], seconds: float
) -> list[dict[str, Any]]:
  """Measures cells, a turn of each after the other.

  Args:
    cells: alive at the same time, each in a process of its own, but at work
      one at a time.
    seconds: for all of them.

  Returns:
    Their results, or {"error": why there is none}.
  """
  end = time.monotonic() + seconds
  with contextlib.ExitStack() as stack:
    found = []
    for cell in cells:
      left = max(end - time.monotonic(), 1.0)
      found.append(stack.enter_context(_start(cell, left)))
      found[-1].wait()  # builds and warms up
    while waiting := [p for p in found if p.result is None]:
      for process in waiting:
        process.take_turn(warm=len(cells) > 1)
    return [process.result for process in found if process.result]


def _share_flops(rows: list[dict[str, Any]]) -> None:
  """Gives the PyTorch cells the FLOPs that XLA counted of the same work."""
  counted = {
    json.dumps(row["cell"]["work"]): row["result"]["flops_per_step"]
    for row in rows
    if row["cell"]["side"] == "jax" and "flops_per_step" in row["result"]
  }
  for row in rows:
    result, cell = row["result"], row["cell"]
    if cell["side"] not in ("eager", "compiled") or "error" in result:
      continue
    flops = counted.get(json.dumps(cell["work"]))
    result["flops_per_step"] = flops
    most = measure.peak(result["device"], cell["dtype"])
    if flops and most:
      seconds = result["ms_per_step"] / 1e3
      result["share_of_peak"] = flops / seconds / most


def _known(path: pathlib.Path, head: dict[str, Any]) -> dict[str, Any]:
  """The results that a file has of the same commit, versions and hardware."""
  if not path.exists():
    return {}
  found = json.loads(path.read_text())
  same = all(found[k] == head[k] for k in ("commit", "versions"))
  same = same and found.get("xla_flags", "") == head["xla_flags"]
  same = same and all(
    found["hardware"].get(k) == head["hardware"][k]
    for k in ("cpu", "cores", "gpus")
  )
  # Without a commit nobody knows which code it was.
  if not same or head["commit"].endswith(("-dirty", "unknown")):
    return {}
  return {
    json.dumps(row["cell"]): row["result"]
    for row in found["rows"]
    if "error" not in row["result"]
  }


def measure_all(
  cells: Sequence[Cell],
  *,
  out: pathlib.Path,
  seconds: float,
  together: Callable[[Cell], Any] = id,
) -> dict[str, Any]:
  """Measures cell after cell; the file is whole after each.

  Args:
    cells: in their order.
    out: the JSON file; what it has already of this code is kept.
    seconds: after which no cell goes on.
    together: cells with the same of this, one behind the other, are measured
      turn by turn.

  Returns:
    The content of the file.
  """
  end = time.monotonic() + seconds
  head = measure.head()
  known = _known(out, head)
  rows: list[dict[str, Any]] = [
    {
      "cell": cell.key,
      "result": known.get(json.dumps(cell.key), {"error": NOT_RUN}),
    }
    for cell in cells
  ]
  open_cells = [
    (row, cell)
    for row, cell in zip(rows, cells)
    if row["result"].get("error") == NOT_RUN
  ]
  measure.write(out, {**head, "rows": rows})
  for _, group in itertools.groupby(open_cells, lambda pair: together(pair[1])):
    if end - time.monotonic() <= 0:
      break
    measured, ready = [], []
    for row, cell in group:
      measured.append(row)
      if failed := _prepare(cell, max(end - time.monotonic(), 1.0)):
        row["result"] = failed
      else:
        ready.append((row, cell))
    left = max(end - time.monotonic(), 1.0)
    results = measure_in_processes([cell for _, cell in ready], left)
    for (row, _), result in zip(ready, results, strict=True):
      row["result"] = result
    _share_flops(rows)
    measure.write(out, {**head, "rows": rows})
    for row in measured:
      print(_line(row), file=sys.stderr, flush=True)
  return {**head, "rows": rows}


def _prepare(cell: Cell, seconds: float) -> dict[str, Any] | None:
  """Makes a cell's initial weights on the CPU; an error, or None."""
  folder, work = pathlib.Path(cell.weights), cell.work
  names = [work.method_file, *(work.network_file(r) for r in work.networks)]
  if all((folder / name).exists() for name in names):
    return None
  fields = json.dumps(dataclasses.asdict(work))
  command = ["benchmarks.work", fields, cell.weights]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  with processes.started(command, seconds, environment) as process:
    process.wait()
    found = process.result
  return found if found and "error" in found else None


HEAD = (
  *("work", "side", "images/s", "ms/step", "spread", "first s", "host ms"),
  *("MB", "of peak"),
)


def _cells_of(row: dict[str, Any]) -> list[str]:
  cell, result = row["cell"], row["result"]
  work = cell["work"]
  name = f"{work['teacher']}:{work['student']} {work['method']}"
  name += f" {work['batch']}"
  if not (work["pad"] or work["flip"]):
    name += " bare"
  side = f"{cell['side']} {cell['dtype']}"
  if cell["steps_per_dispatch"]:
    side += f" x{cell['steps_per_dispatch']}"
  if (devices := result.get("devices", cell["devices"])) > 1:
    side += f" on {devices}"
  if "error" in result:
    return [name, side, result["error"], *[""] * 6]
  host, share = result["host_ms_per_dispatch"], result["share_of_peak"]
  least, most = result["ms_per_step_least"], result["ms_per_step_most"]
  return [
    name,
    side,
    f"{result['images_per_second']:,.0f}",
    f"{result['ms_per_step']:.2f}",
    f"{least:.2f}-{most:.2f}",
    f"{result['first_step_seconds']:.1f}",
    "-" if host is None else f"{host:.2f}",
    f"{result['peak_bytes'] / 1e6:,.0f}",
    "-" if share is None else f"{share:.1%}",
  ]


def _line(row: dict[str, Any]) -> str:
  return "  ".join(filter(None, _cells_of(row)))


def report(result: dict[str, Any]) -> str:
  """The table of a result, with a line about the machine."""
  hardware = result["hardware"]
  devices = {
    row["result"]["device"]
    for row in result["rows"]
    if "device" in row["result"]
  }
  load = hardware["load_average"][0]
  lines = [
    f"{hardware['cpu']}, {hardware['cores']} cores (load {load:.1f} before);"
    f" devices: {', '.join(sorted(devices)) or 'none seen'};"
    f" commit {result['commit']}",
    measure.table(HEAD, [_cells_of(row) for row in result["rows"]]),
  ]
  return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The arguments, checked."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--pairs", nargs="+", default=list(work_lib.PAIRS))
  add("--methods", nargs="+", default=list(work_lib.COMMON))
  add("--batch", type=int, nargs="+", default=[64, 256])
  add("--sides", nargs="+", choices=SIDES, default=list(SIDES[:3]))
  add(
    *("--dtype",),
    nargs="+",
    choices=("float32", "bfloat16"),
    default=["float32", "bfloat16"],
    help="of kd_jax's side",
  )
  add("--steps", type=int, default=50, help="of a turn, at least")
  add("--turns", type=int, default=5)
  add(
    *("--steps_per_dispatch",),
    type=int,
    nargs="+",
    default=[0],
    help="of kd_jax's side; 0: 1 on a CPU, else an epoch",
  )
  add(
    *("--devices",),
    type=int,
    nargs="+",
    default=[0],
    help="of kd_jax's side; 0: each core of a CPU, as a run has it, else 1",
  )
  add("--examples", type=int, help="in the training set (50,000)")
  add("--image_size", type=int, help="in pixels (32; of ResNets 224)")
  add(
    "--no_augment", action="store_true", help="the bare step: no crop or flip"
  )
  add(
    "--by_turns",
    action="store_true",
    help="the cells of a work take turns, so that what slows the machine for a"
    " while slows all of them; their processes are alive at once, which takes"
    " the memory of all",
  )
  add("--negatives", type=int, default=16384, help="of crd")
  add(
    *("--workers",),
    type=int,
    default=min(8, len(os.sched_getaffinity(0))),
    help="of the eager side's loader",
  )
  add("--seconds", type=float, default=1e6, help="after which it ends")
  add("--weights", default="runs/benchmarks/weights")
  add("--out", default="runs/benchmarks/step.json")
  args = parser.parse_args(arguments)
  for method in args.methods:
    if method not in {*work_lib.methods(), "all", "others"}:
      parser.error(
        f"--methods: expected 'all', 'others' or some of"
        f" {', '.join(work_lib.methods())}, got {method!r}"
      )
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures, prints and writes."""
  args = parse(arguments)
  out = pathlib.Path(args.out)
  result = measure_all(
    make_cells(args),
    out=out,
    seconds=args.seconds,
    together=operator.attrgetter("work") if args.by_turns else id,
  )
  print(report(result))
  print(f"written: {out}")


if __name__ == "__main__":
  main()
