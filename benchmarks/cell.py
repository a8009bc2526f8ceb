"""One cell of `benchmarks.step`'s table, measured in a process of its own.

    python -m benchmarks.cell '{"side": ..., "work": {...}, ...}'

So peak memory and time to first step are this cell's own, a cell that fails
leaves the others, and only one framework has the device. The last line
printed is the result, JSON. `benchmarks.step` starts it, and lets it take each
turn: the process says READY, and waits for a line. WARM has it take a dispatch
that is not timed before the turn, since others were at work in between.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import measure
from benchmarks import work as work_lib

READY = "ready for a turn"
WARM = "warm up"
# What measures, and in which arithmetic.
SIDES = ("jax", "eager", "compiled", "teacher")


@dataclasses.dataclass(frozen=True)
class Cell:
  """What to measure.

  Attributes:
    side: "jax" (kd_jax), "eager" or "compiled" (PyTorch), or "teacher"
      (kd_jax's frozen teacher alone).
    work: what is trained.
    dtype: "float32" or "bfloat16"; eager is float32, compiled bfloat16.
    steps_per_dispatch: of kd_jax; 0: as a run of kd_jax settles it.
    devices: over which kd_jax spreads the batch; 0: each core of a CPU, as
      `launch.py` has it, else one.
    steps: of a turn, at least.
    turns: that are timed.
    workers: of the eager side's loader.
    weights: folder of the initial weights.
  """

  side: str
  work: work_lib.Work
  dtype: str
  steps_per_dispatch: int
  devices: int
  steps: int
  turns: int
  workers: int
  weights: str

  @property
  def key(self) -> dict[str, Any]:
    """What tells this cell from another, for JSON."""
    fields = dataclasses.asdict(self)
    return {k: v for k, v in fields.items() if k != "weights"}

  @classmethod
  def parse(cls, text: str) -> "Cell":
    """From the JSON of its fields."""
    fields = json.loads(text)
    return cls(**{**fields, "work": work_lib.Work(**fields["work"])})


def side_module(cell: Cell) -> Any:
  """The module of a cell's side, imported."""
  if cell.side in ("eager", "compiled"):
    from benchmarks import torch_side

    return torch_side
  from benchmarks import jax_side

  if cell.devices > 1:
    import jax

    # Before JAX first looks at its devices.
    jax.config.update("jax_num_cpu_devices", cell.devices)
  elif not cell.devices:
    from kd_jax.distributed import devices as devices_lib

    devices_lib.split_cpu(cell.work.batch)
  return jax_side


def count_devices(cell: Cell) -> int:
  """How many devices the cell takes, once its side is imported."""
  if cell.devices or cell.side in ("eager", "compiled"):
    return cell.devices or 1
  import jax

  return jax.device_count() if jax.default_backend() == "cpu" else 1


def build(cell: Cell, side: Any) -> Any:
  """The program to time, of the module of its side."""
  weights = pathlib.Path(cell.weights)
  if cell.side == "compiled":
    return side.Compiled(cell.work, weights)
  if cell.side == "eager":
    return side.Eager(cell.work, weights, workers=cell.workers)
  if cell.side == "teacher":
    return side.TeacherForward(
      cell.work, weights, dtype=cell.dtype, devices=count_devices(cell)
    )
  return side.Program(
    cell.work,
    weights,
    dtype=cell.dtype,
    steps_per_dispatch=cell.steps_per_dispatch,
    devices=count_devices(cell),
  )


def measure_cell(
  cell: Cell, before_turn: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
  """Builds, warms up and times.

  Args:
    cell: what is measured.
    before_turn: called before each turn; whether to warm up for it.

  Returns:
    For JSON, `measure.summary` of ms_per_step, and:
      images_per_second: of the median.
      first_step_seconds: building, compiling and one step. Imports and making
        up images are left out, and so are the first dispatch's other steps, at
        the median's speed: on a GPU kd_jax's dispatch is an epoch, PyTorch's a
        step.
      host_ms_per_dispatch: what the host is busy with; None where it waits for
        each step, and on a CPU, which works on the step in that time.
      peak_bytes: of peak_bytes_of, the device or the process.
      flops_per_step, share_of_peak: None where nothing counts or tells them.
      load_average: of the machine before.
      devices, steps_per_dispatch, steps_per_turn, first_losses, device,
      platform.
  """
  load = list(os.getloadavg())
  side = side_module(cell)
  _ = cell.work.source
  begin = time.perf_counter()
  program = build(cell, side)
  losses = program.run(program.steps)
  first = time.perf_counter() - begin
  # The second dispatch finds what the first one left, and a CUDA graph is
  # captured in the third.
  for _ in range(2):
    losses += program.run(program.steps)
  dispatches = program.dispatches
  if program.host_seconds is not None:
    program.host_seconds = 0.0
  steps = -(-cell.steps // program.steps) * program.steps

  def before() -> None:
    if before_turn():
      program.run(program.steps)

  turns = measure.take_turns(
    program.run, steps=steps, turns=cell.turns, before=before
  )
  summary = measure.summary("ms_per_step", turns)
  made = program.dispatches - dispatches
  device = side.device()
  host = None if device["platform"] == "cpu" else program.host_seconds
  flops = program.flops() if hasattr(program, "flops") else None
  seconds = summary["ms_per_step"] / 1e3
  most = measure.peak(device["device"], cell.dtype)
  devices = count_devices(cell)
  if most is not None:
    most *= devices
  return {
    **summary,
    "devices": devices,
    "images_per_second": cell.work.batch / seconds,
    "first_step_seconds": first - (program.steps - 1) * seconds,
    "steps_per_dispatch": program.steps,
    "steps_per_turn": steps,
    "host_ms_per_dispatch": None if host is None else 1e3 * host / made,
    "peak_bytes": device["peak_bytes"] or measure.peak_resident_bytes(),
    "peak_bytes_of": "device" if device["peak_bytes"] else "process",
    "flops_per_step": flops,
    "share_of_peak": flops / seconds / most if flops and most else None,
    "first_losses": losses[:3],
    "device": device["device"],
    "platform": device["platform"],
    "load_average": load,
  }


def wait_for_turn() -> bool:
  """Tells the process that started this one, and waits for its line.

  Returns:
    Whether it says to warm up.
  """
  print(READY, flush=True)
  line = sys.stdin.readline()
  if not line:
    raise SystemExit("expected a line for each turn, got the end of the input")
  return line.strip() == WARM


def main() -> None:
  """Measures, prints."""
  print(json.dumps(measure_cell(Cell.parse(sys.argv[1]), wait_for_turn)))


if __name__ == "__main__":
  main()
